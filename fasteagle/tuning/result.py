"""What did tuning find, and what are trees called in it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fasteagle.tree import StaticTree, Tree
from fasteagle.tuning.candidates import Candidate
from fasteagle.tuning.costs import Costs
from fasteagle.tuning.race import Speed
from fasteagle.tuning.shapes import Table

PLAIN = "plain"


class Tuning(NamedTuple):
    """What was found. Predictions are at the pace of the race."""

    table: Table
    costs: Costs
    candidates: list[Candidate]  # static, fastest first as predicted in the end
    name: str  # of the fastest tree that raced
    speeds: dict[str, Speed]  # of the race, by name of the tree
    raced: dict[str, Candidate]  # predicted by their whole rounds, timed before the race
    by_parts: dict[str, Candidate]  # the same, predicted by the parts of a round
    pace: float  # how much slower plain decoding was in the race than when parts were timed
    slower: float  # ms that a tree's round took longer than its parts, the median over trees
    same: bool  # all engines wrote the same tokens
    max_length: int  # tokens that the engines had room for

    @property
    def best(self) -> Candidate:
        """The fastest tree that raced."""
        return self.raced[self.name]

    @property
    def plain(self) -> float:
        """Tokens a second of plain decoding."""
        return self.speeds[PLAIN].median

    def measured(self, name: str) -> float:
        """Tokens a second of an engine of the race: plain decoding's times the ratio to it."""
        return self.speeds[name].beside(self.speeds[PLAIN])

    @property
    def gain(self) -> float:
        """How much faster the best tree was than plain decoding, by the repeats' ratios."""
        return self.speeds[self.name].over(self.speeds[PLAIN])

    @property
    def plain_is_faster(self) -> bool:
        """Whether no tree was worth its rounds."""
        return self.gain <= 1


def label(tree: Tree) -> str:
    """A name for a tree: what --tree calls it, or its nodes by level."""
    if not isinstance(tree, StaticTree) or not tree.name.startswith("of "):
        return tree.name
    widths = "-".join(str(tree.depth.count(level)) for level in range(1, tree.n_path))
    return f"tree {widths}"


def named(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Candidates by a name of their own; a tree that is there twice is named once."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        if all(candidate.tree != other.tree for other in found.values()):
            name = label(candidate.tree)
            found[name + "'" * sum(other.startswith(name) for other in found)] = candidate
    return found
