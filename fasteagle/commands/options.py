"""Which flags do commands share, and how do they become an engine, sampling and a template?"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from fasteagle.assemble import (
    ALL_TOKENS,
    DTYPES,
    NO_DRAFT,
    folder_of,
    load,
    notices,
    pick_device,
    pick_dtype,
)
from fasteagle.chat import TEMPLATES, ChatTemplate, default_template, jinja_template
from fasteagle.commands import first_line, ran_out_of_memory
from fasteagle.commands.describe import describe
from fasteagle.commands.report import note
from fasteagle.draft.vocabulary import read_vocabulary
from fasteagle.engine import Engine
from fasteagle.request import DEFAULT_MAX_NEW_TOKENS
from fasteagle.sample import SamplingParams
from fasteagle.source import dtype_text
from fasteagle.tokenizer import Tokenizer, has_tokenizer
from fasteagle.tree import parse_tree

AUTO = "auto"
TALK_TOKENS = 1024  # what is compiled before a talk begins; a longer one compiles as it grows


def positive(text: str) -> int:
    """A whole number above 0; the type of an argument."""
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number above 0, below 10^9")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint_path",
        metavar="PATH",
        help="folder, weight file or hub id (owner/name) of the model; default: the embedded pair",
    )
    _add_draft(group)
    group.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of weights and cache; default: float32 on the CPU, the checkpoint's own on CUDA, "
        "bfloat16 for a quantized model",
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    group.add_argument(
        "--max_length",
        type=positive,
        metavar="N",
        help="most tokens of prompt and output together, reserved at once; default: the model's "
        "context, with memory for 8192 of it until a request needs more",
    )
    group.add_argument("--revision", help="branch, tag or commit of the model's hub id")


def _add_draft(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--draft_checkpoint_path",
        metavar="PATH",
        help="folder, weight file or hub id of its EAGLE-1 head; without one a model of yours is "
        "decoded plainly",
    )
    group.add_argument(
        "--draft",
        choices=["eagle", NO_DRAFT],
        help="none: decode plainly, one token a round; eagle: insist on a head",
    )
    group.add_argument(
        "--tree",
        help="draft tree: mc_sim_7b_63, chain-N, a JSON list of paths or a file that holds one; "
        "default: tree.json beside the head, else mc_sim_7b_63",
    )
    group.add_argument(
        "--draft_vocab",
        metavar="FILE",
        help="guess only the tokens that this file of `fasteagle draft-vocab` lists; none: guess "
        "all; default: draft_vocab.json beside the head, else all",
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """The flag that turns compiling on."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile before decoding (tens of seconds the first time); the output stays the same",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The flags that say how tokens are chosen and when the text ends."""
    group, defaults = parser.add_argument_group("sampling"), SamplingParams()
    group.add_argument(
        "--max_new_tokens",
        type=positive,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help="most tokens to write (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="0 takes the likeliest token, 1 samples what the model says (default: %(default)s)",
    )
    group.add_argument(
        "--top_k",
        type=int,
        default=defaults.top_k,
        help="sample among the k likeliest tokens only; 0 is all (default: %(default)s)",
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=defaults.top_p,
        help="sample among the likeliest tokens that hold this much probability; 1 is all "
        "(default: %(default)s)",
    )
    group.add_argument("--seed", type=int, help="of sampling; default: another one at every run")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STRING",
        help="end the text before this string; may be given several times",
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling that the flags ask for."""
    return SamplingParams(args.temperature, args.top_k, args.top_p, args.seed)


def nth_sample(sampling: SamplingParams, index: int) -> SamplingParams:
    """The sampling of sample `index`: the seed, if there is one, plus the index."""
    seed = sampling.seed
    return sampling if seed is None else replace(sampling, seed=seed + index)


