"""Continue a prompt with plain or EAGLE decoding; the text streams to stdout.

python generate.py --prompt "def read_lines(path):" --max_new_tokens 60
python generate.py --checkpoint_path vicuna-7b --draft_checkpoint_path EAGLE-Vicuna-7B --compile
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # runs without an install

from fasteagle import commands
from fasteagle.commands import generate

if __name__ == "__main__":
    sys.exit(commands.run(generate))
