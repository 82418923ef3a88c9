"""Is every step one graph, built once, without a word to the host, and equal to the eager step?

Tracing is what most of these laws are about, so the backend generates no code; in one test it is
Inductor.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BUSHY, eagle, plain_decode, prompt, tiny_target, tokens_of
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fasteagle import compile as policy
from fasteagle import rounds
from fasteagle.compile import CapturedStep, buckets
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.sample import SamplingParams
from fasteagle.tree import chain

KINDS: dict[str, Callable[[Transformer], Drafter | None]] = {
    "none": lambda target: None,
    "eagle": lambda target: eagle(target, BUSHY),
}
SAMPLED = SamplingParams(temperature=0.9, top_k=6, top_p=0.9, seed=3)


def trace_only(patch: pytest.MonkeyPatch) -> None:
    """Trace as ever, run the graphs eagerly; buckets of 32, 64, ... slots instead of 512, ..."""
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    patch.setattr(policy, "FIRST_BUCKET", 32)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(monkeypatch)


class StandIn(CapturedStep):
    """What a captured step does, warm-up runs and restored state included, without CUDA."""

    def _capture(self) -> Any:
        saved = [tensor.clone() for tensor in self.state]
        for _ in range(policy.WARM_UP_RUNS):
            self.function()
            self._restore(saved)
        return SimpleNamespace(replay=self.function)


@pytest.fixture
def regional(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for CUDA: parts are compiled, and the step around them is captured."""
    init = policy.Compiler.__init__

    def capturing(self: policy.Compiler, *, enabled: bool, device: torch.device) -> None:
        init(self, enabled=enabled, device=device)
        self.captures, self.traces = enabled, False

    monkeypatch.setattr(policy.Compiler, "__init__", capturing)
    monkeypatch.setattr(policy, "CapturedStep", StandIn)


def n_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def make(kind: str, *, compiled: bool, batch: int = 1, **changes: object) -> Engine:
    target = tiny_target(max_positions=48, **changes)
    sizes = {"batch": batch, "prefill_chunk": 8}
    return Engine(target, KINDS[kind](target), compiled=compiled, **sizes)


@contextmanager
def nothing_is_compiled() -> Iterator[None]:
    before = n_graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert n_graphs() == before
    assert not counters["graph_break"]


def serve(engines: list[Engine], n_requests: int) -> None:
    """The same requests of all lengths, limits, seeds and sampling through each; same results."""
    rng = random.Random(0)
    for index in range(n_requests):
        tokens = prompt(rng.randint(1, 40), index)
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 1.7]),
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


