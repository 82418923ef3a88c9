"""Convert an EAGLE-1/2 head into a fasteagle folder; its target model is not needed.

python convert/convert_hf_checkpoint_EAGLE.py --checkpoint_dir yuhuili/EAGLE-llama2-chat-7B
python convert/convert_hf_checkpoint_EAGLE.py --checkpoint_dir EAGLE-Vicuna-7B --out vicuna-head
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install

from fasteagle import commands
from fasteagle.commands import convert

if __name__ == "__main__":
    sys.exit(commands.run(convert, ["--kind", "eagle", *sys.argv[1:]]))
