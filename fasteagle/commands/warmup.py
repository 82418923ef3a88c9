"""Compile once, so that later starts with --compile take seconds.

fasteagle warmup
fasteagle warmup --checkpoint_path meta-llama/Llama-2-7b-chat-hf \\
    --draft_checkpoint_path yuhuili/EAGLE-llama2-chat-7B --n_tokens 4096 --sampled

What is compiled is kept in ~/.cache/fasteagle, or in the folder that FASTEAGLE_CACHE names. It is
found again by the same model, head, tree, dtype, --max_length and number of threads, on the same
machine with the same torch and fasteagle. --compile elsewhere keeps what it compiles there, too.
"""

from __future__ import annotations

import argparse

from fasteagle.commands.compiling import warm_up
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import TALK_TOKENS, add_model, load_engine
from fasteagle.commands.report import note
from fasteagle.step_files import VARIABLE, cache_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle warmup`."""
    add_model(parser)
    parser.add_argument(
        "--n_tokens",
        type=positive,
        default=TALK_TOKENS,
        metavar="N",
        help="compile for texts of up to so many tokens, prompt and output together, or for the "
        "model's whole context if that is less (default: %(default)s)",
    )
    parser.add_argument(
        "--sampled", action="store_true", help="compile for temperatures above 0 too"
    )
    parser.add_argument(
        "--batch_size",
        type=positive,
        default=1,
        metavar="N",
        help="rows that are decoded together, as generate --batch does (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Compile, keep, and say where."""
    folder = cache_folder()
    if folder is None:
        raise ValueError(f"{VARIABLE} is off, so nothing would be kept; unset it or name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error}), so nothing would be kept; name another folder "
            f"in {VARIABLE}"
        ) from error
    engine, loaded = load_engine(args, batch=args.batch_size, compiled=True)
    note(loaded)
    for sampled in (False, True) if args.sampled else (False,):
        note("temperature above 0:" if sampled else "greedy:", end=" ")
        warm_up(engine, sampled=sampled, n_tokens=args.n_tokens, call=args.call)
    note(f"kept in {folder}")
