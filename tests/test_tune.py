"""Does the tuner find the best tree, and does it count what decoding does?"""

from __future__ import annotations

import itertools
import random
import statistics
from bisect import bisect_left
from typing import Any

import pytest
from conftest import eagle, prompt, tiny_target

from fasteagle.clock import LEAST_VISITS
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.sample import SamplingParams
from fasteagle.tree import DynamicTree, StaticTree, Tree, chain, static_tree
from fasteagle.tune import Racecourse
from fasteagle.tuning import costs
from fasteagle.tuning.acceptance import (
    Record,
    Text,
    accepted_by,
    accepted_in,
    count,
    followed,
    n_rounds,
    record,
    tokens_a_round,
)
from fasteagle.tuning.candidates import (
    Candidate,
    by_rounds,
    different,
    dynamic_candidates,
    later,
    second_look,
    slower_ms,
    static_candidates,
    with_a_chain,
)
from fasteagle.tuning.costs import Costs, Workshop, broom, line, read_costs, rising
from fasteagle.tuning.race import Speed, decode_in_turn, leaders, prepare, racer
from fasteagle.tuning.result import PLAIN, named
from fasteagle.tuning.setting import Settings
from fasteagle.tuning.shapes import (
    Path as Ranks,
)
from fasteagle.tuning.shapes import best_nodes, estimate, expected_tokens, inner_widths, tree_of

TABLE = [[0.6, 0.3, 0.05], [0.7, 0.1, 0.1], [0.5, 0.2, 0.05]]


def closed_sets(table: list[list[float]], n_nodes: int) -> list[frozenset[Ranks]]:
    """Every set of n nodes that holds its parents."""
    found = {frozenset[Ranks]()}
    for _ in range(n_nodes):
        found = {
            nodes | {(*parent, rank)}
            for nodes in found
            for parent in ((), *nodes)
            if len(parent) < len(table)
            for rank in range(len(table[0]))
            if (*parent, rank) not in nodes
        }
    return list(found)


def value(table: list[list[float]], nodes: frozenset[Ranks]) -> float:
    chances = []
    for path in nodes:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= table[depth][rank]
        chances.append(product)
    return 1 + sum(chances)


def widest(nodes: frozenset[Ranks]) -> int:
    """Most nodes of a level that have children; the root is not among them."""
    inner = {path[:-1] for path in nodes if len(path) > 1}
    return max((sum(len(p) == d for p in inner) for d in (1, 2)), default=0)


@pytest.mark.parametrize("width", [1, 2, 9])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_no_tree_of_as_many_rows_is_expected_to_yield_more(width: int, seed: int | None) -> None:
    rng = random.Random(seed)
    table = TABLE
    if seed is not None:
        table = [sorted((rng.random() / 2 for _ in range(3)), reverse=True) for _ in range(3)]
    for n_nodes, depth in itertools.product(range(1, 6), (1, 2, 3)):
        nodes = best_nodes(table, n_nodes, depth=depth, width=width)
        allowed = [s for s in closed_sets(table[:depth], n_nodes) if widest(s) <= width]
        if len(nodes) < n_nodes:  # there are no more of this depth and width
            assert not allowed
            continue
        assert expected_tokens(nodes) == pytest.approx(max(value(table, s) for s in allowed))
        assert max([*inner_widths(tree_of(nodes)), 0]) <= width


def test_the_table_follows_the_counts_and_sparse_cells_what_is_above_them() -> None:
    trials = [[10000, 10000, 10000], [10000, 10000, 10000], [0, 0, 0]]
    hits = [[6000, 3000, 500], [7000, 800, 1200], [0, 0, 0]]
    table = estimate(trials, hits)
    assert table[0] == pytest.approx([0.6, 0.3, 0.05], abs=0.002)
    assert table[1] == pytest.approx([0.7, 0.1, 0.1], abs=0.002)  # 0.08 and 0.12 share a mean
    assert table[2] == pytest.approx(table[1])
    few = estimate([[10, 10]], [[0, 0]])[0]
    assert 0.2 < few[0] < 0.6  # ten misses are not yet a law


