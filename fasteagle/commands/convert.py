"""Convert a Hugging Face target model or EAGLE head into a fasteagle folder.

Which kind it is shows in the weights (the scripts in convert/ take one kind each). Prints
the folder that was written.
"""

from __future__ import annotations

import argparse

import torch

from fasteagle.checkpoint import KINDS, convert
from fasteagle.hf_config import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle convert` and of both scripts in convert/."""
    parser.add_argument(
        "--checkpoint_dir",
        required=True,
        help="folder or weight file of the checkpoint, or a hub id like owner/name",
    )
    parser.add_argument(
        "--kind",
        choices=list(KINDS),
        help="refuse a checkpoint of another kind: eagle is EAGLE-1 to 3, head any draft head "
        "(default: take all)",
    )
    parser.add_argument(
        "--out",
        help="folder to write (default: <checkpoint_dir>-fasteagle, or checkpoints/<hub id>)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)"
    )


def run(args: argparse.Namespace) -> None:
    """Convert and print the folder."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    folder = convert(
        args.checkpoint_dir, args.out, kind=args.kind, revision=args.revision, dtype=dtype
    )
    print(folder)
