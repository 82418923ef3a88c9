"""Find the draft tree that is the fastest for a pair, on this device and in this precision.

fasteagle tune --out tree.json --plot tree.png
fasteagle tune --checkpoint_path vicuna-7b --draft_checkpoint_path EAGLE-Vicuna-7B \\
    --prompts questions.jsonl --chat_template vicuna

Counts along the model's own texts how often which guess of the head is right, times the parts of a
round, predicts every tree up to 64 rows, lets the best ones race plain decoding on the prompts and
writes the fastest as tree.json beside the head, where loading finds it. If plain decoding is faster
than all of them the file says so, and loading obeys. Compiling takes minutes the first time.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fasteagle import demo
from fasteagle.assemble import (
    draft_maker,
    find_tokenizer,
    folder_of,
    pick_device,
    pick_dtype,
)
from fasteagle.checkpoint import load_target
from fasteagle.commands.compiling import require_compiler
from fasteagle.commands.demo import PROMPTS, threads
from fasteagle.commands.draft_flags import asked_of, check_model_flags
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import add_model, pick_template, require_tokenizer, tell_notices
from fasteagle.commands.report import note, output_file, write
from fasteagle.commands.trace import read_prompt_ids
from fasteagle.commands.tune_report import draw, file_text, summary, table
from fasteagle.draft.base import Drafter
from fasteagle.draft.choice import BY_NAME
from fasteagle.draft.grow import TreeDrafter
from fasteagle.hub import is_hub_id
from fasteagle.model import Transformer
from fasteagle.prompt_files import read_prompts
from fasteagle.sample import SamplingParams
from fasteagle.tokenizer import Tokenizer
from fasteagle.tree import Tree
from fasteagle.tree_file import FILE, conditions
from fasteagle.tune import tune
from fasteagle.tuning.setting import DEPTH, ROWS, Pair, Settings

OWN_TOKENS = 64  # of the embedded pair's own prompts: longer texts of so small a model loop
NEW_TOKENS = 128
# What the search decides, or a tree does not have.
DECIDED = ("tree", "total_tokens", "depth", "tree_top_k", "speculate_k")
OTHER_DRAFTS = ("lookup", "ngram", "window", "guesses")


class Files(NamedTuple):
    """Where the models are and where the tree goes."""

    base: str
    head: str
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle tune`."""
    add_model(parser)
    group = parser.add_argument_group("measuring")
    add_prompts(group)
    add_search(group)
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    group.add_argument(
        "--no_compile", action="store_true", help="tune for decoding without --compile"
    )
    group.add_argument("--out", metavar="FILE", help=f"default: {FILE} beside the head")
    group.add_argument("--plot", metavar="FILE", help="draw what was found as PNG")


def add_prompts(group: argparse._ArgumentGroup) -> None:
    """The flags that say what is written while it is measured."""
    sources = group.add_mutually_exclusive_group()
    sources.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts like those to come: one a line, or a .jsonl file with "
        '"prompt" or "turns"; default for the embedded pair: some of its own',
    )
    sources.add_argument(
        "--prompt_ids", metavar="FILE", help="prompts as a JSON list of lists of token ids"
    )
    group.add_argument(
        "--chat_template",
        default="none",
        metavar="NAME",
        help="write --prompts as chat messages: auto, vicuna, llama-2-chat or a Jinja file; "
        "default: none, plain text",
    )
    group.add_argument(
        "--max_prompts", type=positive, default=16, metavar="N", help="use the first N of them "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max_new_tokens",
        type=positive,
        metavar="N",
        help=f"most tokens a prompt (default: {NEW_TOKENS}; {OWN_TOKENS} for the pair's own)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token, 1 samples what the model says (default: %(default)s)",
    )