def test_a_text_is_followed_to_where_it_leaves_the_tree() -> None:
    #   9 +- 5 +- 7      the text goes on with 5, 7, 1
    #     +- 6 `- 8
    tokens, parents = [9, 5, 6, 7, 8], [0, 0, 0, 1, 1]
    assert followed(tokens, parents, [5, 7, 1]) == [1, 3]
    assert followed(tokens, parents, [6, 7]) == [2]
    assert followed(tokens, parents, [1]) == []
    assert followed(tokens, parents, []) == []


def test_guesses_count_where_their_parent_was_right() -> None:
    tree = static_tree([[0], [1], [0, 0], [1, 0]])
    found = Record(tree, [[(0, 0), (1,), ()]], [[3, 2, 1]])
    trials, hits = count(found)
    assert trials == [[3, 3], [2, 0]]
    assert hits == [[1, 1], [1, 0]]
    # The text ends: a guess past it is neither right nor wrong.
    assert count(Record(tree, [[(0,)]], [[1]]))[0] == [[1, 1], [0, 0]]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, seed=3)])
def test_what_is_counted_along_texts_is_what_decoding_does(sampling: SamplingParams) -> None:
    target, prompts = tiny_target(), [prompt(5), prompt(9, seed=1)]
    limits = {"max_new_tokens": 16, "stop_ids": [], "sampling": sampling}
    texts = [
        Text(p, r.tokens)
        for p, r in zip(prompts, Engine(target).generate(prompts, **limits), strict=True)
    ]
    wide = static_tree([[*p] for n in (1, 2, 3) for p in itertools.product(range(4), repeat=n)])
    found = record(target, eagle(target, wide), wide, texts)
    small: list[Tree] = [chain(3), static_tree([[0], [1], [2], [3], [1, 0], [1, 3], [1, 3, 0]])]
    for tree in [*small, DynamicTree(9, 2, 3)]:
        rounds = [
            r.stats.rounds for r in Engine(target, eagle(target, tree)).generate(prompts, **limits)
        ]
        accepted = accepted_by(target, eagle(target, tree), texts)
        assert [n_rounds(one) for one in accepted] == rounds
        assert tokens_a_round(accepted) == 30 / sum(rounds)
        if isinstance(tree, StaticTree):
            order: list[Ranks] = [()]
            for parent, rank in zip(tree.parents[1:], tree.rank[1:], strict=True):
                order.append((*order[parent], rank))
            needs = accepted_in(found, {path: place for place, path in enumerate(order[1:])})
            inside = [[bisect_left(need, tree.n_nodes) for need in text] for text in needs]
            assert inside == accepted
    assert sum(map(sum, accepted_by(target, eagle(target, wide), texts))) >= 5


def test_times_between_measured_sizes_lie_on_lines() -> None:
    points = {1: 1.0, 4: 4.0, 8: 2.0}
    assert [line(points, x) for x in (1, 2, 6)] == [1.0, 2.0, 3.0]
    assert line({3: 2.0}, 7) == 2.0
    assert line({4: 4.0, 8: 0.0}, 2) == 6.0


def test_beyond_what_was_measured_times_rise_as_they_did_on_the_whole() -> None:
    """A last point below the one before it is no reason to take more rows for free."""
    points = {1: 1.0, 12: 4.6, 16: 4.0}
    assert line(points, 31) == pytest.approx(4.0 + 15 * 3.0 / 15)
    assert rising(points) == {1: 1.0, 12: 4.6, 16: 4.6}


def test_no_tree_is_larger_than_what_was_worth_measuring() -> None:
    short = Racecourse(*[None] * 4, [], Settings(rows=60), *[None] * 2)  # type: ignore[arg-type]
    assert short.rows(DEAR._replace(verify={1: 1.0, 16: 20.0})) == 16
    assert short.rows(DEAR) == 60


