"""Which trees are worth a race? All sizes and depths, by predicted tokens a second."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fasteagle.tree import DynamicTree, StaticTree, Tree
from fasteagle.tuning.acceptance import Record, accepted_in, tokens_a_round
from fasteagle.tuning.costs import Costs
from fasteagle.tuning.shapes import Table, best_nodes, expected_tokens, tree_of

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 64)  # most nodes of a level that the head runs on
# Levels, top_k: dynamic trees are sized by these and by every number of rows.
DYNAMIC_TOP_K = (2, 3, 4, 6, 8, 10)
DYNAMIC_ROWS = (4, 6, 8, 12, 16, 20, 26, 32, 40, 48, 60, 64)
CLEARLY = 1.02  # a tree that looks so much faster once whole rounds are timed joins the race
APART = 0.2  # trees whose rows differ less are raced once


class Candidate(NamedTuple):
    """A tree, what its rounds are predicted to yield and to take."""

    tree: Tree
    tokens: float  # a round
    ms: float  # a round
    expected: float | None = None  # tokens a round by the table alone

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return 1000 * self.tokens / self.ms

    @property
    def depth(self) -> int:
        """Tokens on the longest path below the root."""
        return self.tree.n_path - 1

    def at(self, costs: Costs) -> Candidate:
        """The same with a round's time by other costs."""
        return self._replace(ms=costs.round_ms(self.tree))


def static_candidates(table: Table, found: Record, costs: Costs, *, rows: int) -> list[Candidate]:
    """The best static tree of every size, depth and width, chains among them; fastest first.

    Shapes are by the table (`best_nodes`). What such a tree yields is counted along the texts: the
    table takes a guess to be right as often below an unlikely parent as below a likely one.
    """
    seen: dict[StaticTree, Candidate] = {}
    for depth in range(1, len(table) + 1):
        for width in WIDTHS:
            nodes = best_nodes(table, rows - 1, depth=depth, width=width)
            places = {node.path: place for place, node in enumerate(nodes)}
            needs = accepted_in(found, places)
            for n_nodes in range(1, len(nodes) + 1):
                tree = tree_of(nodes[:n_nodes])
                if tree in seen:
                    continue
                accepted = [[bisect_left(need, n_nodes) for need in text] for text in needs]
                seen[tree] = Candidate(
                    tree,
                    tokens_a_round(accepted),
                    costs.round_ms(tree),
                    expected_tokens(nodes[:n_nodes]),
                )
    return sorted(seen.values(), key=lambda c: (-c.speed, c.tree.n_nodes))


def dynamic_candidates(
    table: Table, statics: Sequence[Candidate], costs: Costs, *, rows: int, n_guesses: int
) -> list[Candidate]:
    """Dynamic trees of a grid of sizes, fastest first, as if they yielded what a static tree of as
    many rows and no more levels does. That is no more than a guess: those that may win are counted.
    """
    best: dict[tuple[int, int], float] = {}
    for candidate in statics:
        key = (candidate.tree.n_nodes, candidate.depth)
        best[key] = max(best.get(key, 0.0), candidate.tokens)
    found = []
    for tree in dynamic_trees(len(table), rows=rows, n_guesses=n_guesses):
        yields = [
            tokens
            for (n_nodes, depth), tokens in best.items()
            if n_nodes <= tree.n_nodes and depth <= tree.n_path - 1
        ]
        found.append(Candidate(tree, max(yields, default=1.0), costs.round_ms(tree)))
    return sorted(found, key=lambda c: (-c.speed, c.tree.n_nodes))


def dynamic_trees(deepest: int, *, rows: int, n_guesses: int) -> Iterator[DynamicTree]:
    """The grid: total_tokens, depth, top_k."""
    for depth in range(1, deepest):
        for top_k in DYNAMIC_TOP_K:
            most = min(rows, 1 + top_k + depth * top_k * top_k)
            if top_k <= n_guesses:
                for total in DYNAMIC_ROWS:
                    if depth + 2 <= total <= most:
                        yield DynamicTree(total, depth, top_k)


def counted(
    candidates: Sequence[Candidate], count: Callable[[Tree], float], *, most: int, beat: float
) -> list[Candidate]:
    """Up to `most` dynamic trees that may be faster than `beat`, with what they really yield."""
    found: list[Candidate] = []
    for candidate in candidates:
        new = all(is_apart(candidate, other) for other in found)
        if new and len(found) < most and candidate.speed > beat:
            found.append(candidate._replace(tokens=count(candidate.tree)))
    return sorted(found, key=lambda candidate: -candidate.speed)


def is_apart(one: Candidate, other: Candidate) -> bool:
    """Whether a race of the two would tell more than a race of one."""
    rows = one.tree.n_nodes, other.tree.n_nodes
    return one.depth != other.depth or max(rows) - min(rows) >= max(1, APART * max(rows))


def different(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """The first `most` of them, no two of one depth and nearly one size."""
    found: list[Candidate] = []
    for candidate in candidates:
        if len(found) < most and all(is_apart(candidate, other) for other in found):
            found.append(candidate)
    return found


def with_a_chain(racers: Sequence[Candidate], ranked: Sequence[Candidate]) -> list[Candidate]:
    """The racers and, if none of them is one, the chain that ranks first.

    Chains need no compaction and their levels are all one row, so costs err for them otherwise
    than for trees: a race tells.
    """
    chains = [candidate for candidate in ranked if candidate.tree.is_chain]
    if not chains or any(racer.tree.is_chain for racer in racers):
        return list(racers)
    return [*racers, chains[0]]


def by_rounds(
    raced: Mapping[str, Candidate],
    costs: Costs,
    rounds: Mapping[str, Sequence[float]],
    *,
    plain: Sequence[float],
) -> dict[str, Candidate]:
    """Candidates with the time of whole rounds, the host's part included: ms by name and turn, and
    of plain decoding by turn. The costs were timed in other minutes, so that only how much longer
    than plain decoding a round takes counts, the median over turns, and plain is theirs.
    """
    found = {}
    for name, candidate in raced.items():
        longer = [mine / theirs for mine, theirs in zip(rounds[name], plain, strict=True)]
        found[name] = candidate._replace(ms=costs.round_ms(None) * statistics.median(longer))
    return found


def slower_ms(by_parts: Mapping[str, Candidate], whole: Mapping[str, Candidate]) -> float:
    """What a tree's round takes longer than its parts, the median over trees."""
    return statistics.median(whole[name].ms - c.ms for name, c in by_parts.items())


def later(candidates: Sequence[Candidate], costs: Costs, slower: float) -> list[Candidate]:
    """Candidates, fastest first, by costs and what rounds take longer."""
    late = costs._replace(rest=costs.rest + slower)
    return sorted((c.at(late) for c in candidates), key=lambda c: (-c.speed, c.tree.n_nodes))


def second_look(statics: Sequence[Candidate], racers: Mapping[str, Candidate]) -> Candidate | None:
    """The first of all trees if it is no racer and looks clearly faster than all of them."""
    first, best = statics[0], max(c.speed for c in racers.values())
    new = all(first.tree != other.tree for other in racers.values())
    return first if new and first.speed > CLEARLY * best else None