def add_search(group: argparse._ArgumentGroup) -> None:
    """The flags that say how much is tried."""
    group.add_argument(
        "--max_nodes", type=positive, default=ROWS, metavar="N", help="most rows of a tree, the "
        "root included (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--racers", type=positive, default=4, metavar="N", help="trees that are raced, beside the "
        "usual one (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--repeats",
        type=positive,
        default=5,
        metavar="N",
        help="of the race (default: %(default)s)",
    )
    group.add_argument(
        "--seconds",
        type=positive,
        default=10,
        metavar="N",
        help="for timing the parts of a round, and as many for whole rounds, after compiling "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Tune, print the race, write the file. Wrong calls end before weights are read."""
    files = check_call(args)
    prompts = given_prompts(args)
    with ExitStack() as stack:
        out = stack.enter_context(output_file(str(files.out), "--out"))
        picture = stack.enter_context(output_file(args.plot, "--plot")) if args.plot else None
        if args.threads:
            stack.enter_context(threads(args.threads))
        pair, tokenizer = load_pair(files, args)
        ids = token_ids(prompts, tokenizer, args)
        check_prompts(ids, pair.target)
        result = tune(pair, ids, settings_of(args), say=note)
        place = conditions(pair.target)
        out.write(file_text(result, place, settings_of(args), ids))
        if picture:
            draw(result, place, picture)
    write(table(result))
    note(f"wrote {files.out}")
    write(summary(result))


def check_call(args: argparse.Namespace) -> Files:
    """Where the pair is and what is written; ValueError for flags that do not fit together."""
    check_model_flags(args)
    if args.draft in BY_NAME:
        raise ValueError(f"--draft {args.draft} has no tree to tune; give a head, or drop --draft")
    for name in (*DECIDED, *OTHER_DRAFTS):
        if getattr(args, name) is not None:
            why = "is what tuning finds out" if name in DECIDED else "is no part of a tree"
            raise ValueError(f"--{name} {why}; drop it")
    if args.max_length is not None:
        raise ValueError("--max_length is as long as the texts need; drop it")
    if not 2 <= args.max_nodes <= ROWS:
        raise ValueError(f"--max_nodes {args.max_nodes}; give 2 to {ROWS}")
    if args.checkpoint_path is not None and args.draft_checkpoint_path is None:
        raise ValueError("there is no draft to tune; give --draft_checkpoint_path")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; install it (pip install matplotlib), or drop it")
    settings_of(args)
    if not args.no_compile:
        require_compiler(pick_device(args.device))
    base, head = args.checkpoint_path or demo.BASE, args.draft_checkpoint_path or demo.HEAD
    if not args.prompt_ids:
        require_tokenizer(str(base), args.revision)
    return Files(str(base), str(head), out_file(args, str(head)))


def out_file(args: argparse.Namespace, head: str) -> Path:
    """Where to write; ValueError if that is not known or would replace what is read."""
    if args.out is None and is_hub_id(head):
        raise ValueError(f"{head} is a hub id, whose folder is not ours to write to; give --out")
    out = Path(args.out) if args.out is not None else folder_of(head) / FILE
    for flag in ("prompts", "prompt_ids", "plot"):
        name = getattr(args, flag)
        if name and Path(name).resolve() == out.resolve():
            raise ValueError(f"--{flag} and --out both name {out}; give another --out")
    return out


def settings_of(args: argparse.Namespace) -> Settings:
    """How the flags ask to measure."""
    own = args.prompts is None and args.prompt_ids is None
    return Settings(
        compiled=not args.no_compile,
        max_new_tokens=args.max_new_tokens or (OWN_TOKENS if own else NEW_TOKENS),
        sampling=SamplingParams(temperature=args.temperature, seed=0),
        repeats=args.repeats,
        seconds=args.seconds,
        racers=args.racers,
        rows=args.max_nodes,
    )


def given_prompts(args: argparse.Namespace) -> list[str] | list[list[int]]:
    """Texts or token ids, at most --max_prompts."""
    if args.prompt_ids:
        return read_prompt_ids(args.prompt_ids)[: args.max_prompts]
    if args.prompts:
        return read_prompts(args.prompts, flag="--prompts")[: args.max_prompts]
    if args.checkpoint_path is not None:
        raise ValueError("give --prompts FILE (one a line, or .jsonl): what is fastest depends on "
                         "what is written")  # fmt: skip
    return list(PROMPTS[: args.max_prompts])


def token_ids(
    prompts: list[str] | list[list[int]], tokenizer: Tokenizer | None, args: argparse.Namespace
) -> list[list[int]]:
    """Prompts as token ids."""
    if tokenizer is None or args.prompt_ids:
        return [list(prompt) for prompt in prompts if not isinstance(prompt, str)]
    template = pick_template(args.chat_template, tokenizer)
    texts = [str(prompt) for prompt in prompts]
    if template is None:
        return [tokenizer.encode(text) for text in texts]
    return [tokenizer.encode_chat([{"role": "user", "content": text}], template) for text in texts]


def check_prompts(prompts: list[list[int]], target: Transformer) -> None:
    """ValueError if a prompt does not fit with a tree after it, or holds no token of the model."""
    limit, size = target.config.max_positions, target.config.vocab_size
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + DEPTH + 2 > limit:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; a context of {limit} holds at most "
                f"{limit - DEPTH - 2} and a tree; shorten it"
            )
        outside = [token for token in prompt if not 0 <= token < size]
        if outside:
            raise ValueError(f"prompt {number} holds token {outside[0]}; the vocabulary is {size}")


def load_pair(files: Files, args: argparse.Namespace) -> tuple[Pair, Tokenizer | None]:
    """The target, its draft without a tree, and the tokenizer."""
    tell_notices(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, files.base, revision=args.revision)
    tokenizer = find_tokenizer(files.base, revision=args.revision)
    target = load_target(files.base, dtype=dtype, device=device, revision=args.revision)
    make = draft_maker(files.head, target, dtype=args.dtype, tokenizer=tokenizer, **asked_of(args))
    return pair_of(target, make), tokenizer


def pair_of(target: Transformer, make: Callable[[Tree | None], Drafter]) -> Pair:
    """A target and what gives trees to its draft; make(None) gives the usual one."""
    usual = make(None)
    assert isinstance(usual, TreeDrafter), f"{type(usual).__name__} grows no trees"
    return Pair(target, make, usual.tree, usual.n_guesses, min(usual.deepest, DEPTH))
