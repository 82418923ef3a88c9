"""On a GPU: is a round one launch without a wait, and is the text still the eager one?

16-bit kernels for N tokens and for one round differently, so in bf16 two texts may part where the
two best logits are nearly equal; such places are counted and their gap is bounded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import MC_SIM, decode, eagle, first_gaps, prompt, tiny_target, tokens_of
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from fasteagle import demo
from fasteagle.ahead import Readback
from fasteagle.checkpoint import load_head, load_target
from fasteagle.compile import CapturedStep, NotCaptured
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.sample import SamplingParams
from fasteagle.tree import StaticTree, chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

N_NEW = 64
EPSILON = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # logits here are about 10
TREES = {"mc_sim": MC_SIM, "chain": chain(5)}


def demo_engine(dtype: torch.dtype, tree: StaticTree | None, *, compiled: bool) -> Engine:
    target = load_target(demo.BASE, dtype=dtype, device="cuda")
    drafter = EagleDrafter(load_head(demo.HEAD, target), target, tree) if tree else None
    return Engine(target, drafter, compiled=compiled)


def tiny_engine(*, drafts: bool, compiled: bool, batch: int = 1) -> Engine:
    target = copy.deepcopy(tiny_target()).to("cuda")
    drafter = eagle(target, MC_SIM) if drafts else None
    return Engine(target, drafter, compiled=compiled, batch=batch, prefill_chunk=16)


def demo_prompts() -> list[list[int]]:
    return [prompt(length, seed, 2048) for seed, length in enumerate((1, 12, 40, 64, 65, 100))]


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_mid_text(engine: Engine, *, sampled: bool = False) -> tuple[str, int, bool]:
    """Decode a few rounds of a text and leave it; returns the key of the latest round's step."""
    sampling = SamplingParams(temperature=0.8 if sampled else 0.0, seed=1)
    vocab = engine.target.config.vocab_size
    requests = [
        engine.request(prompt(20 + row, row, vocab), sampling=sampling, stop_ids=[])
        for row in range(engine.batch)
    ]
    decoding = engine.decode(engine.rows(requests))
    for _ in range(4):
        next(decoding)
    return [key for key in engine.steps if key[0] == "round"][-1]


@pytest.mark.parametrize("tree", [None, *TREES.values()], ids=["none", *TREES])
def test_captured_text_equals_eager_text_in_fp32(tree: StaticTree | None) -> None:
    eager, captured = (
        demo_engine(torch.float32, tree, compiled=compiled) for compiled in (False, True)
    )
    prompts = demo_prompts()
    texts = [
        tokens_of(engine.generate(prompts, max_new_tokens=N_NEW, stop_ids=[]))
        for engine in (eager, captured)
    ]
    gaps = first_gaps(eager.target, prompts, texts)
    assert all(gap < EPSILON[torch.float32] for gap in gaps), gaps
    assert len(gaps) <= 1


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
def test_drafting_parts_from_plain_text_only_at_a_tie(dtype: torch.dtype, compiled: bool) -> None:
    plain, drafted = (
        demo_engine(dtype, tree, compiled=compiled) for tree in (None, TREES["mc_sim"])
    )
    prompts = demo_prompts()
    results = [
        engine.generate(prompts, max_new_tokens=N_NEW, stop_ids=[]) for engine in (plain, drafted)
    ]
    gaps = first_gaps(plain.target, prompts, [tokens_of(result) for result in results])
    print(f"{dtype}: {len(gaps)} of {len(prompts)} texts part, gaps {gaps}")  # noqa: T201
    assert all(gap < EPSILON[dtype] for gap in gaps), gaps
    assert sum(one.stats.accept_length for one in results[1]) > len(prompts)


