"""What do the experts of a layer compute? A few rows choose a few of them; many rows all.

    B batch  S new tokens  M rows, B * S  C model dim  I inner size of an expert
    E experts  k experts of a row  n slots  P pairs of a row and an expert, M * k

The experts' matrices lie one under another in one weight, `[E * outputs, inputs]`, dense here or
quantized (quant/experts.py). routing.py has the two ways to bring rows to them.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle.config import ModelConfig
from fasteagle.quant.kernels import TRITON_ROWS, picks_experts
from fasteagle.routing import (
    Choice,
    can_group,
    grouped_linear,
    groups_of,
    slots_of,
    sum_groups,
    sum_slots,
    table_of,
)

FEW_ROWS = TRITON_ROWS  # as many as its kernels take, and a wide tree; more use every expert


class ExpertProduct(Protocol):
    """What multiplies by the matrices of all experts."""

    def groups(self, n_rows: int) -> bool:
        """Whether `by_group` is better for `n_rows` rows."""

    def by_slot(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """x `[n, M, inputs]`, or `[1, M, inputs]` for all, by the experts `[n]`, None being each
        in turn: `[n, M, outputs]`.
        """

    def by_group(self, x: Tensor, ends: Tensor) -> Tensor:
        """x `[P, inputs]`, sorted by expert, by its own expert each: `[P, outputs]`."""


class Router(nn.Module):
    """Which experts a row takes: the k likeliest, in float32, their shares scaled to add up to 1.

    Not a Linear: it is never quantized, nor repacked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.taken = config.n_experts_per_token

    def forward(self, rows: Tensor) -> Choice:
        """rows `[M, C]`."""
        scores = F.linear(rows, self.weight).float().softmax(-1)
        best = scores.topk(self.taken, -1)
        return Choice(best.indices, best.values / best.values.sum(-1, keepdim=True))


class ExpertLinear(nn.Module):
    """A dense matrix an expert, without bias."""

    def __init__(self, n_experts: int, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts * n_outputs, n_inputs))
        self.n_experts, self.n_inputs, self.n_outputs = n_experts, n_inputs, n_outputs
        self.picks = False

    def choose_kernel(self) -> None:
        """Look at the device that the weight is on now, once: a step does not."""
        self.picks = picks_experts(self.weight.device, self.weight.dtype)
        if self.picks:
            importlib.import_module("fasteagle.quant.triton_experts")  # makes torch.ops.fasteagle

    @property
    def stack(self) -> Tensor:
        """The weight as `[E, outputs, inputs]`, a view."""
        return self.weight.unflatten(0, (self.n_experts, -1))

    def groups(self, n_rows: int) -> bool:  # noqa: ARG002
        return can_group(self.stack)

    def by_slot(self, x: Tensor, experts: Tensor | None) -> Tensor:
        stack = self.stack
        if self.picks and experts is not None:
            y: Tensor = torch.ops.fasteagle.dense_experts(x.contiguous(), experts, stack)
            return y
        if experts is None:
            return torch.stack([F.linear(x[e % len(x)], w) for e, w in enumerate(stack.unbind())])
        # One at a time: a copy of all would be as large as the layer.
        picked = (stack.index_select(0, expert)[0] for expert in experts.split(1))
        return torch.stack([F.linear(x[n % len(x)], weight) for n, weight in enumerate(picked)])

    def by_group(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(x, self.stack, ends)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.n_experts} of {self.n_inputs}, {self.n_outputs}"


class Experts(nn.Module):
    """A layer's MLP: every row goes through k of E feed-forward networks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, C, size = config.n_experts, config.dim, config.intermediate_size
        self.router = Router(config)
        self.gate_up_proj: ExpertProduct = ExpertLinear(E, C, 2 * size)
        self.down_proj: ExpertProduct = ExpertLinear(E, size, C)
        self.n_experts = E

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, S, C]` -> `[B, S, C]`."""
        rows = x.flatten(0, -2)
        choice = self.router(rows)
        both = self.gate_up_proj, self.down_proj
        if all(product.groups(len(rows)) for product in both):
            y = self._by_group(rows, choice)
        else:
            y = self._by_slot(rows, choice)
        return y.to(x.dtype).view_as(x)

    def _by_group(self, rows: Tensor, choice: Choice) -> Tensor:
        """rows `[M, C]` -> `[M, C]` float32."""
        groups = groups_of(choice, self.n_experts)
        x = rows[groups.order // choice.experts.shape[1]]
        inner = gated(self.gate_up_proj.by_group(x, groups.ends))
        return sum_groups(self.down_proj.by_group(inner, groups.ends), groups, choice)

    def _by_slot(self, rows: Tensor, choice: Choice) -> Tensor:
        """rows `[M, C]` -> `[M, C]` float32."""
        if len(rows) > FEW_ROWS:
            experts, shares = None, table_of(choice, self.n_experts).T
        else:
            experts, shares = slots_of(choice, self.n_experts)
        inner = gated(self.gate_up_proj.by_slot(rows[None], experts))
        return sum_slots(self.down_proj.by_slot(inner, experts), shares)


def gated(gate_up: Tensor) -> Tensor:
    """The activation between the two matrices: `[..., 2 I]` -> `[..., I]`."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
