"""What multiplies by a quantized weight? A layer that holds it in the layouts its kernels want.

M rows of x  O outputs  I inputs  J inputs stored  g group size  G groups of a row
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle.quant.kernels import (
    CPU_INT4,
    CPU_INT8,
    DENSE,
    TINYGEMM,
    TINYGEMM_STEP,
    TRITON,
    kernels,
)
from fasteagle.quant.layout import Quantized, dequantize, select_rows, unpack_int4

PACK_ROWS = 4096  # packed together: a packer's input takes 4 bytes a weight
CPU_STEP = 16  # the CPU's kernels want outputs (int4) and inputs (int8) by this


class QuantLinear(nn.Module):
    """`x @ weight.T + bias` for 16-bit x and an int8 or int4 weight `[O, I]`.

    The kernel goes by the rows of x (kernels.py). keep_dense holds a 16-bit copy for products of
    many rows, which otherwise dequantize the weight each time; keep_codes holds the portable codes
    although no kernel here needs them. ValueError where this device has no kernel.
    """

    def __init__(
        self,
        weight: Quantized,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        keep_dense: bool = False,
        keep_codes: bool = False,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        ranges = kernels(weight.bits, device=device, dtype=dtype)
        self.plan = [(limit.rows, limit.kernel) for limit in ranges]
        used = {kernel for _, kernel in self.plan}
        if TRITON in used:
            importlib.import_module("fasteagle.quant.triton_ops")  # makes torch.ops.fasteagle
        self.bits, self.group_size, self.dtype = weight.bits, weight.group_size, dtype
        (self.out_features, self.in_features), self.n_stored = weight.shape, weight.n_stored
        empty = torch.empty(self.out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        weight = weight.to(device)
        dense = dequantize(weight, dtype) if keep_dense else None
        kept = keep_codes or TRITON in used or CPU_INT8 in used or not keep_dense
        packed, scales_zeros = pack(weight, used, dtype)
        for name, buffer in {
            "dense": dense,
            "codes": weight.codes if kept else None,
            "scales": weight.scales if kept else None,
            "zeros": weight.zeros if kept else None,
            "order": weight.order,
            "packed": packed,
            "scales_zeros": scales_zeros,
        }.items():
            self.register_buffer(name, buffer, persistent=False)

    dense: Tensor | None  # [O, I]
    codes: Tensor | None  # layout.py
    scales: Tensor | None
    zeros: Tensor | None
    order: Tensor | None
    packed: Tensor | None  # a kernel's own layout of the codes
    scales_zeros: Tensor | None  # [G, O, 2], as tinygemm and the CPU's kernel want them

    @property
    def read_bytes(self) -> int:
        """Bytes that a product of a few rows reads: codes, and scales and zeros of 16 bits."""
        n_groups = self.out_features * self.n_stored // self.group_size
        a_group = 4 if self.bits == 4 else 2  # with a zero or without
        return self.out_features * self.n_stored * self.bits // 8 + n_groups * a_group

    @property
    def quantized(self) -> Quantized:
        """The weight as it was given."""
        assert self.codes is not None and self.scales is not None, "the codes were let go of"  # noqa: PT018
        return Quantized(
            self.bits, self.codes, self.scales, self.zeros, self.in_features, self.order
        )

    def rows(self, ids: Tensor) -> QuantLinear:
        """A layer of some outputs, ids `[K]`, that keeps what this one keeps."""
        return QuantLinear(
            select_rows(self.quantized, ids),
            dtype=self.dtype,
            device=ids.device,
            keep_dense=self.dense is not None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]`."""
        rows = x.reshape(-1, self.in_features)
        kernel = next(kernel for limit, kernel in self.plan if rows.shape[0] <= limit)
        if kernel == DENSE:
            weight = dequantize(self.quantized, x.dtype) if self.dense is None else self.dense
            y = F.linear(rows, weight, self.bias)
        elif kernel == TRITON:
            y = self._triton(stored_order(rows, self.order, self.n_stored))
        else:
            rows = stored_order(rows, self.order, self.n_stored)
            packed = self.codes if self.packed is None else self.packed
            scales = self.scales if self.scales_zeros is None else self.scales_zeros
            y = packed_product(kernel, rows, packed, scales, self.group_size)
            y = y[:, : self.out_features]
            y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _triton(self, rows: Tensor) -> Tensor:
        y: Tensor
        if self.bits == 8:
            y = torch.ops.fasteagle.int8_linear(rows, self.codes, self.scales, self.bias)
        else:
            arguments = (self.codes, self.scales, self.zeros, self.bias)
            y = torch.ops.fasteagle.int4_linear(rows, *arguments)
        return y

    def extra_repr(self) -> str:
        """What print(model) shows."""
        kind = f"int{self.bits}" + (f".g{self.group_size}" if self.bits == 4 else "")
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