@pytest.mark.parametrize("drafts", [False, True], ids=["none", "eagle"])
def test_captured_text_of_a_batch_equals_eager_text(drafts: bool) -> None:
    eager, captured = (
        tiny_engine(drafts=drafts, compiled=compiled, batch=3) for compiled in (False, True)
    )
    for temperature in (0.0, 0.8):
        requests = [
            eager.request(
                prompt(length),
                max_new_tokens=40,
                sampling=SamplingParams(temperature=temperature, top_k=5, seed=length),
                stop_ids=[],
            )
            for length in (1, 17, 33)
        ]
        assert tokens_of(decode(captured, requests)) == tokens_of(decode(eager, requests))


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [False, True], ids=["none", "eagle"])
def test_a_round_is_one_launch(drafts: bool, sampled: bool) -> None:
    engine = tiny_engine(drafts=drafts, compiled=True)
    step = engine.steps[in_mid_text(engine, sampled=sampled)]
    n_rounds = 5
    with torch.inference_mode():
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            for _ in range(n_rounds):
                step()
            torch.cuda.synchronize()
    names = [event.name for event in trace.events()]
    assert sum(name.startswith("cudaGraphLaunch") for name in names) == n_rounds
    others = [name for name in names if name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
    assert not others
    assert not [name for name in names if name.startswith("cudaMemcpy")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [False, True], ids=["none", "eagle"])
def test_no_step_waits_for_the_device(drafts: bool, sampled: bool, compiled: bool) -> None:
    engine = tiny_engine(drafts=drafts, compiled=compiled, batch=2)
    in_mid_text(engine, sampled=sampled)
    assert {name for name, _, _ in engine.steps} == {"extend", "prefill", "round"}
    for step in engine.steps.values():
        with torch.inference_mode(), waits_are_errors():
            step()


def test_a_wait_would_be_noticed() -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), waits_are_errors():
        x.item()


@pytest.mark.parametrize("drafts", [False, True], ids=["none", "eagle"])
def test_requests_after_warm_up_compile_nothing(drafts: bool) -> None:
    engine = tiny_engine(drafts=drafts, compiled=True)
    engine.warm_up()
    engine.warm_up(sampled=True)
    built, before = set(engine.steps), counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(30):
            sampling = SamplingParams(temperature=index % 3 / 2, top_k=index % 5, seed=index)
            tokens, limit = prompt(1 + 4 * index, index), 1 + index % 7
            engine.generate([tokens], max_new_tokens=limit, sampling=sampling)
    assert set(engine.steps) == built
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]


def test_capturing_leaves_the_state_as_it_was() -> None:
    # The first round of a text is where its step is captured; warm-up runs must not move the row.
    eager, captured = (tiny_engine(drafts=True, compiled=compiled) for compiled in (False, True))
    for engine in (eager, captured):
        engine.ahead = False  # a round that is launched ahead is in the state already
        in_mid_text(engine)
    assert eager.state.length.tolist() == captured.state.length.tolist()
    assert eager.state.tree.tokens[:, 0].tolist() == captured.state.tree.tokens[:, 0].tolist()


def test_after_a_step_that_cannot_be_captured_the_next_one_is() -> None:
    x = torch.zeros(1, device="cuda")

    def waits() -> None:
        x.add_(x.item() + 1)

    def goes_on() -> None:
        x.add_(1)

    with pytest.warns(NotCaptured):
        CapturedStep(waits, "waits", [x])()
    assert x.item() == 1, "it runs all the same, once"
    torch.cuda.empty_cache()
    step = CapturedStep(goes_on, "goes_on", [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    assert x.item() == 2
    assert step.replay is not goes_on


def test_caches_and_state_stay_where_they_are() -> None:
    engine = tiny_engine(drafts=True, compiled=True)
    tensors = [*engine.state.tensors(), engine.builder.cache.k, engine.builder.cache.v]
    before = [tensor.data_ptr() for tensor in tensors]
    for length in (3, 40, 100):
        engine.generate([prompt(length)], max_new_tokens=10, stop_ids=[])
    after = [*engine.state.tensors(), engine.builder.cache.k, engine.builder.cache.v]
    assert [tensor.data_ptr() for tensor in after] == before


@pytest.mark.parametrize("batch", [1, 3])
def test_reading_a_round_late_changes_nothing(batch: int) -> None:
    engine, found = tiny_engine(drafts=True, compiled=True, batch=batch), []
    assert engine.ahead
    prompts = [prompt(length, length) for length in (3, 19, 1, 8, 11)]
    for ahead in (True, False):
        engine.ahead = ahead
        results = engine.generate(prompts, max_new_tokens=N_NEW, stop_ids=[4])
        found.append([(result.tokens, result.reason, result.stats.accepted) for result in results])
    assert found[0] == found[1]


def test_a_readback_is_launched_without_a_wait() -> None:
    engine = tiny_engine(drafts=True, compiled=True)
    engine.generate([prompt(9)], max_new_tokens=9)
    [row] = engine.rows([engine.request(prompt(9), max_new_tokens=9)])
    Readback(engine.state, {0: row})  # the first one allocates pinned memory
    with waits_are_errors():
        engine._run("round", 20, sampled=False)
        readback = Readback(engine.state, {0: row})
    readback.deliver()
    assert row.tokens
