"""How do codes, scales and zero points of other people's files become a `Quantized`?

    O outputs  I inputs  g group size of the file  G groups of a row

Their int4 weights are `(code - point) * scale` with codes and zero points 0..15; ours are
`(code - 8) * scale + zero`, so zero = (8 - point) * scale. Such a product of a 16-bit scale has at
most 15 bits: float32 holds every term and sum exactly, and both forms are the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasteagle.hf_config import count
from fasteagle.quant.layout import GROUP_SIZES, Quantized, pack_int4

Shape = tuple[int, ...]
HALVES = (torch.float16, torch.bfloat16)
INT32 = (torch.int32,)


class Part(NamedTuple):
    """What a file must say of one tensor."""

    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False  # the file may leave it out


def nibbles(words: Tensor) -> Tensor:
    """The codes `[..., 8 W]` uint8 in int32 words `[..., W]`, lowest four bits first.

    0x76543210 -> [0, 1, 2, 3, 4, 5, 6, 7]
    """
    octets = words.contiguous().view(torch.uint8)  # little-endian, as the files are
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def from_points(
    codes: Tensor, scales: Tensor, points: Tensor, *, group_size: int, order: Tensor | None = None
) -> Quantized:
    """Codes `[O, I]` in stored order, scales and zero points `[O, G]` -> our form.

    A group that is no size of ours becomes several of the same scale; the last one, if not full, is
    padded with codes that nothing reads: one group of 96 columns -> 3 of 32.
    """
    n_inputs = codes.shape[1]
    ours = fit_group_size(group_size) or GROUP_SIZES[0]
    padded = F.pad(codes, (0, -n_inputs % ours))
    group = torch.arange(0, padded.shape[1], ours) // group_size  # of the file, for each of ours
    zeros = (8 - points.float()) * scales.float()
    packed = pack_int4(padded, ours)
    return Quantized(4, packed, scales[:, group], zeros[:, group], n_inputs, order)


def fit_group_size(group_size: int) -> int:
    """The largest group size of ours that divides a file's; 0 if none does."""
    return max((size for size in GROUP_SIZES if group_size % size == 0), default=0)


def group_order(g_idx: Tensor, *, group_size: int, name: str) -> Tensor | None:
    """The column order that makes groups adjacent, of the group of each column, g_idx `[I]`.

    [1, 0, 1, 0] -> [1, 3, 0, 2]; None where the columns already lie so.
    """
    n_inputs = g_idx.numel()
    groups = g_idx.long()
    order = torch.argsort(groups, stable=True)
    wanted = torch.arange(n_inputs) // group_size
    if not torch.equal(groups[order], wanted):
        raise ValueError(
            f"{name} does not put {group_size} columns in every group (the last one may have "
            "fewer); the file is damaged or its group_size is wrong"
        )
    return None if torch.equal(groups, wanted) else order


def check_finite(values: Tensor, name: str) -> Tensor:
    """The same tensor; NaN or infinity in it is an error."""
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; download it, or make it, again")
    return values


def stated_group_size(config: Mapping[str, Any], *names: str) -> int | None:
    """The group size, or None for one group a row (-1)."""
    if any(config.get(name) == -1 for name in names):
        return None
    size = count(config, *names)
    if not fit_group_size(size):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group_size is {size}; expected -1 or a multiple of one of {sizes}")
    return size


def n_groups_of(shape: Shape, group_size: int | None) -> int:
    """G: groups of a row."""
    return -(-shape[1] // (group_size or shape[1]))


def fills_words(matrix: str, shape: Shape) -> tuple[int, int]:
    """`(O, I)`; both must fill whole words."""
    if shape[0] % 8 or shape[1] % 8:
        raise ValueError(f"{matrix} of shape {list(shape)} does not fill int32 words of 8 codes")
    return shape[0], shape[1]


def check_bits(config: Mapping[str, Any], *names: str, method: str) -> None:
    """ValueError unless the first of the fields that is there says 4."""
    bits = count(config, *names)
    if bits != 4:
        raise ValueError(f"{method} in {bits} bits is not supported; expected 4")
