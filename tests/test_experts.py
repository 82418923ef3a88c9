"""Do experts compute what each row's own experts would, and is no other expert's weight read?

M rows  E experts  k experts of a row  C model dim  I inner size
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import EXPERTS, randomize, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasteagle import experts as experts_module
from fasteagle.compile import STEP_OPTIONS
from fasteagle.experts import FEW_ROWS, Experts
from fasteagle.fill import quantize_
from fasteagle.quant import experts as quant_module
from fasteagle.quant.experts import QuantExperts, split_experts, stack_experts
from fasteagle.quant.layout import Quantized, dequantize
from fasteagle.quant.rounding import quantize
from fasteagle.routing import Choice, groups_of, slot_count, slots_of, sum_groups, sum_slots

N_EXPERTS, TAKEN, DIM, INNER = 6, 2, 32, 48
PATHS = {"slots": False, "groups": True}


def layer_of(seed: int = 0, **changes: Any) -> Experts:
    sizes = {"dim": DIM, "intermediate_size": INNER, "n_experts": N_EXPERTS} | changes
    return randomize(Experts(replace(tiny_target(**EXPERTS).config, **sizes)), seed)


def rows_of(n: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.randn(1, n, dim, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: Experts, x: Tensor) -> Tensor:
    """The slow twin: each row by itself through its own experts, in float64."""
    rows, out = x[0].double(), []
    probabilities = (rows @ layer.router.weight.double().T).softmax(-1)
    gate_up, down = (p.stack.double() for p in (layer.gate_up_proj, layer.down_proj))
    for row, shares in zip(rows, probabilities, strict=True):
        best = shares.topk(layer.router.taken).indices.tolist()
        total = sum(float(shares[expert]) for expert in best)
        y = torch.zeros_like(row)
        for expert in best:
            gate, up = (gate_up[expert] @ row).chunk(2)
            y += shares[expert] / total * (down[expert] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out)[None]


def certain(layer: Experts, x: Tensor, margin: float = 0.01) -> Tensor:
    """Rows `[M]` whose choice of experts no rounding to 16 bits changes."""
    logits = x[0].double() @ layer.router.weight.double().T
    best = logits.sort(-1, descending=True).values
    return best[:, layer.router.taken - 1] - best[:, layer.router.taken] > margin


def force(patch: pytest.MonkeyPatch, path: str) -> None:
    """Take one of the two ways to bring rows to experts, whatever would be chosen."""
    for module in (experts_module, quant_module):
        patch.setattr(module, "can_group", lambda stack: PATHS[path])


# ----------------------------------------------------------------------------------- routing


@st.composite
def choices(draw: st.DrawFn) -> tuple[Choice, int]:
    n_experts = draw(st.integers(1, 9))
    taken = draw(st.integers(1, min(3, n_experts)))
    pick = st.permutations(range(n_experts)).map(lambda order: order[:taken])
    experts = torch.tensor(draw(st.lists(pick, min_size=1, max_size=12)))
    seed = draw(st.integers(0, 99))
    shares = torch.rand(experts.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    return Choice(experts, shares / shares.sum(-1, keepdim=True)), n_experts


@settings(deadline=None, max_examples=30)
@given(choices())
def test_slots_are_the_used_experts_each_once_and_then_the_first_again(
    drawn: tuple[Choice, int],
) -> None:
    choice, n_experts = drawn
    slots, used = slots_of(choice, n_experts), sorted(set(choice.experts.flatten().tolist()))
    n = slot_count(*choice.experts.shape, n_experts)
    assert len(used) <= n == len(slots.experts)
    assert slots.experts.tolist() == used + used[:1] * (n - len(used))
    assert not slots.shares[len(used) :].any(), "a repeated expert counts once"


@settings(deadline=None, max_examples=30)
@given(choices())
def test_both_ways_add_up_what_each_row_chose(drawn: tuple[Choice, int]) -> None:
    choice, n_experts = drawn
    n_rows, taken = choice.experts.shape
    # Row m by expert e gives 100 m + e, or infinity where the row did not choose the expert.
    table = torch.arange(n_rows)[:, None] * 100.0 + torch.arange(n_experts)
    wanted = (table.gather(1, choice.experts) * choice.shares).sum(1, keepdim=True)
    chosen = torch.zeros(n_rows, n_experts).scatter(1, choice.experts, 1.0) > 0
    table = torch.where(chosen, table, torch.inf)
    slots, groups = slots_of(choice, n_experts), groups_of(choice, n_experts)
    found = sum_slots(table.T[slots.experts][..., None], slots.shares)
    torch.testing.assert_close(found, wanted)
    starts = [0, *groups.ends.tolist()]
    pairs = []
    for expert in range(n_experts):
        for pair in groups.order[starts[expert] : starts[expert + 1]].tolist():
            assert choice.experts.flatten()[pair] == expert
            pairs.append(table[pair // taken, expert])
    torch.testing.assert_close(sum_groups(torch.stack(pairs)[:, None], groups, choice), wanted)


# -------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_rows", [1, 2, 5, 26, FEW_ROWS, FEW_ROWS + 1, 130])
def test_every_row_gets_what_its_own_experts_make(
    n_rows: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path)
    layer, x = layer_of(), rows_of(n_rows)
    torch.testing.assert_close(layer(x), by_hand(layer, x).float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"intermediate_size": 21}, {"n_experts": 2}, {"n_experts": 1}])
def test_odd_sizes_are_computed_as_well(sizes: dict[str, int]) -> None:
    taken = min(TAKEN, sizes.get("n_experts", N_EXPERTS))
    layer, x = layer_of(**sizes, n_experts_per_token=taken), rows_of(7)
    torch.testing.assert_close(layer(x), by_hand(layer, x).float(), atol=2e-5, rtol=1e-5)


def test_a_row_that_overflows_in_an_expert_not_its_own_is_no_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, "slots")
    layer, x = layer_of().half(), rows_of(12).half()
    used = layer.router(x[0]).experts
    last = int(used[0, 0])
    wanted = layer(x)
    layer.down_proj.stack[last] *= 30000.0
    others = ~(used == last).any(-1)
    assert others.any()
    assert torch.equal(layer(x)[0, others], wanted[0, others])


class Reads(TorchDispatchMode):
    """Which experts' matrices are read, one entry a read."""

    def __init__(self) -> None:
        super().__init__()
        self.experts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name == "index_select" and args[0].dim() > 2:
            self.experts += args[2].tolist()
        if name == "_grouped_mm":
            ends = [0, *kwargs.get("offs", args[2] if len(args) > 2 else None).tolist()]
            self.experts += [e for e in range(len(ends) - 1) if ends[e + 1] > ends[e]]
        return func(*args, **kwargs)