@pytest.fixture(scope="module", params=KINDS)
def warm(request: pytest.FixtureRequest) -> Warm:
    """A compiled engine with all of its steps built."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(error_on_recompile=True):
        trace_only(patch)
        engine, before = make(request.param, compiled=True), n_graphs()
        engine.warm_up()
        n_greedy = n_graphs() - before
        engine.warm_up(sampled=True)
        n_all = n_graphs() - before
    return Warm(engine, make(request.param, compiled=False), n_greedy, n_all)


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
    engine = make("none", compiled=True)
    engine.warm_up(longest=20)
    assert {n_slots for _, n_slots, _ in engine.steps} == {32}
    assert before == policy.STEP_OPTIONS, "torch.compile took entries out"


def test_a_second_engine_is_no_recompile_of_the_first(traced: None) -> None:
    # Both must keep their own graphs: unguarded ones would be taken for each other.
    engines = [make("eagle", compiled=True), make("none", compiled=True, seed=4)]
    before = n_graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for engine in [*engines, *engines]:
            tokens = prompt(12)
            result = engine.generate([tokens], max_new_tokens=8, stop_ids=[])[0]
            assert result.tokens == plain_decode(engine.target, tokens, 8)
    assert n_graphs() - before == sum(len(engine.steps) for engine in engines)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_parts_give_the_text_of_the_eager_step(kind: str, regional: None) -> None:
    engine, eager = make(kind, compiled=True), make(kind, compiled=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        engine.warm_up()
        engine.warm_up(sampled=True)
    assert all(isinstance(step, StandIn) for step in engine.steps.values())
    with nothing_is_compiled():
        serve([engine, eager], 15)


def test_the_parts_of_a_batch_equal_the_eager_step(regional: None) -> None:
    engine = make("eagle", compiled=True, batch=3)
    prompts = [prompt(length) for length in (3, 17, 25)]
    results = engine.generate(prompts, max_new_tokens=20, stop_ids=[])
    assert tokens_of(results) == [plain_decode(engine.target, p, 20) for p in prompts]


def test_one_compiled_block_serves_all_layers(regional: None) -> None:
    counts = []
    for n_layers in (2, 5):
        before = n_graphs()
        make("eagle", compiled=True, n_layers=n_layers).warm_up(longest=8)
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
    assert buckets(2064, compiled=True) == [512, 1024, 2048, 2064]
    assert buckets(150, compiled=False) == [64, 128, 150]


# ---------------------------------------------------------------- no host sync inside a step

SYNCING_OPS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "multinomial",
    "unique_dim", "_unique2", "bincount",
}  # fmt: skip
SYNCING_CALLS = {
    "item", "tolist", "cpu", "numpy", "cuda", "__bool__", "__int__", "__float__", "__index__",
    "tensor", "as_tensor", "nonzero", "__array__",
}  # fmt: skip


class OpSpy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.n_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.n_ops += 1
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [])
        )
        moves = name == "_to_copy" and kwargs.get("device") is not None
        ragged = name == "repeat_interleave" and "Tensor" in func._overloadname
        if name in SYNCING_OPS or by_mask or moves or ragged:
            self.syncs.append(name)
        return func(*args, **kwargs)


class CallSpy(TorchFunctionMode):
    """On the CPU a copy to the host is no operator, so the calls are watched as well."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_device = name == "to" and any(isinstance(a, str | torch.device) for a in args)
        if name in SYNCING_CALLS or to_device:
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))


def syncs_of(engine: Engine, key: tuple[str, int, bool]) -> list[str]:
    """What one built step would make the host wait for."""
    with torch.inference_mode(), OpSpy() as ops, CallSpy() as calls:
        engine.steps[key]()
    assert ops.n_ops > 20
    return [*ops.syncs, *calls.syncs]


def served(kind: str, sampled: bool) -> Engine:
    """An eager engine in the middle of a text, all of its steps built."""
    engine = make(kind, compiled=False, batch=2)
    sampling = SAMPLED if sampled else SamplingParams()
    requests = [engine.request(prompt(n), sampling=sampling, stop_ids=[]) for n in (20, 9)]
    decoding = engine.decode(engine.rows(requests))
    for _ in range(3):
        next(decoding)
    return engine


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind: str, sampled: bool) -> None:
    engine = served(kind, sampled)
    assert {name for name, _, _ in engine.steps} == {"extend", "prefill", "round"}
    for key in engine.steps:
        assert syncs_of(engine, key) == []


INJECTED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "multinomial": lambda x: torch.multinomial(torch.ones(4), 1),
    "tensor": lambda x: torch.tensor([1, 2]),
    "slice": lambda x: x[:, : x[0, 0]],
}


@pytest.mark.parametrize("injected", INJECTED)
def test_the_spy_catches_a_wait(injected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, accept = served("eagle", False), rounds.accept

    def waiting(tree: Any, above: Any, chosen: torch.Tensor, *, n_path: int) -> Any:
        INJECTED[injected](chosen)
        return accept(tree, above, chosen, n_path=n_path)

    monkeypatch.setattr(rounds, "accept", waiting)
    key = next(key for key in engine.steps if key[0] == "round")
    assert syncs_of(engine, key) != []