class Stacked(nn.Module):
    """Layers of the same input whose outputs lie side by side; for weights that do not stack."""

    def __init__(
        self, parts: Sequence[nn.Linear | QuantLinear], *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        n_outputs = sum(part.out_features for part in parts)
        empty = torch.empty(n_outputs, dtype=dtype)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]`, O the sum of the parts' outputs."""
        y = torch.cat([part(x) for part in self.parts], -1)
        return y if self.bias is None else y + self.bias


def stored_order(rows: Tensor, order: Tensor | None, n_stored: int) -> Tensor:
    """`[M, I]` -> `[M, J]`: columns as the codes have them, zeros for the padding."""
    if order is not None:
        rows = rows.index_select(1, order)
    padding = n_stored - rows.shape[1]
    return F.pad(rows, (0, padding)) if padding else rows


def packed_product(
    kernel: str, rows: Tensor, packed: Tensor | None, scales: Tensor | None, group_size: int
) -> Tensor:
    """rows `[M, J]` by a weight in a kernel's own layout, as `pack` makes it: `[M, O or more]`.

    scales are int8's `[O, 1]`, or with zeros as `pack` makes them.
    """
    assert packed is not None, "what a kernel reads is kept"
    assert scales is not None, "what a kernel reads is kept"
    y: Tensor
    if kernel == CPU_INT8:
        # It reads inputs 16 at a time: zeros for what it wants besides.
        extra = -rows.shape[1] % CPU_STEP
        rows = F.pad(rows, (0, extra)) if extra else rows
        y = torch.ops.aten._weight_int8pack_mm(rows, packed, scales[:, 0].to(rows.dtype))
        return y
    name = "_weight_int4pack_mm_for_cpu" if kernel == CPU_INT4 else "_weight_int4pack_mm"
    y = getattr(torch.ops.aten, name)(rows, packed, group_size, scales)
    return y


def pack(
    weight: Quantized, used: set[str], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The codes as a kernel wants them, where that is not as they are, and scales beside zeros."""
    if CPU_INT8 in used and weight.n_stored % CPU_STEP:
        return F.pad(weight.codes, (0, -weight.n_stored % CPU_STEP)), None
    if not used & {CPU_INT4, TINYGEMM}:
        return None, None
    assert weight.zeros is not None, "int4 weights have zeros"
    step = CPU_STEP if CPU_INT4 in used else 8
    extra = -weight.shape[0] % step
    codes, scales, zeros = (
        F.pad(tensor, (0, 0, 0, extra)) if extra else tensor
        for tensor in (weight.codes, weight.scales, weight.zeros)
    )
    assert weight.n_stored % TINYGEMM_STEP == 0, "groups are multiples of 32"
    pack = _pack_cpu if CPU_INT4 in used else _pack_tinygemm
    packed = pack(codes, weight.group_size)
    pairs = torch.stack((scales, zeros), -1).to(dtype)
    return packed, pairs.transpose(0, 1).contiguous()


def _pack_cpu(codes: Tensor, group_size: int) -> Tensor:
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    # The packer works on blocks of 64 rows at most, so pieces of 4096 give the same bytes.
    return torch.cat(
        [convert(unpack_int4(part, group_size).int(), 1) for part in codes.split(PACK_ROWS)]
    )


def _pack_tinygemm(codes: Tensor, group_size: int) -> Tensor:
    values = unpack_int4(codes, group_size)
    pairs = values[:, ::2] << 4 | values[:, 1::2]  # its own order: even columns high
    tiles = next(n for n in (8, 4, 2) if values.shape[1] % (16 * n) == 0)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return packed
