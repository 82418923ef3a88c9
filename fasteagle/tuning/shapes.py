"""Which static tree of N rows yields most tokens? Shapes from acceptance by depth and rank.

A node is its path of ranks: (0, 1) is the second guess after the first guess after the root. The
table says how often a guess is right where its parent was: `table[depth][rank]`, depth 0 for the
guesses at the root. A path is right as often as the product along it, and a tree's expected tokens
a round are 1, the target's own, plus the sum over its nodes (Sequoia, arXiv 2402.12374, 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fasteagle.tree import StaticTree, static_tree

Path = tuple[int, ...]
Table = list[list[float]]
# What is believed before anything is counted: the first guess, then the others by rank.
FIRST, OTHERS = 0.6, 0.1
SHRINK = 12.0  # counts that a belief is worth


class Node(NamedTuple):
    """A place in a tree, and how often it is right."""

    chance: float
    path: Path


def belief(n_ranks: int) -> list[float]:
    """Chances by rank of a head that nothing is known of; less than 1 together."""
    return [FIRST, *(OTHERS / rank for rank in range(1, n_ranks))]


def estimate(trials: Sequence[Sequence[int]], hits: Sequence[Sequence[int]]) -> Table:
    """The table from counts `[depth][rank]`: how often a guess was offered, and was right.

    A cell is drawn towards the same rank one depth above by SHRINK counts, so that a depth that was
    rarely reached resembles the one above it. Then a later rank is never better than an earlier
    one: neighbours that are take their common mean, as in isotonic regression.
    """
    above, table = belief(len(trials[0])), []
    for offered, right in zip(trials, hits, strict=True):
        cells = [
            (h + SHRINK * believed) / (n + SHRINK)
            for n, h, believed in zip(offered, right, above, strict=True)
        ]
        above = _falling(cells, [n + SHRINK for n in offered])
        table.append(above)
    return table


def _falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest list that never rises, by pooling adjacent violators."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, mass, length = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return [mean for mean, _, length in blocks for _ in range(length)]


def best_nodes(table: Table, n_nodes: int, *, depth: int, width: int) -> list[Node]:
    """The likeliest nodes, likeliest first: n of them and the root are the best tree of n + 1 rows.

    At most `depth` levels, and `width` nodes of a level that have children: those the head runs on.

    Why it is optimal: a path is never likelier than its parent's, so the n likeliest nodes hold
    their parents (of equals the shorter comes first) and no other n nodes have a larger sum. With
    a width, the nodes to keep are the likeliest of each level: nodes of a level have the same table
    below them, so to have children below a likelier node in place of a less likely one never
    makes the sum smaller, and they are children of those kept above by the same argument.
    """
    nodes: list[Node] = []
    inner = [Node(1.0, ())]
    for row in table[:depth]:
        children = [
            Node(parent.chance * chance, (*parent.path, rank))
            for parent in inner
            for rank, chance in enumerate(row[:n_nodes])
        ]
        children.sort(key=lambda node: (-node.chance, node.path))
        nodes += children[: max(n_nodes, width)]
        inner = children[:width]
    nodes.sort(key=lambda node: (-node.chance, len(node.path), node.path))
    return nodes[:n_nodes]


def expected_tokens(nodes: Sequence[Node]) -> float:
    """Tokens a round of the tree of these nodes and the root."""
    return 1 + sum(node.chance for node in nodes)


def tree_of(nodes: Sequence[Node]) -> StaticTree:
    """The tree of these nodes and the root."""
    return static_tree([list(node.path) for node in nodes])


def inner_widths(tree: StaticTree) -> list[int]:
    """How many nodes of each level below the root's have children; the head runs on them."""
    return [len(tree.internal(depth)) for depth in range(1, tree.n_path - 1)]


def paths_of(tree: StaticTree) -> list[list[int]]:
    """The tree's nodes as paths of ranks, in its order: what --tree and tree.json hold."""
    paths: list[list[int]] = [[]]
    for parent, rank in zip(tree.parents[1:], tree.rank[1:], strict=True):
        paths.append([*paths[parent], rank])
    return paths[1:]
