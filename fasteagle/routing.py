"""Which experts do the rows of a pass use, and how are rows brought to their experts?

    M rows  E experts  k experts of a row  n slots  P pairs of a row and an expert, M * k
    O outputs  I inputs of an expert's matrix

Two ways, both of static shapes and without a look at a value:

slots   a list of experts, the used ones first; all rows are multiplied by each of them. A list of
        `slot_count` experts has room for every choice, so none is read that no row uses.
groups  rows sorted by expert; each expert is multiplied by its own rows only
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16  # bytes: what torch's grouped product asks of a row


class Choice(NamedTuple):
    """The experts of each row and their shares of its output, which add up to 1."""

    experts: Tensor  # [M, k] int64
    shares: Tensor  # [M, k] float32


class Slots(NamedTuple):
    """Experts to multiply all rows by, and what each product is worth to each row."""

    experts: Tensor  # [n] int64: the used ones, ascending, then again and again the first of them
    shares: Tensor  # [n, M] float32; 0 for a row that did not choose the expert, or a repeated one


class Groups(NamedTuple):
    """The pairs of a row and an expert, sorted by expert."""

    order: Tensor  # [P] int64: pair p of the sorted ones is pair order[p], of row order[p] / k
    ends: Tensor  # [E] int32: where the pairs of each expert end


def slot_count(n_rows: int, taken: int, n_experts: int) -> int:
    """The most experts that `n_rows` rows can use between them."""
    return min(n_rows * taken, n_experts)


def slots_of(choice: Choice, n_experts: int) -> Slots:
    """Experts [[2, 0], [2, 3]] of 4 -> slots [0, 2, 3, 0], the last with shares of 0."""
    n_rows, taken = choice.experts.shape
    n = slot_count(n_rows, taken, n_experts)
    shares = table_of(choice, n_experts)
    chosen = torch.zeros_like(shares).scatter(1, choice.experts, 1.0)
    used = chosen.amax(0) > 0
    # A stable sort keeps the experts in order, used ones before the others.
    experts = (~used).to(torch.int8).argsort(stable=True)[:n]
    real = used[experts]
    experts = torch.where(real, experts, experts[:1])
    return Slots(experts, torch.where(real[:, None], shares.T[experts], 0.0))


def table_of(choice: Choice, n_experts: int) -> Tensor:
    """The shares of all experts `[M, E]`; 0 for those that a row did not choose."""
    table = choice.shares.new_zeros(choice.shares.shape[0], n_experts)
    return table.scatter(1, choice.experts, choice.shares)


def groups_of(choice: Choice, n_experts: int) -> Groups:
    """Experts [[2, 0], [2, 3]] of 4 -> order [1, 0, 2, 3], ends [1, 1, 3, 4]."""
    pairs = choice.experts.flatten()
    experts = torch.arange(n_experts, device=pairs.device)
    counts = (pairs[:, None] == experts).sum(0)
    return Groups(pairs.argsort(stable=True), counts.cumsum(0).to(torch.int32))


def sum_slots(products: Tensor, shares: Tensor) -> Tensor:
    """Products `[n, M, C]` and shares `[n, M]` -> the output of every row, `[M, C]` float32."""
    shares = shares[..., None]
    # A row may overflow in an expert that it did not choose: 0 times infinity is no 0.
    return torch.where(shares == 0, 0.0, products.float() * shares).sum(0)


def sum_groups(products: Tensor, groups: Groups, choice: Choice) -> Tensor:
    """Products of the sorted pairs `[P, C]` -> the output of every row, `[M, C]` float32."""
    by_row = products[groups.order.argsort()].unflatten(0, choice.shares.shape)
    return (by_row.float() * choice.shares[..., None]).sum(1)


def can_group(weights: Tensor) -> bool:
    """Whether `grouped_linear` takes weights `[E, O, I]`.

    On CUDA torch's product of groups looks at `ends` on the host, except for bfloat16 on newer
    cards, and a step must not wait. There a chunk of a prompt is short enough to be bound by
    reading the experts, so that all rows by each expert cost little more.
    """
    return weights.device.type == "cpu" and all(
        size * weights.itemsize % ALIGNED == 0 for size in weights.shape[1:]
    )


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows x `[P, I]`, sorted by expert, by each one's weight of `[E, O, I]`: `[P, O]`.

    A weight is read once, and not at all where no row is its own.
    """
    return (_traced if torch.compiler.is_compiling() else _grouped)(x, weights, ends)


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)


# An operator of our own, because torch's cannot be traced in float32 (it can be run). Only for
# tracing: the first call of such an operator imports Dynamo, some seconds.
_traced = torch.library.custom_op("fasteagle::grouped_linear", _grouped, mutates_args=())


@_traced.register_fake
def _(x: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])