def test_drafting_costs_a_base_and_its_levels() -> None:
    trees = {"chain": chain(4), "width 2": broom(2, 3, n_guesses=9)}
    ms = {"rows 1": 5.0, "chain 1": 1.0, "chain": 4.0, "base": 2.0, "width 2": 8.0}
    read = read_costs(ms, trees, [1], [2])
    assert read.level[2] == 3.0
    assert read.draft_ms(chain(3)) == 3.0
    assert read.draft_ms(broom(2, 2, n_guesses=9)) == 2.0 + 3.0
    assert read.draft_ms(DynamicTree(9, 2, 2)) == 2.0 + 2 * 3.0
    assert read._replace(rest=0.5).round_ms(None) == 5.5


def always(path: Ranks, n_roots: int = 40) -> Record:
    """Texts that always go down one path."""
    wide = static_tree([[*p] for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)])
    left = list(range(n_roots, 0, -1))
    return Record(wide, [[path[:n] for n in left]], [left])


# A target that a GPU would run: rows are free. And one whose every row costs a step.
FREE = Costs(dict.fromkeys((1, 64), 10.0), {0: 1.0, 2: 3.0}, 1.0, {1: 1.0, 8: 1.0})
DEAR = Costs({1: 10.0, 64: 640.0}, {0: 1.0, 2: 3.0}, 1.0, {1: 1.0, 8: 8.0})


@pytest.mark.parametrize(
    ("path", "prices", "depth", "rows"),
    [((0, 0, 0), FREE, 3, 6), ((0,), DEAR, 1, 2), ((1, 0, 0), FREE, 3, None)],
)
def test_the_known_best_tree_is_found(
    path: Ranks, prices: Costs, depth: int, rows: int | None
) -> None:
    found = always(path)
    table = [[0.5, 0.3, 0.1]] * 3
    best = static_candidates(table, found, prices, rows=32)[0]
    assert best.depth == depth
    assert rows is None or best.tree.n_nodes == rows
    assert best.tokens == pytest.approx(len(path) + 1, rel=0.1)
    assert best.speed == pytest.approx(1000 * best.tokens / prices.round_ms(best.tree))


def test_racers_differ_and_dynamic_trees_are_sized() -> None:
    found = static_candidates(TABLE, always((0, 1, 0)), FREE, rows=32)
    racers = different(found, 4)
    shapes = [(c.depth, c.tree.n_nodes) for c in racers]
    assert racers[0] is found[0]
    assert len(set(shapes)) == 4
    dynamic = dynamic_candidates(TABLE, found, FREE, rows=32, n_guesses=4)
    assert dynamic
    assert all(c.tree.n_nodes <= 32 and c.tree.width <= 4 for c in dynamic)
    assert dynamic[0].tokens <= max(c.tokens for c in found)


def test_a_chain_always_races() -> None:
    ranked = static_candidates(TABLE, always((0, 1, 0)), FREE, rows=32)
    chains = [candidate for candidate in ranked if candidate.tree.is_chain]
    bushy = [candidate for candidate in ranked if not candidate.tree.is_chain][:3]
    assert with_a_chain(bushy, ranked) == [*bushy, chains[0]]
    assert with_a_chain([*bushy, chains[-1]], ranked) == [*bushy, chains[-1]]
    assert with_a_chain(bushy, bushy) == bushy


def test_a_racer_writes_what_its_engine_does() -> None:
    target = tiny_target()
    one = racer(target, eagle(target), max_length=64, compiled=False, sampled=False)
    found = one.generate([prompt(6)], max_new_tokens=9, stop_ids=[])[0].tokens
    assert found == Engine(target).generate([prompt(6)], max_new_tokens=9, stop_ids=[])[0].tokens


def test_rows_that_cost_more_than_a_tree_can_give_are_not_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow(Workshop):  # whose parts say how long they take
        def part(self, drafter: Drafter, name: str) -> Any:
            return lambda: float(drafter.n_nodes)

    monkeypatch.setattr(costs, "clock", lambda part, *_, **__: [part()])
    target = tiny_target()
    shop = Slow(target, lambda tree: eagle(target, tree), 9, 64, False, False, str)
    assert list(shop.checks([1, 2, 4, 16, 32], most=2.0)) == [1, 2, 4]
    assert list(shop.checks([1, 2, 4, 16, 32], most=30.0)) == [1, 2, 4, 16, 32]


