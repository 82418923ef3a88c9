"""Is every step one graph, built once, and equal to the eager step?

Tracing is what most of these laws are about, so the backend generates no code; in one test it is
Inductor.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import (
    DRAFTS,
    SAMPLED,
    eagle,
    plain_decode,
    prompt,
    short_engine,
    tiny_target,
    tokens_of,
)
from torch._dynamo.utils import counters

from fasteagle import cache, tree_attention
from fasteagle import compile as policy
from fasteagle.cache import buckets
from fasteagle.compile import CapturedStep, NotCaptured, Step, fresh, given_back
from fasteagle.engine import Engine
from fasteagle.parts import separate
from fasteagle.sample import SamplingParams
from fasteagle.tree import chain


def trace_only(patch: pytest.MonkeyPatch) -> None:
    """Trace as ever, run the graphs eagerly; buckets of 32, 64, ... slots instead of 512, ..."""
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    patch.setattr(policy, "artifact_of", lambda graph, _: graph)
    patch.setattr(cache, "FIRST_BUCKET", 32)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)


class StandIn(CapturedStep):
    """What a captured step does, warm-up runs and restored state included, without CUDA."""

    def _prepare(self) -> Step:
        self._warm_up([tensor.clone() for tensor in self.state])
        return self._graph_or_parts()


@pytest.fixture
def regional(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for CUDA: parts are compiled, and the step around them is captured."""
    init = policy.Compiler.__init__

    def capturing(self: policy.Compiler, *, enabled: bool, device: torch.device) -> None:
        init(self, enabled=enabled, device=device)
        self.captures, self.traces = enabled, False

    monkeypatch.setattr(policy.Compiler, "__init__", capturing)
    monkeypatch.setattr(policy, "CapturedStep", StandIn)
    monkeypatch.setattr(policy, "captured", lambda call: SimpleNamespace(replay=call))


def n_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@contextmanager
def nothing_is_compiled() -> Iterator[None]:
    before = n_graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert n_graphs() == before
    assert not counters["graph_break"]


def serve(engines: list[Engine], n_requests: int, *, hot: bool = True) -> None:
    """The same requests of all lengths, limits, seeds and sampling through each; same results."""
    rng = random.Random(0)
    for index in range(n_requests):
        tokens = prompt(rng.randint(1, 40), index)
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 1.7]) if hot else 0.0,
            top_k=rng.choice([0, 1, 3, 50]),
            top_p=rng.choice([0.3, 0.9, 1.0]),
            seed=rng.randint(0, 99),
        )
        limits = {"max_new_tokens": rng.randint(1, 12), "stop_ids": [rng.randrange(20)]}
        results = [e.generate([tokens], sampling=sampling, **limits)[0] for e in engines]
        assert len({tuple(result.tokens) for result in results}) == 1
        assert len({tuple(result.stats.accepted) for result in results}) == 1
        assert len({result.reason for result in results}) == 1


class Warm(NamedTuple):
    engine: Engine
    eager: Engine
    n_greedy: int  # graphs that a greedy warm-up made
    n_all: int


