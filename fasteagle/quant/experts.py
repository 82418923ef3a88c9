"""What multiplies by quantized experts? A stack of int8 or int4 matrices; a product picks from it.

    E experts  n slots  M rows  P pairs of a row and an expert, sorted by expert
    O outputs  I inputs of an expert  J inputs stored  B bytes of a row  G groups of a row

routing.py says what slots and groups are.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle.quant.kernels import CPU_INT8, DENSE, TRITON, expert_kernels
from fasteagle.quant.layout import Quantized, dequantize, select_rows, stack
from fasteagle.quant.linear import pack, packed_product, stored_order
from fasteagle.routing import can_group, grouped_linear

Pick = int | Tensor  # which expert; a Tensor is [1]


class QuantExperts(nn.Module):
    """Int8 or int4 weights of E experts for 16-bit x, without bias.

    weight holds the experts one under another, `[E * O, I]`; orders `[E, I]` are their column
    orders where they have any (`Quantized.order`). keep_dense as in QuantLinear. ValueError where
    this device has no kernel.
    """

    def __init__(
        self,
        weight: Quantized,
        n_experts: int,
        *,
        orders: Tensor | None = None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keep_dense: bool = False,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        ranges = expert_kernels(weight.bits, device=device, dtype=dtype)
        self.plan = [(limit.rows, limit.kernel) for limit in ranges]
        used = {kernel for _, kernel in self.plan}
        if TRITON in used:
            importlib.import_module("fasteagle.quant.triton_experts")  # makes torch.ops.fasteagle
        if weight.order is not None:
            orders = weight.order.expand(n_experts, -1)
        self.n_experts, self.n_inputs, self.n_stored = n_experts, weight.n_inputs, weight.n_stored
        self.bits, self.group_size = weight.bits, weight.group_size
        weight = weight._replace(order=None).to(device)
        parts = split_experts(weight, n_experts, None if orders is None else orders.to(device))
        self.n_outputs = parts[0].shape[0]
        kept = TRITON in used or CPU_INT8 in used or not keep_dense
        packs = [pack(part, used, dtype) for part in parts]
        stacks: dict[str, list[Tensor | None]] = {
            "codes": [part.codes for part in parts] if kept else [],
            "scales": [part.scales for part in parts] if kept else [],
            "zeros": [part.zeros for part in parts] if kept else [],
            "orders": [part.order for part in parts],
            "dense": [dequantize(part, dtype) for part in parts] if keep_dense else [],
            "packed": [packed for packed, _ in packs],
            "scales_zeros": [pairs for _, pairs in packs],
        }
        for name, tensors in stacks.items():
            held = [tensor for tensor in tensors if tensor is not None]
            self.register_buffer(name, torch.stack(held) if held else None, persistent=False)

    codes: Tensor | None  # [E, O, B]
    scales: Tensor | None  # [E, O, G]
    zeros: Tensor | None  # [E, O, G]
    orders: Tensor | None  # [E, I]
    dense: Tensor | None  # [E, O, I]
    packed: Tensor | None  # [E, ...], a kernel's own layout of the codes
    scales_zeros: Tensor | None  # [E, G, O, 2]

    def kernel(self, n_rows: int) -> str:
        """What multiplies `n_rows` rows."""
        return next(kernel for limit, kernel in self.plan if n_rows <= limit)

    def groups(self, n_rows: int) -> bool:
        """Whether `by_group` is better: of many rows, where a 16-bit copy is kept."""
        return self.kernel(n_rows) == DENSE and self.dense is not None and can_group(self.dense)

    def by_slot(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """x `[n, M, I]`, or `[1, M, I]` for all, by the experts `[n]`, None being each in turn:
        `[n, M, O]`.
        """
        kernel = self.kernel(x.shape[1])
        if kernel == TRITON:
            assert experts is not None, "few rows come with the experts that they use"
            return self._triton(x, experts)
        picks = range(self.n_experts) if experts is None else experts.split(1)
        products = [self._product(kernel, x[n % len(x)], pick) for n, pick in enumerate(picks)]
        return torch.stack(products)

    def by_group(self, x: Tensor, ends: Tensor) -> Tensor:
        """x `[P, I]`, sorted by expert, by its own expert each: `[P, O]`."""
        assert self.dense is not None, "groups are multiplied by the 16-bit copy"
        return grouped_linear(x, self.dense, ends)

    def _triton(self, x: Tensor, experts: Tensor) -> Tensor:
        """x `[n, M, I]`, or `[1, M, I]`, by experts `[n]`: `[n, M, O]`."""
        if self.orders is not None:
            columns = self.orders.index_select(0, experts)[:, None].expand(-1, x.shape[1], -1)
            x = x.expand(len(experts), -1, -1).gather(2, columns)
        padding = self.n_stored - self.n_inputs
        x = (F.pad(x, (0, padding)) if padding else x).contiguous()
        y: Tensor
        if self.bits == 8:
            y = torch.ops.fasteagle.int8_experts(x, experts, self.codes, self.scales)
        else:
            held = (self.codes, self.scales, self.zeros)
            y = torch.ops.fasteagle.int4_experts(x, experts, *held)
        return y

    def _product(self, kernel: str, rows: Tensor, pick: Pick) -> Tensor:
        """rows `[M, I]` by one expert: `[M, O]`."""
        if kernel == DENSE:
            weight = one(self.dense, pick)
            if weight is None:
                weight = dequantize(self._expert(pick), rows.dtype)
            return F.linear(rows, weight)
        rows = stored_order(rows, one(self.orders, pick), self.n_stored)
        packed = one(self.codes if self.packed is None else self.packed, pick)
        scales = one(self.scales if self.scales_zeros is None else self.scales_zeros, pick)
        return packed_product(kernel, rows, packed, scales, self.group_size)[:, : self.n_outputs]

    def _expert(self, pick: Pick) -> Quantized:
        """One expert's weight."""
        codes, scales = one(self.codes, pick), one(self.scales, pick)
        assert codes is not None, "the codes were let go of"
        assert scales is not None, "the scales were let go of"
        zeros, order = one(self.zeros, pick), one(self.orders, pick)
        return Quantized(self.bits, codes, scales, zeros, self.n_inputs, order)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        kind = f"int{self.bits}" + (f".g{self.group_size}" if self.bits == 4 else "")
        return f"{self.n_experts} of {self.n_inputs}, {self.n_outputs}, {kind}"


