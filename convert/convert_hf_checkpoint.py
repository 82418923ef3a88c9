"""Convert a Hugging Face target model (LLaMA, Mistral, Qwen) into a fasteagle folder.

python convert/convert_hf_checkpoint.py --checkpoint_dir meta-llama/Llama-2-7b-chat-hf
python convert/convert_hf_checkpoint.py --checkpoint_dir vicuna-7b --out vicuna --dtype bfloat16
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install

from fasteagle import commands
from fasteagle.commands import convert

if __name__ == "__main__":
    sys.exit(commands.run(convert, ["--kind", "target", *sys.argv[1:]]))