@pytest.fixture(scope="module", params=["none", "eagle"])
def warm(request: pytest.FixtureRequest) -> Warm:
    """A compiled engine with all of its steps built."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
        trace_only(patch)
        engine, before = short_engine(request.param, compiled=True), n_graphs()
        engine.warm_up()
        n_greedy = n_graphs() - before
        engine.warm_up(sampled=True)
        n_all = n_graphs() - before
    return Warm(engine, short_engine(request.param, compiled=False), n_greedy, n_all)


def test_every_step_is_one_graph(warm: Warm) -> None:
    n_buckets = len(warm.engine.buckets)
    assert n_buckets == 2
    assert warm.n_greedy == 3 * n_buckets  # extend, prefill, round
    assert warm.n_all == 5 * n_buckets == len(warm.engine.steps)  # extend chooses nothing
    assert not counters["graph_break"]


def test_fifty_requests_after_warm_up_compile_nothing(warm: Warm) -> None:
    built = set(warm.engine.steps)
    with nothing_is_compiled():
        serve([warm.engine, warm.eager], 50)
    assert set(warm.engine.steps) == built


def test_warming_up_again_builds_nothing_and_leaves_nothing_behind(warm: Warm) -> None:
    engine, tokens = warm.engine, prompt(20)
    expected = plain_decode(engine.target, tokens, 16)
    with nothing_is_compiled():
        for _ in range(2):
            assert engine.generate([tokens], max_new_tokens=16, stop_ids=[])[0].tokens == expected
            engine.warm_up()


def test_warming_up_for_short_texts_builds_their_buckets_only(traced: None) -> None:
    before = dict(policy.STEP_OPTIONS)
    engine = short_engine("none", compiled=True)
    engine.warm_up(longest=20)
    assert {n_slots for _, n_slots, _ in engine.steps} == {32}
    assert before == policy.STEP_OPTIONS, "torch.compile took entries out"


def test_a_second_engine_is_no_recompile_of_the_first(traced: None) -> None:
    # Both must keep their own graphs: unguarded ones would be taken for each other.
    engines = [short_engine("eagle", compiled=True), short_engine("none", compiled=True, seed=4)]
    before = n_graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for engine in [*engines, *engines]:
            tokens = prompt(12)
            result = engine.generate([tokens], max_new_tokens=8, stop_ids=[])[0]
            assert result.tokens == plain_decode(engine.target, tokens, 8)
    assert n_graphs() - before == sum(len(engine.steps) for engine in engines)


def tried(kind: str, *, only_round: bool) -> Engine:
    """A compiled engine of any kind with its greedy steps for one bucket built, and tried.

    only_round: a prompt is read by eager steps, which trace nothing.
    """
    engine, eager = short_engine(kind, compiled=True), short_engine(kind, compiled=False)
    engine.buckets = engine.buckets[-1:]
    if only_round:
        policy_off = policy.Compiler(enabled=False, device=engine.target.device)
        for step in ("extend", "prefill"):
            key = (step, engine.buckets[0], False)
            engine.steps[key] = engine.builder.build(*key, policy_off)
    with torch._dynamo.config.patch(error_on_recompile=True):
        engine.warm_up()
    with nothing_is_compiled():
        serve([engine, eager], 8, hot=False)
    return engine


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_round_of_any_drafter_is_one_graph(kind: str, traced: None) -> None:
    before = n_graphs()
    engine = tried(kind, only_round=True)
    assert n_graphs() - before == 1
    assert len(engine.steps) == 3


@pytest.mark.parametrize("kind", ["none", "eagle", "experts"])
def test_compiled_parts_give_the_text_of_the_eager_step(kind: str, regional: None) -> None:
    engine = tried(kind, only_round=False)
    assert all(isinstance(step, StandIn) for step in engine.steps.values())


def test_a_step_that_cannot_be_captured_runs_as_its_parts(
    regional: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("failed due to a previous error during capture")

    monkeypatch.setattr(policy, "captured", fails)
    engine = short_engine("eagle", compiled=True)
    with pytest.warns(NotCaptured, match=r"round_32_greedy .* \(operation not .* capturing\); its"):
        [result] = engine.generate([prompt(7)], max_new_tokens=9, stop_ids=[])
    assert result.tokens == plain_decode(engine.target, prompt(7), 9)
    with warnings.catch_warnings(), nothing_is_compiled():
        warnings.simplefilter("error")  # said once for each step
        engine.generate([prompt(8)], max_new_tokens=9, stop_ids=[])


@pytest.mark.parametrize("part", ["verify", "draft", "round"])
def test_attention_is_measured_before_it_is_compiled(
    part: str, regional: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part is timed alone: it must take the attention that a round takes."""
    measured: list[bool] = []

    def is_ours(*_: object) -> bool:
        if not torch.compiler.is_compiling():
            measured.append(tree_attention.measured.get())
        return False

    monkeypatch.setattr(tree_attention, "is_open", lambda *_: True)
    monkeypatch.setattr(tree_attention, "is_ours", is_ours)
    engine = short_engine("eagle", compiled=True)
    if part == "round":
        engine.builder.build("round", 32, False, engine.compiler)()
    else:
        separate(engine, 32, [part])[part]()
    assert measured, "an eager step runs first"
    assert all(measured)


