"""Quantize a target model (LLaMA, Mistral, Qwen) to int8 or int4, into a file beside it.

python quantize/quantize_llama.py --checkpoint_path checkpoints/vicuna --mode int4 --groupsize 32
python quantize/quantize_llama.py --checkpoint_path checkpoints/vicuna --mode int4-gptq \\
    --calibration wiki.txt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install

from fasteagle import commands
from fasteagle.commands import quantize

if __name__ == "__main__":
    sys.exit(commands.run(quantize, ["--kind", "target", *sys.argv[1:]]))
