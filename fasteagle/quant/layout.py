"""How is a quantized matrix stored, on any device and in any file?

    O outputs  I inputs of the weight  J inputs stored: I rounded up to whole groups
    g group size  G groups of a row, J / g

int8  codes `[O, J]` int8, one scale a row: weight = code * scale
int4  codes `[O, J / 2]` uint8, a scale and a zero a group: weight = (code - 8) * scale + zero, with
      code in 0..15; byte j of a group holds column j in its low four bits, column j + g / 2 in its
      high ones: group 32, columns 0..31 -> bytes [0|16, 1|17, ..., 15|31]

This is what files hold and what every kernel's own layout is made from at load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)
BITS = (4, 8)
ROWS = 1024  # dequantized together


class Quantized(NamedTuple):
    """A weight `[O, I]` in 4 or 8 bits."""

    bits: int
    codes: Tensor  # [O, J / 2] uint8, or [O, J] int8
    scales: Tensor  # [O, G], floating
    zeros: Tensor | None  # [O, G], floating: what code 8 stands for; None with 8 bits
    n_inputs: int  # I
    order: Tensor | None = None  # [I] int64: stored column c is column order[c] of the weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)`."""
        return self.codes.shape[0], self.n_inputs

    @property
    def n_stored(self) -> int:
        """J: inputs with the padding of the last group."""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def group_size(self) -> int:
        """g: inputs that share a scale; all of them with 8 bits."""
        return self.n_stored // self.scales.shape[1]

    def to(self, device: torch.device | str) -> Quantized:
        """The same weight on a device, each tensor contiguous, as kernels want it."""
        return self._replace(
            codes=self.codes.to(device).contiguous(),
            scales=self.scales.to(device).contiguous(),
            zeros=None if self.zeros is None else self.zeros.to(device).contiguous(),
            order=None if self.order is None else self.order.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the suffix that files give them."""
        named = {"qweight": self.codes, "scales": self.scales, "zeros": self.zeros}
        named["order"] = self.order
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def pack_int4(values: Tensor, group_size: int) -> Tensor:
    """Values 0..15 `[O, J]` -> codes `[O, J / 2]` uint8."""
    low, high = values.to(torch.uint8).unflatten(1, (-1, 2, group_size // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(codes: Tensor, group_size: int) -> Tensor:
    """Codes `[O, J / 2]` -> values 0..15 `[O, J]` uint8."""
    pairs = codes.unflatten(1, (-1, group_size // 2))
    return torch.cat((pairs & 15, pairs >> 4), -1).flatten(1)


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `[O, I]` that the codes stand for, computed in float32 and rounded to `dtype`.

    Some rows at a time, or the float32 values would take more than the result; compiled code has
    no such values and makes one kernel of it.
    """
    n_outputs = weight.shape[0]
    if torch.compiler.is_compiling() or n_outputs <= ROWS:
        return _dequantize(weight, dtype)
    whole = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    for start in range(0, n_outputs, ROWS):
        rows = slice(start, start + ROWS)
        whole[rows] = _dequantize(select_rows(weight, rows), dtype)
    return whole


def _dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    scales = weight.scales.float()
    if weight.zeros is None:
        full = weight.codes.float() * scales
    else:
        values = unpack_int4(weight.codes, weight.group_size).float() - 8
        grouped = values.unflatten(1, (-1, weight.group_size))
        full = (grouped * scales[..., None] + weight.zeros.float()[..., None]).flatten(1)
    full = full[:, : weight.n_inputs].to(dtype)
    if weight.order is None:
        return full
    return torch.empty_like(full).index_copy_(1, weight.order, full)


def select_rows(weight: Quantized, rows: Tensor | slice) -> Quantized:
    """The outputs `rows` of a weight, in that order."""
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return weight._replace(codes=weight.codes[rows], scales=weight.scales[rows], zeros=zeros)


def stack(parts: Sequence[Quantized]) -> Quantized | None:
    """Weights of the same inputs, one under another; None where they do not share one layout."""
    first = parts[0]
    for other in parts[1:]:
        alike = (first.bits, first.group_size, first.shape[1]) == (
            *(other.bits, other.group_size, other.shape[1]),
        )
        if not alike or not _same_order(first.order, other.order):
            return None
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return first._replace(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
