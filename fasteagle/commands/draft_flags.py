"""Which flags choose a draft, and which of them go together?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fasteagle.checkpoint import open_kind
from fasteagle.commands.numbers import natural, positive
from fasteagle.draft import lookahead
from fasteagle.draft.choice import ALL_TOKENS, BY_NAME, NAMES, Asked, check_choice
from fasteagle.draft.lookup import LOOKUP, NGRAM
from fasteagle.draft.standalone import LENGTH
from fasteagle.draft.vocabulary import read_vocabulary
from fasteagle.tree import DynamicTree, parse_tree


def add_draft(group: argparse._ArgumentGroup, tree_top_k: Sequence[str]) -> None:
    """The flags that name a draft and its sizes; tree_top_k: names of that flag."""
    group.add_argument(
        "--draft_checkpoint_path",
        metavar="PATH",
        help="folder, weight file or hub id of its EAGLE or Medusa heads, or of a smaller model of "
        "its vocabulary; without one a model of yours is decoded plainly",
    )
    group.add_argument(
        "--draft",
        choices=NAMES,
        help="none: decode plainly, one token a round; lookup: guess what followed the newest "
        "tokens before; lookahead: guess what the model itself would write further on; eagle: "
        "insist on a head",
    )
    group.add_argument(
        "--draft_vocab",
        metavar="FILE",
        help="guess only the tokens that this file of `fasteagle draft-vocab` lists; none: guess "
        "all; default: draft_vocab.json beside the head, else all",
    )
    group.add_argument(
        "--speculate_k",
        type=positive,
        metavar="N",
        help=f"tokens that a draft model guesses in a row (default: {LENGTH})",
    )
    _add_tree(group, tree_top_k)
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


def _add_tree(group: argparse._ArgumentGroup, tree_top_k: Sequence[str]) -> None:
    group.add_argument(
        "--tree",
        help="draft tree: mc_sim_7b_63, chain-N, dynamic (EAGLE-2), a JSON list of paths or a file "
        "that holds one; default: tree.json beside the draft, else mc_sim_7b_63 for an EAGLE head, "
        "Medusa's own, a chain for a model",
    )
    whole = DynamicTree()
    nodes = "nodes that are verified, the root included"
    levels = "levels that are drafted below the first"
    width = "nodes that a level expands, and children of each"
    for names, number, metavar, text, default in (
        (["--total_tokens"], positive, "N", nodes, whole.total_tokens),
        (["--depth"], natural, "D", levels, whole.depth),
        (tree_top_k, positive, "K", width, whole.top_k),
    ):
        group.add_argument(
            *names,
            type=number,
            metavar=metavar,
            help=f"--tree dynamic: {text} (default: {default})",
        )


def asked_of(args: argparse.Namespace) -> Asked:
    """What the flags ask of a draft; each keyword of Asked has a flag of its name. ValueError for
    sizes that shape no dynamic tree.
    """
    named = {name: getattr(args, name) for name in Asked.__annotations__}
    return Asked(**named | {"tree": tree_of(args)})  # type: ignore[typeddict-item]


def check_model_flags(args: argparse.Namespace) -> None:
    """ValueError for model flags that contradict each other, or a tree or file that is none."""
    asked = asked_of(args)
    paths = {"path": args.draft_checkpoint_path, "base": args.checkpoint_path}
    given = {name: path is not None for name, path in paths.items()}
    check_choice(args.draft, asked, **given)
    if args.draft == "eagle" and args.draft_checkpoint_path is not None:
        open_kind(args.draft_checkpoint_path, "eagle", revision=None)
    if asked["tree"] is not None:
        parse_tree(asked["tree"])
    if args.draft_vocab not in (None, ALL_TOKENS):
        read_vocabulary(args.draft_vocab)


def tree_of(args: argparse.Namespace) -> str | None:
    """The tree that the flags ask for, in words that `parse_tree` may read."""
    sizes = (args.total_tokens, args.depth, args.tree_top_k)
    shaped = any(size is not None for size in sizes)
    if shaped and args.draft in BY_NAME:
        raise ValueError(
            f"--draft {args.draft} has no tree; drop --total_tokens, --depth and --tree_top_k"
        )
    tree: str | None = args.tree
    if tree == "dynamic":
        whole = DynamicTree()
        defaults = (whole.total_tokens, whole.depth, whole.top_k)
        chosen = (d if size is None else size for size, d in zip(sizes, defaults, strict=True))
        return DynamicTree(*chosen).name
    if shaped:
        raise ValueError(
            "--total_tokens, --depth and --tree_top_k shape the dynamic tree; add --tree dynamic"
        )
    return tree