def one(stack: Tensor | None, pick: Pick) -> Tensor | None:
    """A tensor of one expert from the stack of all: a view, or a copy where a tensor says which."""
    if stack is None:
        return None
    return stack[pick] if isinstance(pick, int) else stack.index_select(0, pick)[0]


def split_experts(weight: Quantized, n_experts: int, orders: Tensor | None) -> list[Quantized]:
    """The weights of experts that lie one under another, in views; orders `[E, I]` or None."""
    n_outputs = weight.shape[0] // n_experts
    rows = (slice(start, start + n_outputs) for start in range(0, weight.shape[0], n_outputs))
    parts = [select_rows(weight, part) for part in rows]
    if orders is None:
        return parts
    return [part._replace(order=order) for part, order in zip(parts, orders, strict=True)]


def stack_experts(parts: Sequence[Quantized], n_experts: int) -> tuple[Quantized, Tensor]:
    """The parts of all experts in their order, one under another, and column orders `[E, I]`.

    For experts whose column orders differ. ValueError where the parts of one expert (gate and up)
    have different ones, or where bits or group sizes differ.
    """
    each = len(parts) // n_experts
    experts = [stack(parts[start : start + each]) for start in range(0, len(parts), each)]
    whole = stack([part._replace(order=None) for part in parts])
    if whole is None or any(expert is None for expert in experts):
        raise ValueError(
            "the matrices of its experts differ in bits or group size, or those of one expert in "
            "their column order; expected one layout"
        )
    plain = torch.arange(whole.n_inputs)
    orders = [part.order for part in parts[::each]]
    return whole, torch.stack([plain if order is None else order for order in orders])