def poisoned(layer: Experts, x: Tensor) -> set[int]:
    """Put NaN into every number of the experts that no row uses; returns those that are used."""
    used = set(layer.router(x[0]).experts.flatten().tolist())
    for product in (layer.gate_up_proj, layer.down_proj):
        stacks = product.buffers() if isinstance(product, QuantExperts) else [product.stack]
        for stack in (s for s in stacks if s.is_floating_point()):
            stack[sorted(set(range(N_EXPERTS)) - used)] = torch.nan
    return used


@contextmanager
def reads_of(layer: Experts, x: Tensor) -> Iterator[list[int]]:
    used = poisoned(layer, x)
    with Reads() as reads:
        yield reads.experts
    assert set(reads.experts) == used


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_decoding_reads_used_experts_only(
    n_rows: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path)
    layer, x = layer_of(seed=3), rows_of(n_rows, seed=n_rows)
    wanted = layer(x)
    with reads_of(layer, x) as reads:
        assert torch.equal(layer(x), wanted)  # not so for NaN
    n_used = len(set(reads))
    # Two matrices an expert. Slots that nothing needs read the first expert again.
    n_read = n_used if path == "groups" else slot_count(n_rows, TAKEN, N_EXPERTS)
    assert len(reads) == 2 * n_read
    assert n_used < N_EXPERTS