def test_every_tree_of_a_race_has_a_name_of_its_own() -> None:
    one, other = static_tree([[0], [1], [0, 0]]), static_tree([[0], [1], [1, 0]])
    racers = [Candidate(tree, 1.0, 1.0) for tree in (one, other, one, chain(2))]
    assert [(name, c.tree) for name, c in named(racers).items()] == [
        ("tree 2-1", one),
        ("tree 2-1'", other),
        ("chain-2", chain(2)),
    ]


def test_whole_rounds_are_put_at_the_pace_of_the_parts_and_teach_what_rounds_lack() -> None:
    prices = FREE._replace(rest=2.0)  # plain: 10 ms and 2 of the host, chain-1: 10 + 1 + 2
    raced = {name: Candidate(chain(1), 2.0, 13.0) for name in ("one", "other", "third")}
    plain = [24.0, 12.0, 240.0]  # a machine half as fast, as before, and busy with something else
    times = {"one": [28.0, 14.0, 200.0], "other": [34.0, 17.0, 340.0], "third": [1.0, 15.0, 300.0]}
    whole = by_rounds(raced, prices, times, plain=plain)
    assert [c.ms for c in whole.values()] == [14, 17, 15]
    assert slower_ms(raced, whole) == 2
    found = later([Candidate(chain(1), 2.0, 0.0), Candidate(chain(1), 3.0, 0.0)], prices, 2.0)
    assert [(c.tokens, c.ms) for c in found] == [(3, 15), (2, 15)]


def test_a_tree_that_whole_rounds_favour_joins_if_it_is_clearly_faster() -> None:
    racers = {"chain-1": Candidate(chain(1), 2.0, 10.0)}
    for tree, ms, joins in ((chain(2), 9.0, True), (chain(2), 9.9, False), (chain(1), 9.0, False)):
        first = Candidate(tree, 2.0, ms)
        assert second_look([first, *racers.values()], racers) == (first if joins else None)


def test_whole_rounds_are_timed_while_engines_decode() -> None:
    target = tiny_target()
    engines = {
        "plain": racer(target, None, max_length=64, compiled=False, sampled=False),
        "tree": racer(target, eagle(target), max_length=64, compiled=False, sampled=False),
    }
    limits = {"max_new_tokens": 9, "stop_ids": []}
    prepare(engines, prompt(6), limits, say=str)
    times = decode_in_turn(engines, prompt(6), limits, seconds=0.1)
    assert len(times["plain"]) == len(times["tree"]) >= LEAST_VISITS
    assert 0 < min(times["plain"]) < statistics.median(times["tree"])
    for engine in engines.values():  # and they decode on as if nothing had been
        found = engine.generate([prompt(5)], **limits)[0].tokens
        assert found == Engine(target).generate([prompt(5)], **limits)[0].tokens


def test_who_is_close_races_once_more() -> None:
    """Repeats are compared with plain decoding's in the same repeat, not by their medians."""
    speeds = {
        PLAIN: Speed([10.0, 5.0, 10.0], [1.0] * 3, 1.0),
        "steady": Speed([12.0, 6.0, 12.0], [1.0] * 3, 2.0),
        "close": Speed([11.0, 5.5, 11.5], [1.0] * 3, 2.0),
        "slow": Speed([8.0, 9.0, 8.0], [1.0] * 3, 2.0),
    }
    assert leaders(speeds, ["slow", "close", "steady"], PLAIN) == ["steady", "close"]
    more = speeds["close"].and_then(Speed([20.0] * 6, [2.0] * 6, 2.0))
    assert (len(more.tokens_per_s), more.median, more.ms) == (9, 20.0, 2.0)
    assert more.over(speeds[PLAIN]) == pytest.approx(1.1)
    assert more.beside(speeds[PLAIN]) == pytest.approx(11.0)
