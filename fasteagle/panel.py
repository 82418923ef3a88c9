"""How does a product of few rows run at the speed of memory on the CPU?

    n rows  I inputs  O outputs

A library has a kernel for one row and one for many. A draft tree is in between, and there it copies
the whole weight into its own layout at every call: on a Zen 4 core six rows cost it 3.3 times one
row. So a compiled CPU engine stores a float32 weight in panels of 16 outputs, each read from front
to back, and writes the product as sums that Inductor turns into one loop: a vector of weights is
loaded once and multiplied into up to eight rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 16  # outputs of a panel: one vector of AVX-512, two of AVX2, four of NEON
ROWS = 8  # rows that share a load; their sums stay in registers


def packable(weight: Tensor) -> bool:
    """Whether a weight `[O, I]` can be stored in panels."""
    fits = weight.dim() == 2 and weight.shape[0] % WIDTH == 0
    return fits and weight.device.type == "cpu" and weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """`[O, I]` -> `[O / 16, I, 16]`."""
    return weight.unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()


def unpack(panels: Tensor) -> Tensor:
    """`[O / 16, I, 16]` -> `[O, I]`, a copy."""
    return panels.transpose(1, 2).flatten(0, 1)


def product(x: Tensor, panels: Tensor) -> Tensor:
    """x `[..., I]` times the transpose of the packed weight: `[..., O]`."""
    if not torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, unpack(panels))
    rows = x.reshape(-1, x.shape[-1])
    whole = rows.shape[0] // ROWS * ROWS
    parts = []
    if whole:
        parts.append(_together(rows[:whole].unflatten(0, (-1, ROWS)), panels))
    if whole < rows.shape[0]:
        parts.append(_together(rows[None, whole:], panels))
    y = torch.cat(parts) if len(parts) > 1 else parts[0]
    return y.view(*x.shape[:-1], -1)


def _together(x: Tensor, panels: Tensor) -> Tensor:
    """x `[n / r, r, I]` -> `[n, O]`: r sums over one walk through the panels."""
    sums = [(x[:, row, None, :, None] * panels).sum(2) for row in range(x.shape[1])]
    return torch.stack(sums, 1).flatten(2).flatten(0, 1)


def lookup(panels: Tensor, tokens: Tensor) -> Tensor:
    """Rows of the packed weight: tokens `[...]` -> `[..., I]`."""
    return panels[tokens // WIDTH, :, tokens % WIDTH]
