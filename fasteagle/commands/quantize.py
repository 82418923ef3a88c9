"""Quantize a model or a draft head to int8 or int4, into one file beside the checkpoint.

fasteagle quantize --checkpoint_path checkpoints/vicuna --mode int4 --groupsize 32
fasteagle quantize --checkpoint_path checkpoints/vicuna --mode int4-gptq --calibration text.txt

Which kind it is shows in the weights (the scripts in quantize/ take one kind each). Prints
the file that was written: give it as --checkpoint_path, or --draft_checkpoint_path, in place of the
folder. int4-gptq chooses the codes for the inputs that a calibration text gives.
"""

from __future__ import annotations

import argparse

from fasteagle.assemble import pick_device
from fasteagle.checkpoint import KINDS
from fasteagle.commands.numbers import positive
from fasteagle.commands.report import note
from fasteagle.quant.layout import GROUP_SIZES
from fasteagle.quant.rounding import CLIPS
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from fasteagle.quantize_gptq import Calibration, quantize_calibrated
from fasteagle.windows import LENGTH, N_WINDOWS

GPTQ = "int4-gptq"
MODES = ("int8", "int4", GPTQ)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle quantize` and of both scripts in quantize/."""
    parser.add_argument(
        "--checkpoint_path",
        required=True,
        metavar="PATH",
        help="folder, weight file or hub id of the checkpoint; the file is written beside it",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    parser.add_argument(
        "--kind",
        choices=list(KINDS),
        help="refuse a checkpoint of another kind: eagle is EAGLE-1 to 3, head any draft head "
        "(default: take all)",
    )
    _add_recipe(parser.add_argument_group("what to make"))
    _add_calibration(parser.add_argument_group("calibration, for int4-gptq"))


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mode", choices=MODES, default="int4", help="default: %(default)s")
    group.add_argument(
        "--groupsize",
        type=int,
        choices=GROUP_SIZES,
        help=f"inputs that share a scale, in 4 bits (default: {Recipe(4).group_size})",
    )
    group.add_argument(
        "--clip",
        choices=CLIPS,
        default="mse",
        help="range of a group: all of its values, or the one with the least squared error "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--lm_head",
        type=int,
        choices=(4, 8, 16),
        help=f"bits of a model's lm_head; 16 leaves it (default: {Recipe(4).lm_head_bits})",
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="matrices that stay in 16 bits, such as 'layers.0.*' or '*.down_proj'; may be given "
        "several times. Embeddings, norms and biases always do",
    )
    group.add_argument(
        "--pad",
        action="store_true",
        help="where the group size does not divide a matrix's inputs, fill up its last group",
    )


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help='text, or a .jsonl file with "prompt" or "turns", such as the model will see',
    )
    group.add_argument(
        "--calibration_samples",
        type=positive,
        metavar="N",
        help=f"windows of the text, at most (default: {N_WINDOWS})",
    )
    group.add_argument(
        "--calibration_length",
        type=positive,
        metavar="N",
        help=f"tokens of a window, at most (default: {LENGTH})",
    )
    group.add_argument("--seed", type=int, help="of the choice of windows (default: 0)")
    group.add_argument(
        "--target_checkpoint_path",
        metavar="PATH",
        help="the model of an EAGLE head, whose features are the head's inputs",
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")


def run(args: argparse.Namespace) -> None:
    """Quantize and print the file."""
    check_flags(args)
    recipe = Recipe(
        bits=8 if args.mode == "int8" else 4,
        group_size=args.groupsize or Recipe(4).group_size,
        clip=args.clip,
        lm_head_bits=args.lm_head or Recipe(4).lm_head_bits,
        keep=tuple(args.keep),
        pad=args.pad,
        gptq=args.mode == GPTQ,
    )
    plan = plan_quantization(args.checkpoint_path, recipe, kind=args.kind, revision=args.revision)
    if args.lm_head is not None and plan.checkpoint.kind == "eagle":
        raise ValueError("an EAGLE head uses its model's lm_head; drop --lm_head")
    if args.lm_head is not None and plan.checkpoint.kind == "medusa":
        raise ValueError("Medusa heads have --mode's bits as a whole; drop --lm_head")
    if not recipe.gptq:
        print(quantize_checkpoint(plan))
        return
    text = Calibration(
        args.calibration,
        n_windows=args.calibration_samples or N_WINDOWS,
        length=args.calibration_length or LENGTH,
        seed=args.seed or 0,
        target=args.target_checkpoint_path,
        device=pick_device(args.device),
    )
    print(quantize_calibrated(plan, text, say=note))


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for flags that the mode does not use."""
    if args.mode == GPTQ and args.calibration is None:
        raise ValueError(f"--mode {GPTQ} needs --calibration FILE, a text to calibrate on")
    if args.mode == "int8" and args.lm_head != 4 and args.groupsize is not None:
        raise ValueError("--mode int8 has one scale a row; drop --groupsize, or use int4")
    unused = [
        *("calibration", "calibration_samples", "calibration_length", "seed"),
        *("target_checkpoint_path", "device"),
    ]
    given = [f"--{name}" for name in unused if getattr(args, name) is not None]
    if args.mode != GPTQ and given:
        raise ValueError(f"--mode {args.mode} needs no {given[0]}; drop it, or use {GPTQ}")