def load_engine(
    args: argparse.Namespace, *, batch: int = 1, text: bool = True, compiled: bool = False
) -> tuple[Engine, str]:
    """The engine that the flags of `add_model` ask for, and a line that tells what was loaded.

    Wrong calls end before weights are read. text: the command needs a tokenizer.
    """
    check_model_flags(args)
    if compiled:
        require_compiler(pick_device(args.device))
    if text and args.checkpoint_path is not None:
        require_tokenizer(args.checkpoint_path, args.revision)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, args.checkpoint_path, revision=args.revision)
    paths = {args.checkpoint_path: args.revision, args.draft_checkpoint_path: None}
    for path, revision in paths.items():
        for notice in notices(path, dtype, device, revision=revision):
            note(notice)
    started = time.perf_counter()
    engine = load(
        args.checkpoint_path,
        NO_DRAFT if args.draft == NO_DRAFT else args.draft_checkpoint_path,
        tree=args.tree,
        draft_vocab=args.draft_vocab,
        dtype=None if dtype is None else dtype_text(dtype),
        device=args.device,
        compiled=compiled,
        batch=batch,
        max_length=args.max_length,
        revision=args.revision,
    )
    return engine, f"loaded {describe(engine)} in {time.perf_counter() - started:.1f} s"


def check_model_flags(args: argparse.Namespace) -> None:
    """ValueError for model flags that contradict each other, or a tree or file that is none."""
    plain = args.draft == NO_DRAFT
    if plain and args.draft_checkpoint_path is not None:
        raise ValueError("--draft none and --draft_checkpoint_path exclude each other; drop one")
    if plain and args.tree is not None:
        raise ValueError("--draft none has no tree; drop --tree, or decode with a head")
    without_head = args.checkpoint_path is not None and args.draft_checkpoint_path is None
    if args.draft == "eagle" and without_head:
        raise ValueError("--draft eagle needs --draft_checkpoint_path")
    if args.tree is not None:
        parse_tree(args.tree)
    if args.draft_vocab not in (None, ALL_TOKENS):
        if plain:
            raise ValueError("--draft none guesses nothing; drop --draft_vocab")
        read_vocabulary(args.draft_vocab)


def require_tokenizer(path: str, revision: str | None) -> None:
    """ValueError if a checkpoint has no tokenizer beside it."""
    if not has_tokenizer(folder_of(path, revision=revision)):
        raise ValueError(
            f"{path} has no tokenizer; put its tokenizer.json or tokenizer.model beside the "
            "weights, or give token ids to `fasteagle trace`"
        )


def compiler_problem(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, if anything."""
    if device.type == "cuda":
        return None if has_triton() else "Triton, which is not installed"
    program = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    return None if shutil.which(program) else f"a C++ compiler, and {program} is not found"


def require_compiler(device: torch.device) -> None:
    """ValueError if nothing here can compile for `device`."""
    problem = compiler_problem(device)
    if problem:
        raise ValueError(f"--compile needs {problem}; install it, or leave out --compile")


def warm_up(engine: Engine, *, sampled: bool, n_tokens: int) -> float:
    """Compile every step for sequences of `n_tokens`; returns the seconds."""
    note("compiling ...", end=" ")
    started = time.perf_counter()
    try:
        engine.warm_up(sampled=sampled, longest=n_tokens + engine.drafter.n_nodes)
    except RuntimeError as error:  # Dynamo's and Inductor's errors are
        if ran_out_of_memory(error):
            raise
        raise ValueError(
            f"compiling failed ({first_line(error)}); leave out --compile, and see what "
            "`fasteagle doctor` says of torch.compile"
        ) from error
    seconds = time.perf_counter() - started
    note(f"{seconds:.1f} s")
    return seconds


def pick_template(name: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that --chat_template names; None for "none"."""
    known = TEMPLATES.keys() - {NO_DRAFT}
    if name == "none":
        return None
    if name == AUTO:
        template = default_template(tokenizer)
        if template is None:
            raise ValueError(
                "the checkpoint has no chat template; give --chat_template "
                f"{', '.join(sorted(known))}, a Jinja file, or none to continue plain text"
            )
        return template
    if name in known:
        return TEMPLATES[name]
    if name in tokenizer.chat_templates:
        return jinja_template(tokenizer.chat_templates[name], name=name)
    if not Path(name).is_file():
        choices = ", ".join([AUTO, *sorted(known), *tokenizer.chat_templates, "none"])
        raise ValueError(f"--chat_template {name!r} is neither one of {choices} nor a Jinja file")
    try:
        return jinja_template(Path(name).read_text(encoding="utf-8"), name=name)
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat_template {name} is not UTF-8 text ({error.reason})") from error
