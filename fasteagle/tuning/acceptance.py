"""How often is which guess right? Trees drafted along known texts.

    B batch (1)  S tokens  F feature dim  N tree nodes

The target's text does not depend on the draft, so it is written once, plainly. Then a tree is
drafted at every token of it and compared with what the text goes on with. This counts what decoding
would count, at every place where a round can begin and not only where one tree's rounds do; from it
follows how many rounds *any* tree that lies within the drafted one takes for this text, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.draft.base import Accepted, Drafter, Room
from fasteagle.model import Transformer, run_block
from fasteagle.tree import StaticTree, causal_mask
from fasteagle.tuning.shapes import (
    Path,
    Table,
    belief,
    best_nodes,
    estimate,
    paths_of,
    tree_of,
)

READ = 512  # tokens of a text in one target pass
WIDE_NODES, WIDE_RANKS = 96, 16  # the tree that is drafted to count


class Text(NamedTuple):
    """What the target wrote after a prompt."""

    prompt: Sequence[int]
    new: Sequence[int]


class Record(NamedTuple):
    """Where the texts went in a wide tree: for each of them, the path from every root."""

    tree: StaticTree
    paths: list[list[Path]]  # a text's token i is the root, its path what tokens i + 1, ... are
    n_left: list[list[int]]  # how many tokens of the text come after each root


def wide_tree(*, depth: int, n_guesses: int) -> StaticTree:
    """A tree that holds what a tuned one may want, if the head is not unlike others."""
    table = [belief(min(n_guesses, WIDE_RANKS))] * depth
    return tree_of(best_nodes(table, WIDE_NODES - 1, depth=depth, width=WIDE_NODES))


def places_of(tree: StaticTree) -> list[Path]:
    """The path to every node, the root's first."""
    return [(), *map(tuple, paths_of(tree))]


@torch.inference_mode()
def features_of(target: Transformer, tokens: Sequence[int], layers: tuple[int, ...]) -> Tensor:
    """What the target tells a drafter of each token: `[1, S, F]`."""
    cache, found = target.new_cache(1, len(tokens)), []
    for start in range(0, len(tokens), READ):
        piece = torch.tensor([list(tokens[start : start + READ])], device=target.device)
        slots = torch.arange(start, start + piece.shape[1], device=target.device)[None]
        mask = causal_mask(slots, len(tokens))
        found.append(target(piece, slots, slots, mask, cache, feature_layers=layers)[1])
    return torch.cat(found, 1)


@torch.inference_mode()
def drafted(
    target: Transformer, drafter: Drafter, text: Text
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and parents of the tree on every new token but the last."""
    tokens = [*text.prompt, *text.new]
    features = features_of(target, tokens, drafter.feature_layers)
    n_slots = len(tokens) + drafter.n_ahead + 1
    room = Room(drafter.new_memory(1, n_slots), n_slots, run_block)
    ids = torch.tensor([tokens], device=target.device)
    start = 0
    for root in range(len(text.prompt), len(tokens) - 1):
        with torch.inference_mode():  # left at every yield
            news = Accepted(
                features[:, start:root],
                ids[:, start:root],
                ids[:, start + 1 : root + 1],
                torch.tensor([start], device=target.device),
                torch.tensor([root - start], device=target.device),
            )
            state = drafter.extend(news, room)
            length = torch.tensor([root], device=target.device)
            tree = drafter.propose(state, ids[:, root : root + 1], length, room)
            parts = tree.tokens[0].tolist(), tree.parents[0].tolist()
        yield parts
        start = root


def followed(tokens: Sequence[int], parents: Sequence[int], ahead: Sequence[int]) -> list[int]:
    """The nodes of a tree that a text takes which goes on with `ahead`, the root left out."""
    node, nodes = 0, []
    for token in ahead:
        for child in range(node + 1, len(tokens)):
            if parents[child] == node and tokens[child] == token:
                node = child
                nodes.append(child)
                break
        else:
            break
    return nodes


def record(
    target: Transformer, drafter: Drafter, tree: StaticTree, texts: Sequence[Text]
) -> Record:
    """Where texts go in the static tree that a drafter has."""
    taken = places_of(tree)
    paths, n_left = [], []
    for text in texts:
        found: list[Path] = []
        for place, parts in enumerate(drafted(target, drafter, text), 1):
            nodes = followed(*parts, text.new[place : place + tree.n_path])
            found.append(taken[nodes[-1]] if nodes else ())
        paths.append(found)
        n_left.append([len(text.new) - place for place in range(1, len(found) + 1)])
    return Record(tree, paths, n_left)


def accepted_by(target: Transformer, drafter: Drafter, texts: Sequence[Text]) -> list[list[int]]:
    """How many guesses a round at every root of the texts accepts; for trees of any kind."""
    return [
        [
            len(followed(*parts, text.new[place : place + drafter.n_path]))
            for place, parts in enumerate(drafted(target, drafter, text), 1)
        ]
        for text in texts
    ]


def count(found: Record) -> tuple[list[list[int]], list[list[int]]]:
    """How often a guess was offered and how often it was right, `[depth][rank]`.

    A guess counts where its parent was right, had it, and the text went on.
    """
    tree = found.tree
    depth, ranks = tree.n_path - 1, tree.width
    children: dict[Path, list[int]] = {}
    for path in places_of(tree)[1:]:
        children.setdefault(path[:-1], []).append(path[-1])
    trials, hits = ([[0] * ranks for _ in range(depth)] for _ in range(2))
    for paths, n_left in zip(found.paths, found.n_left, strict=True):
        for path, left in zip(paths, n_left, strict=True):
            for level in range(min(len(path) + 1, depth, left)):
                for rank in children.get(path[:level], ()):
                    trials[level][rank] += 1
                if level < len(path):
                    hits[level][path[level]] += 1
    return trials, hits


def table_of(found: Record) -> Table:
    """Acceptance by depth and rank, sparse cells drawn to what is known around them."""
    return estimate(*count(found))


def n_rounds(accepted: Sequence[int]) -> int:
    """Rounds that a text takes whose every root accepts so many: each emits one token more."""
    place, rounds = 0, 0
    while place < len(accepted):
        place += accepted[place] + 1
        rounds += 1
    return rounds


def tokens_a_round(accepted: Sequence[Sequence[int]]) -> float:
    """Tokens after the first, a round, over all texts; the last round of a text may be cut."""
    rounds = sum(map(n_rounds, accepted))
    return sum(map(len, accepted)) / rounds if rounds else 1.0


def most_tokens(found: Record) -> float:
    """Tokens a round of the whole wide tree."""
    return tokens_a_round([[len(path) for path in text] for text in found.paths])


def accepted_in(found: Record, places: dict[Path, int]) -> list[list[list[int]]]:
    """For every root, the place of the last node needed to accept 1, 2, ... of its path.

    places: where nodes come in an order in which parents come first. A tree of the first n nodes
    accepts as many as there are numbers below n.
    """
    found_all = []
    for paths in found.paths:
        rows = []
        for path in paths:
            needs: list[int] = []
            for level in range(1, len(path) + 1):
                place = places.get(path[:level])
                if place is None:
                    break
                needs.append(max(place, needs[-1] if needs else 0))
            rows.append(needs)
        found_all.append(rows)
    return found_all
