"""Which flags do commands share, and how do they become an engine, sampling and a template?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
from fasteagle.commands.compiling import require_compiler
from fasteagle.commands.describe import describe
from fasteagle.commands.report import note
from fasteagle.draft import lookahead
from fasteagle.draft.choice import FLAGS, NAMES, check_choice
from fasteagle.draft.lookup import LOOKUP, NGRAM
from fasteagle.draft.vocabulary import read_vocabulary
from fasteagle.engine import Engine
from fasteagle.request import DEFAULT_MAX_NEW_TOKENS
from fasteagle.sample import SamplingParams
from fasteagle.source import dtype_text
from fasteagle.tokenizer import Tokenizer, has_tokenizer
from fasteagle.tree import DynamicTree, parse_tree

AUTO = "auto"
TALK_TOKENS = 1024  # what is compiled before a talk begins; a longer one compiles as it grows


def positive(text: str) -> int:
    """A whole number above 0; the type of an argument."""
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number above 0, below 10^9")
    return int(text)


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
    _add_draft(group, tree_top_k)
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


def _add_draft(group: argparse._ArgumentGroup, tree_top_k: Sequence[str]) -> None:
    group.add_argument(
        "--draft_checkpoint_path",
        metavar="PATH",
        help="folder, weight file or hub id of its EAGLE-1 head; without one a model of yours is "
        "decoded plainly",
    )
    group.add_argument(
        "--draft",
        choices=NAMES,
        help="none: decode plainly, one token a round; lookup: guess what followed the newest "
        "tokens before; lookahead: guess what the model itself would write further on; eagle: "
        "insist on a head",
    )
    group.add_argument(
        "--tree",
        help="draft tree: mc_sim_7b_63, chain-N, dynamic (EAGLE-2), a JSON list of paths or a file "
        "that holds one; default: tree.json beside the head, else mc_sim_7b_63",
    )
    whole = DynamicTree()
    sizes = {
        ("--total_tokens",): (
            "N",
            "nodes that are verified, the root included",
            whole.total_tokens,
        ),
        ("--depth",): ("D", "levels that are drafted below the first", whole.depth),
        tuple(tree_top_k): ("K", "nodes that a level expands, and children of each", whole.top_k),
    }
    for names, (metavar, text, default) in sizes.items():
        group.add_argument(
            *names,
            type=positive,
            metavar=metavar,
            help=f"--tree dynamic: {text} (default: {default})",
        )
    _add_guesses(group)


def _add_guesses(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--draft_vocab",
        metavar="FILE",
        help="guess only the tokens that this file of `fasteagle draft-vocab` lists; none: guess "
        "all; default: draft_vocab.json beside the head, else all",
    )
    texts = {
        "lookup": "with a head, guess K more tokens by prompt lookup (default: none); with "
        f"--draft lookup, guess K (default: {LOOKUP})",
        "ngram": f"lookup: most tokens that must match (default: {NGRAM}); lookahead: tokens of an "
        f"n-gram (default: {lookahead.NGRAM})",
        "window": f"lookahead: places where it writes ahead (default: {lookahead.WINDOW})",
        "guesses": f"lookahead: n-grams that a round tries (default: {lookahead.GUESSES})",
    }
    for name, text in texts.items():
        group.add_argument(f"--{name}", type=positive, metavar="K", help=text)


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
        args.draft_checkpoint_path,
        draft=args.draft,
        tree=args.tree,
        draft_vocab=args.draft_vocab,
        lookup=args.lookup or 0,
        ngram=args.ngram,
        window=args.window,
        guesses=args.guesses,
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
    asked = {flag: getattr(args, flag) for flag in FLAGS}
    asked["draft_vocab"] = None if args.draft_vocab == ALL_TOKENS else args.draft_vocab
    path, base = args.draft_checkpoint_path, args.checkpoint_path
    check_choice(args.draft, asked, path=path is not None, base=base is not None)
    args.tree = tree_of(args)
    if args.draft_vocab not in (None, ALL_TOKENS):
        read_vocabulary(args.draft_vocab)


def tree_of(args: argparse.Namespace) -> str | None:
    """The tree that the flags ask for, as `parse_tree` reads it; ValueError if it is none."""
    sizes = (args.total_tokens, args.depth, args.tree_top_k)
    if args.tree == "dynamic":
        whole = DynamicTree()
        defaults = (whole.total_tokens, whole.depth, whole.top_k)
        chosen = (size or default for size, default in zip(sizes, defaults, strict=True))
        return DynamicTree(*chosen).name
    if any(sizes):
        raise ValueError(
            "--total_tokens, --depth and --tree_top_k shape the dynamic tree; add --tree dynamic"
        )
    if args.tree is not None:
        parse_tree(args.tree)
    tree: str | None = args.tree
    return tree


def require_tokenizer(path: str, revision: str | None) -> None:
    """ValueError if a checkpoint has no tokenizer beside it."""
    if not has_tokenizer(folder_of(path, revision=revision)):
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
