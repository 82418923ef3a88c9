"""Who decides which attention a step takes, and what if ours fails? Without Triton, on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    DRAFTERS,
    MC_SIM,
    Refused,
    eagle,
    plain_decode,
    prompt,
    short_engine,
    tiny_target,
    tokens_of,
)
from test_compile import regional, traced  # noqa: F401
from torch import Tensor

from fasteagle import model, tree_attention
from fasteagle.attention_trial import Shape
from fasteagle.compile import Compiler
from fasteagle.engine import Engine
from fasteagle.tree import causal_mask
from fasteagle.tree_attention import MAX_TOKENS, VARIABLE, check, is_ours, prepare

SHAPE = Shape(1, 2, 6, 64, 512, torch.bfloat16, torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing known, nothing forced, and a CPU that is taken for a GPU."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tree_attention, "winners", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def tell(monkeypatch: pytest.MonkeyPatch, *, agrees: bool, faster: bool) -> list[str]:
    """Put answers in the place of measurements; returns the list of questions."""
    asked: list[str] = []

    def answer(name: str, value: bool) -> Callable[..., bool]:
        return lambda *_: asked.append(name) or value  # type: ignore[func-returns-value]

    monkeypatch.setattr(tree_attention, "agrees", answer("agrees", agrees))
    monkeypatch.setattr(tree_attention, "faster", answer("faster", faster))
    return asked


@pytest.mark.parametrize("faster", [False, True])
def test_a_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    asked = tell(monkeypatch, agrees=True, faster=faster)
    assert [prepare(SHAPE) for _ in range(3)] == [faster] * 3
    assert asked == ["agrees", "faster"]
    prepare(SHAPE._replace(slots=1024))
    assert len(asked) == 4


def test_a_forced_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tell(monkeypatch, agrees=True, faster=False)
    monkeypatch.setenv(VARIABLE, "triton")
    assert prepare(SHAPE)
    assert asked == ["agrees"]
    monkeypatch.setenv(VARIABLE, "sdpa")
    assert not prepare(SHAPE)
    monkeypatch.delenv(VARIABLE)
    assert not prepare(SHAPE), "a forced choice is no measurement"


@pytest.mark.parametrize("force", [None, "triton"])
def test_a_kernel_that_is_wrong_is_never_taken(
    monkeypatch: pytest.MonkeyPatch, force: str | None
) -> None:
    tell(monkeypatch, agrees=False, faster=True)
    if force:
        monkeypatch.setenv(VARIABLE, force)
    with pytest.warns(UserWarning, match="computes something else"):
        assert not prepare(SHAPE)


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(tree_attention, "agrees", broken)
    with pytest.warns(UserWarning, match=r"attention stays torch's.*\(no C compiler\)$") as seen:
        assert not prepare(SHAPE)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not prepare(SHAPE)  # known now


def test_an_older_gpu_keeps_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tell(monkeypatch, agrees=True, faster=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not prepare(SHAPE)
    assert not asked


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"n_tokens": MAX_TOKENS + 1}, False),
        ({"dim": 512}, False),
        ({"devices": ("cuda",)}, False),
        ({"force": None}, False),  # eager code is the reference
    ],
    ids=str,
)
def test_what_ours_can_compute(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], wanted: bool
) -> None:
    tell(monkeypatch, agrees=True, faster=True)
    monkeypatch.setattr(tree_attention, "DEVICES", change.get("devices", ("cpu",)))
    if change.get("force", "triton"):
        monkeypatch.setenv(VARIABLE, "triton")
    dim = change.get("dim", 64)
    q = torch.zeros(1, 2, 6, dim, dtype=change.get("dtype", torch.float16))
    k = torch.zeros(1, 2, 32, dim, dtype=q.dtype)
    assert is_ours(q, k, change.get("n_tokens", 6)) == wanted


class Recorder(Compiler):
    """Takes the CPU for a device that captures, compiles nothing and keeps the rehearsals."""

    def __init__(self) -> None:
        super().__init__(enabled=False, device=torch.device("cpu"))
        self.rehearsals: dict[str, Any] = {}

    def step(self, function: Any, name: str, state: Any, rehearsal: Any = None) -> Any:
        self.rehearsals[name] = rehearsal
        return function


def in_bfloat16(module: torch.nn.Module) -> None:
    """Cast weights, not the buffers of RoPE."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def test_a_rehearsal_meets_the_shapes_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Shape] = []
    monkeypatch.setattr(tree_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(tree_attention, "prepare", lambda shape: bool(met.append(shape)))
    target = copy.deepcopy(tiny_target())
    drafter = copy.deepcopy(eagle(target, MC_SIM))
    drafter.target = target
    in_bfloat16(target)
    in_bfloat16(drafter.head)
    engine = Engine(target, drafter, prefill_chunk=16)
    recorder = Recorder()
    step = engine.builder.build("round", 64, False, recorder)
    with torch.inference_mode():
        engine.generate([prompt(9)], max_new_tokens=4, stop_ids=[])
        step()
    assert not met, "a step outside of a rehearsal measures nothing"
    with torch.inference_mode():
        recorder.rehearsals["round_64_greedy"]()
    config, head = target.config, drafter.head.config
    group, heads = config.n_heads // config.n_kv_heads, config.n_kv_heads
    assert {shape.slots for shape in met} == {64}
    assert [(s.heads, s.rows) for s in met[: config.n_layers]] == [
        (heads, group * drafter.n_nodes)
    ] * config.n_layers
    drafted = [s.rows * head.n_kv_heads // head.n_heads for s in met[config.n_layers :]]
    # The last accepted row, then the nodes of each level that have children.
    levels = [len(MC_SIM.internal(depth)) for depth in range(1, MC_SIM.n_path - 1)]
    assert drafted == [1, *levels]


@pytest.mark.parametrize("kind", DRAFTERS)
def test_no_row_sees_past_the_newest_slot(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    hidden: list[bool] = []
    attend = model.attend

    def looking(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slots: Tensor) -> Tensor:
        past = torch.arange(k.shape[2]) > slots[:, -1:]
        hidden.append(bool((bias[:, 0] == -torch.inf).masked_select(past[:, None]).all()))
        assert past.any(), "nothing is past it: this says nothing"
        return attend(q, k, v, bias, slots)

    target = tiny_target()
    prompts = [prompt(5), prompt(21, 1)]
    truth = [plain_decode(target, tokens, 24) for tokens in prompts]
    drafter = DRAFTERS[kind](
        target, [[*one, *rest] for one, rest in zip(prompts, truth, strict=True)]
    )
    monkeypatch.setattr(model, "attend", looking)
    Engine(target, drafter, batch=2, prefill_chunk=16).generate(prompts, max_new_tokens=12)
    assert hidden
    assert all(hidden)


@pytest.mark.usefixtures("regional")
def test_compiled_parts_hold_the_attention_that_their_rehearsal_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[torch.Size] = []

    def stand_in(*inputs: Tensor) -> Tensor:
        calls.append(inputs[0].shape)
        y = tree_attention.reference(*inputs)
        return y.transpose(1, 2).contiguous().transpose(1, 2)  # as the kernel leaves it

    tree_attention.tree_attention.register_kernel("cpu", stand_in)
    monkeypatch.setattr(tree_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(tree_attention, "DTYPES", (torch.float32,))
    engine = short_engine("eagle", compiled=True)
    n_layers, verified = engine.target.config.n_layers, 2 * engine.drafter.n_nodes
    monkeypatch.setattr(tree_attention, "_try", lambda shape, force: shape.rows == verified)
    results = engine.generate([prompt(9)], max_new_tokens=12, stop_ids=[])
    assert tokens_of(results) == [plain_decode(engine.target, prompt(9), 12)]
    assert set(tree_attention.winners.values()) == {True, False}
    assert {shape[2] for shape in calls} == {verified}
    # In the rehearsal, in warm-up runs, in capturing and in every round, by each layer.
    assert len(calls) > 5 * n_layers
    assert len(calls) % n_layers == 0


def test_generated_code_hands_over_the_cache_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    homes: list[int] = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, newest: Tensor) -> Tensor:
        check(q, k, v, bias, newest)
        homes.extend(side.untyped_storage().data_ptr() for side in (k, v))
        y = tree_attention.reference(q, k, v, bias, newest)
        return y.transpose(1, 2).contiguous().transpose(1, 2)

    tree_attention.tree_attention.register_kernel("cpu", stand_in)
    monkeypatch.setattr(tree_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(tree_attention, "won", lambda *_: True)
    target = copy.deepcopy(tiny_target(n_layers=1))
    in_bfloat16(target)
    cache, slots = target.new_cache(2, 80), torch.arange(6)[None] + torch.tensor([[3], [30]])

    def attention(
        block: torch.nn.Module, *inputs: Any
    ) -> Tensor:  # compiles in half a block's time
        return block.self_attn(*inputs)

    run = torch.compile(attention, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        target(slots * 0, slots, slots, causal_mask(slots, 64), cache, run=run)
    assert homes == [side.untyped_storage().data_ptr() for side in (cache.k, cache.v)], "copies"


def test_float32_needs_no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "DEVICES", ("cpu",))
    recorder = Recorder()
    Engine(tiny_target()).builder.build("round", 64, False, recorder)
    assert recorder.rehearsals == {"round_64_greedy": None}


def test_an_unknown_word_ends_in_a_line(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setenv(VARIABLE, "flash")
    with pytest.raises(ValueError, match="FASTEAGLE_ATTENTION is 'flash', not sdpa or triton"):
        Engine(tiny_target())
    refused("generate", "--max_new_tokens", "1", words="unset it to take the faster one")


def test_the_choice_is_a_constant_for_the_compiler() -> None:
    """Marked by hand, as torch's own function loads the compiler."""

    def other() -> None:
        pass

    torch.compiler.assume_constant_result(other)
    assert vars(tree_attention.won) == vars(other) != {}
