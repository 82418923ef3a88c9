"""Quantize an EAGLE-1/2 head to int8 or int4, into a file beside it.

python quantize/quantize_EAGLE.py --checkpoint_path checkpoints/vicuna-eagle --mode int4
python quantize/quantize_EAGLE.py --checkpoint_path checkpoints/vicuna-eagle --mode int4-gptq \\
    --target_checkpoint_path checkpoints/vicuna --calibration wiki.txt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install

from fasteagle import commands
from fasteagle.commands import quantize

if __name__ == "__main__":
    sys.exit(commands.run(quantize, ["--kind", "eagle", *sys.argv[1:]]))
