"""Which flags do commands share, and how do they become an engine, sampling and a template?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fasteagle.assemble import (
    DTYPES,
    NO_DRAFT,
    draft_dtype,
    folder_of,
    load,
    notices,
    pick_device,
    pick_dtype,
)
from fasteagle.chat import TEMPLATES, ChatTemplate, default_template, jinja_template
from fasteagle.checkpoint import open_kind
from fasteagle.commands.compiling import require_compiler
from fasteagle.commands.describe import describe
from fasteagle.commands.draft_flags import add_draft, asked_of, check_model_flags
from fasteagle.commands.numbers import positive
from fasteagle.commands.report import note
from fasteagle.engine import Engine
from fasteagle.request import DEFAULT_MAX_NEW_TOKENS
from fasteagle.sample import SamplingParams
from fasteagle.source import open_checkpoint
from fasteagle.tokenizer import Tokenizer, has_tokenizer

AUTO = "auto"
TALK_TOKENS = 1024  # what is compiled before a talk begins; a longer one compiles as it grows


def add_model(
    parser: argparse.ArgumentParser, *, tree_top_k: Sequence[str] = ("--tree_top_k",)
) -> None:
    """The flags that name a model and how it is loaded; tree_top_k: names of that flag."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint_path",
        metavar="PATH",
        help="folder, weight file or hub id (owner/name) of the model; default: the embedded pair",
    )
    add_draft(group, tree_top_k)
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


def add_compile(parser: argparse.ArgumentParser) -> None:
    """The flag that turns compiling on."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile (tens of seconds the first time); the output stays the same",
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
    tell_notices(args)
    started = time.perf_counter()
    engine = load(
        args.checkpoint_path,
        args.draft_checkpoint_path,
        draft=args.draft,
        **asked_of(args),
        dtype=args.dtype,
        device=args.device,
        compiled=compiled,
        batch=batch,
        max_length=args.max_length,
        revision=args.revision,
    )
    return engine, f"loaded {describe(engine)} in {time.perf_counter() - started:.1f} s"


def tell_notices(args: argparse.Namespace) -> None:
    """Say what a user should know of quantized checkpoints before they run."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, args.checkpoint_path, revision=args.revision)
    said = notices(args.checkpoint_path, dtype, device, revision=args.revision)
    draft = args.draft_checkpoint_path
    if draft is not None:
        own = draft_dtype(draft, open_checkpoint(draft), args.dtype, dtype, device)
        said += notices(draft, own, device)
    for notice in said:
        note(notice)


def require_tokenizer(path: str, revision: str | None) -> None:
    """ValueError if a checkpoint has no tokenizer beside it."""
    if not has_tokenizer(folder_of(path, revision=revision)):
        open_kind(path, "target", revision=revision)  # a head has none: that would be the reason
        raise ValueError(
            f"{path} has no tokenizer; put its tokenizer.json or tokenizer.model beside the "
            "weights, or give token ids to `fasteagle trace`"
        )


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
