"""How long does a round of which tree take here? Verifying by rows, drafting by level and width.

N tree nodes  P longest path, root included  w nodes of a level that the head runs on
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from fasteagle.cache import KVCache, bucket_of
from fasteagle.clock import clock, own_timer, take_turns
from fasteagle.compile import Step
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.parts import separate
from fasteagle.tree import StaticTree, Tree, chain, static_tree
from fasteagle.tuning.shapes import inner_widths

# A compile takes 20 to 60 s on a CPU, where a whole step is one graph.
ROWS_CPU = (1, 2, 4, 6, 8, 12, 16, 26, 64)
ROWS_CUDA = (1, 2, 4, 6, 8, 12, 16, 20, 26, 32, 40, 48, 56, 64)
WIDTHS = (1, 2, 4, 8)
LONG_CHAIN, LEVELS = 4, 3  # of the trees that are timed
PATH = 6  # longest path of the trees whose check is timed: what `keep` moves
HOPELESS = 1.5  # rows are not tried past where they cost this much more than a tree can give
USUAL_ROWS = 4  # of the check that runs ahead of every draft timed
ROOT_GUESSES = 3  # guesses at the root of the trees that are timed, at least

Make = Callable[[Tree], Drafter]
Say = Callable[[str], None]


class Costs(NamedTuple):
    """Milliseconds of the parts of a round."""

    verify: dict[int, float]  # rows: target, choice, accept, keep
    chain: dict[int, float]  # levels below the first: drafting a chain
    base: float  # drafting the first level of a tree
    level: dict[int, float]  # nodes that the head runs on: a further level
    rest: float = 0.0  # of a round beside these: the host's part

    def scaled(self, factor: float) -> Costs:
        """Costs on a device so much slower."""

        def each(points: Mapping[int, float]) -> dict[int, float]:
            return {x: ms * factor for x, ms in points.items()}

        verify, chains, level = each(self.verify), each(self.chain), each(self.level)
        return Costs(verify, chains, self.base * factor, level, self.rest * factor)

    def draft_ms(self, tree: Tree) -> float:
        """Drafting a tree. A dynamic one's levels are taken to cost what a static one's do."""
        if not isinstance(tree, StaticTree):
            return self.base + tree.depth * line(self.level, tree.top_k)
        if tree.is_chain:
            return line(self.chain, tree.n_path - 2)
        return self.base + sum(line(self.level, width) for width in inner_widths(tree))

    def round_ms(self, tree: Tree | None) -> float:
        """A whole round; None is plain decoding."""
        if tree is None:
            return self.verify[1] + self.rest
        return line(self.verify, tree.n_nodes) + self.draft_ms(tree) + self.rest


def line(points: Mapping[int, float], x: int) -> float:
    """The value at x on straight lines through points; never below 0.

    Beyond the last point it goes on as steeply as the points rise from the first to the last: the
    last two alone may be of a step in what a kernel costs.
    """
    known = sorted(points)
    if x in points or len(known) == 1:
        return points.get(x, points[known[0]])
    if x > known[-1]:
        a, b = known[0], known[-1]
    else:
        right = max(bisect_left(known, x), 1)
        a, b = known[right - 1], known[right]
    slope = (points[b] - points[a]) / (b - a)
    return max(0.0, points[b] + slope * (x - b))


def rising(points: Mapping[int, float]) -> dict[int, float]:
    """The points, none below one before it: more work never takes less time but by accident."""
    return dict(
        zip(sorted(points), accumulate((points[x] for x in sorted(points)), max), strict=True)
    )


class Rows(Drafter):
    """So many rows to verify, and nothing to draft."""

    name = "rows"

    def __init__(self, n_nodes: int, feature_layers: tuple[int, ...]) -> None:
        self.n_nodes, self.n_path = n_nodes, min(n_nodes, PATH)
        self.is_chain, self.feature_layers = n_nodes == 1, feature_layers


def broom(width: int, levels: int, *, n_guesses: int) -> StaticTree:
    """A tree that runs the head on `width` nodes of all levels but the last, two guesses each.

    width 2, levels 2:   0 +- 1 +- 4, 5     (the root has three guesses at least)
                           +- 2 `- 6, 7
                           `- 3
    """
    paths = [[rank] for rank in range(min(max(width, ROOT_GUESSES), n_guesses))]
    inner = paths[:width]
    for _ in range(1, levels):
        paths = paths + [[*path, rank] for path in inner for rank in range(min(2, n_guesses))]
        inner = [[*path, 0] for path in inner]
    return static_tree(paths)


def drafts(*, deepest: int, n_guesses: int, widths: Sequence[int]) -> dict[str, Tree]:
    """The trees whose drafting is timed, by what they stand for."""
    levels = min(LEVELS, deepest)
    trees: dict[str, Tree] = {"chain 1": chain(1), "base": broom(1, 1, n_guesses=n_guesses)}
    if deepest > 1:
        trees["chain"] = chain(min(LONG_CHAIN, deepest))
        for width in widths:
            trees[f"width {width}"] = broom(width, levels, n_guesses=n_guesses)
    return trees


class Workshop(NamedTuple):
    """Where costs are measured."""

    target: Transformer
    make: Make
    context: int  # tokens in the caches
    max_length: int
    compiled: bool
    sampled: bool
    say: Say

    def engine(self, drafter: Drafter) -> Engine:
        """An engine with noise of a realistic length in its caches."""
        engine = Engine(self.target, drafter, max_length=self.max_length, compiled=self.compiled)
        for cache in (engine.builder.cache, engine.builder.memory):
            if isinstance(cache, KVCache):
                cache.k.normal_()
                cache.v.normal_()
        engine.state.length.fill_(self.context)
        engine.state.tree.tokens.random_(self.target.config.vocab_size)
        return engine

    def part(self, drafter: Drafter, name: str) -> Step:
        """A part of a round as a step of its own, which has run once."""
        engine = self.engine(drafter)
        n_slots = bucket_of(engine.buckets, self.context + drafter.n_ahead)
        step = separate(engine, n_slots, [name], sampled=self.sampled)[name]
        step()
        return step

    def checks(self, rows: Sequence[int], most: float) -> dict[int, Step]:
        """Steps that verify so many rows, up to where no tree can win: where the `most` tokens a
        round, drafted in no time, take longer than plain decoding takes for as many.
        """
        layers = self.make(chain(1)).feature_layers
        steps: dict[int, Step] = {}
        plain = 0.0
        for n_rows in rows:
            self.say(f"preparing to verify {n_rows} rows")
            step = steps[n_rows] = self.part(Rows(n_rows, layers), "check")
            device = self.target.device
            ms = min(clock(step, device, repeats=5, rounds=3, timer=own_timer(device)))
            plain = plain or ms
            if ms > HOPELESS * most * plain:
                break
        return steps


@torch.inference_mode()
def measure(
    shop: Workshop,
    *,
    rows: Sequence[int],
    most: float,
    deepest: int,
    n_guesses: int,
    seconds: float,
) -> Costs:
    """Time the parts, all in turn for `seconds`. Compiling them comes before and takes longer.

    rows: sizes to verify, 1 first; those that cannot pay are left out. most: tokens a round that a
    tree may yield.
    """
    say = shop.say
    widths = [width for width in WIDTHS if width <= n_guesses]
    trees = drafts(deepest=deepest, n_guesses=n_guesses, widths=widths)
    checks = shop.checks(rows, most)
    steps = {f"rows {n_rows}": step for n_rows, step in checks.items()}
    for name, tree in trees.items():
        say(f"preparing to draft: {name}")
        steps[name] = shop.part(shop.make(tree), "draft")
    say(f"timing {len(steps)} parts in turn")
    device = shop.target.device
    ms = take_turns(steps, device, seconds=seconds, before=neighbours(steps, checks))
    return read_costs(ms, trees, list(checks), widths)


def neighbours(steps: Mapping[str, Step], rows: Mapping[int, Step]) -> dict[str, Step]:
    """What each part follows in a round: a draft a check, a check a draft, a plain step itself. A
    part that runs alone finds all its weights in the caches, which a round does not.
    """
    draft, check = steps["chain 1"], rows[min(rows, key=lambda n: abs(n - USUAL_ROWS))]
    after_check = {name: check for name in steps if not name.startswith("rows ")}
    return after_check | {f"rows {n}": draft for n in rows if n > 1}


def read_costs(
    ms: Mapping[str, float], trees: Mapping[str, Tree], rows: Sequence[int], widths: Sequence[int]
) -> Costs:
    """Costs by what was timed; a level costs what its trees take beyond the base, shared out."""
    chains, level = {0: ms["chain 1"]}, {1: 0.0}
    if "chain" in trees:
        chains[trees["chain"].n_path - 2] = ms["chain"]
        for width in widths:
            levels = trees[f"width {width}"].n_path - 2
            level[width] = max(0.0, (ms[f"width {width}"] - ms["base"]) / levels)
    verify = rising({n: ms[f"rows {n}"] for n in rows})
    return Costs(verify, rising(chains), ms["base"], rising(level))