def test_a_capture_that_fails_gives_the_allocator_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[int, tuple[int, int]]] = []

    def end(device: int, pool: tuple[int, int]) -> None:
        ended.append((device, pool))
        raise RuntimeError("nothing records to this pool")  # newer torch has ended it

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    with given_back((0, 1)):
        pass
    assert ended == []
    with pytest.raises(RuntimeError, match="capturing"), given_back((0, 2)):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert ended == [(1, (0, 2))]
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")  # it is torch's own to take away
    with pytest.raises(RuntimeError, match="capturing"), given_back((0, 3)):
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_lack_of_memory_is_no_reason_for_parts(
    kind: type[RuntimeError], regional: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise kind("CUDA error: out of memory")

    monkeypatch.setattr(policy, "captured", fails)
    with pytest.raises(kind):
        short_engine("eagle", compiled=True).generate([prompt(7)], max_new_tokens=9)


def test_the_parts_of_a_batch_equal_the_eager_step(regional: None) -> None:
    engine = short_engine("eagle", compiled=True, batch=3)
    prompts = [prompt(length) for length in (3, 17, 25)]
    results = engine.generate(prompts, max_new_tokens=20, stop_ids=[])
    assert tokens_of(results) == [plain_decode(engine.target, p, 20) for p in prompts]


def test_one_compiled_block_serves_all_layers(regional: None) -> None:
    counts = []
    for n_layers in (2, 5):
        before = n_graphs()
        short_engine("eagle", compiled=True, n_layers=n_layers).warm_up(longest=8)
        counts.append(n_graphs() - before)
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_generated_code_gives_the_text_of_the_eager_step() -> None:
    # A greedy row in a sampled batch, and a greedy batch: Inductor builds all five steps.
    target = tiny_target(max_positions=64, n_layers=1)
    sizes = {"batch": 2, "prefill_chunk": 16}
    engines = [
        Engine(target, eagle(target, chain(2)), compiled=compiled, **sizes)
        for compiled in (False, True)
    ]
    prompts, before = [prompt(21), prompt(5)], n_graphs()
    for sampling in (SamplingParams(), SAMPLED):
        results = [
            e.generate(prompts, max_new_tokens=24, sampling=sampling, stop_ids=[]) for e in engines
        ]
        assert tokens_of(results[0]) == tokens_of(results[1])
        accepted = [[one.stats.accepted for one in result] for result in results]
        assert accepted[0] == accepted[1]
    assert len(engines[1].steps) == n_graphs() - before == 5
    with nothing_is_compiled():
        engines[1].generate([prompt(30)], max_new_tokens=20, stop_ids=[])


@pytest.mark.parametrize("n_slots", [16, 64, 512, 528, 2048, 4112])
def test_buckets_grow_to_the_whole_cache(n_slots: int) -> None:
    for compiled in (False, True):
        sizes = buckets(n_slots, compiled=compiled)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == n_slots
    assert buckets(2064, compiled=True) == [512, 1024, 2064]
    assert buckets(2500, compiled=True) == [512, 1024, 2048, 2500]
    assert buckets(150, compiled=False) == [64, 128, 150]


class Counter:
    def __init__(self) -> None:
        self.n_calls = 0

    def count(self, step: int = 1, *, twice: bool = False) -> int:
        self.n_calls += step * (1 + twice)
        return self.n_calls


def test_a_fresh_copy_of_a_bound_method_keeps_its_self() -> None:
    counter = Counter()
    copies = [fresh(counter.count, name) for name in ("first", "second")]
    assert all(copy.__self__ is counter for copy in copies)
    assert [copies[0](), copies[1](2), copies[0](twice=True)] == [1, 3, 5]
    assert counter.n_calls == 5
    codes = [Counter.count.__code__, *(copy.__code__ for copy in copies)]
    assert len({id(code) for code in codes}) == 3, "Dynamo would take one for the other"
    assert [code.co_name for code in codes] == ["count", "first", "second"]