# -------------------------------------------------------------------------------- quantized


def quantized(bits: int, *, keep: bool, device: str = "cpu") -> tuple[Experts, Experts]:
    """A bfloat16 layer with quantized experts, and the float32 one that it stands for, here."""
    layer = layer_of(dim=64, intermediate_size=96).to(torch.bfloat16)
    exact = copy.deepcopy(layer).float()
    for name in ("gate_up_proj", "down_proj"):
        dense = exact.get_submodule(name).weight
        dense.copy_(dequantize(quantize(dense, bits=bits, group_size=32)))
    return quantize_(layer.to(device), bits=bits, keep_dense=keep), exact


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n_rows", [1, 3, 30, 70])
def test_quantized_experts_are_near_the_weights_that_their_codes_stand_for(
    n_rows: int, bits: int, keep: bool
) -> None:
    narrow, exact = quantized(bits, keep=keep)
    x = rows_of(n_rows, dim=64).bfloat16()
    wanted = exact(x.float())
    assert float((narrow(x).float() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_reads_used_quantized_experts_only(bits: int) -> None:
    narrow, _ = quantized(bits, keep=False)
    x = rows_of(2, dim=64).bfloat16()
    wanted = narrow(x)
    with reads_of(narrow, x):
        assert torch.equal(narrow(x), wanted)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("n_rows", [2, 20])
def test_every_expert_may_have_a_column_order_of_its_own(n_rows: int, keep: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parts, exact = [], []
    for index in range(2 * N_EXPERTS):  # gate and up, of one order an expert
        order = torch.randperm(64, generator=generator) if index % 2 == 0 else parts[-1].order
        order = None if index < 2 else order
        weight = quantize(torch.randn(32, 64, generator=generator), bits=4, group_size=32)
        parts.append(weight._replace(order=order))
        exact.append(dequantize(parts[-1]))
    whole, orders = stack_experts(parts, N_EXPERTS)
    dtype = {"dtype": torch.bfloat16, "keep_dense": keep}
    product = QuantExperts(whole, N_EXPERTS, orders=orders, **dtype)
    x, experts = torch.randn(3, n_rows, 64, generator=generator).bfloat16(), torch.tensor([4, 0, 5])
    found = product.by_slot(x, experts).float()
    wanted = x.float() @ torch.cat(exact).unflatten(0, (N_EXPERTS, -1))[experts].mT
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    again = [dequantize(part) for part in split_experts(whole, N_EXPERTS, orders)]
    assert torch.equal(torch.cat(again), torch.cat(exact))


def test_experts_of_different_layouts_are_refused() -> None:
    def part(group_size: int, order: Tensor | None = None) -> Quantized:
        weight = quantize(torch.randn(8, 64), bits=4, group_size=group_size)
        return weight._replace(order=order)

    turned = torch.arange(63, -1, -1)
    for parts in ([part(32), part(64)], [part(32), part(32, turned)]):
        with pytest.raises(ValueError, match="the matrices of its experts differ"):
            stack_experts(parts, 1)


# --------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_generated_code_computes_what_eager_code_does(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, path)
    layer, x, out = layer_of(), rows_of(5), torch.zeros(1, 5, DIM)

    def step() -> None:
        out.copy_(layer(x))

    with torch.inference_mode():
        torch.compile(step, fullgraph=True, dynamic=False, options=dict(STEP_OPTIONS))()
        for seed in (1, 2):
            x.copy_(rows_of(5, seed))
            torch.compile(step, fullgraph=True, dynamic=False, options=dict(STEP_OPTIONS))()
            torch.testing.assert_close(out, layer(x), atol=1e-5, rtol=1e-5)
