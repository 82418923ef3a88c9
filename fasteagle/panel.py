"""How does a product of few rows run at the speed of memory on the CPU?

    n rows  I inputs  O outputs

A library has a kernel for one row and one for many. A draft tree is in between, and there it copies
the whole weight into its own layout at every call: on a Zen 4 core six rows cost it 3.3 times one
row. So a compiled CPU engine stores a weight in panels of 16 outputs, each read from front to back,
and writes the product as sums that Inductor turns into one loop: a vector of weights is loaded once
and multiplied into up to eight rows (four with AVX2). Sums are in float32.

Most checkpoints are in 16 bits. A float32 weight whose values all fit 16 bits is stored so: the
same numbers, half the bytes to read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTH = 16  # outputs of a panel: one vector of AVX-512, two of AVX2, four of NEON
# Rows that share a load, at most: their sums stay in registers, of which AVX2 has half as many.
ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 8
STREAMS = 4  # panels that few rows walk side by side: one alone waits for memory, not for sums
LIBRARY_ROWS = 64  # from here on the library's product is worth unpacking; at 32 it is not
# Without AVX-512 the library's 16-bit products take several times as long as float32's.
SLOW_IN_SHORT = torch.backends.cpu.get_cpu_capability() in {"AVX2", "DEFAULT"}
SHORT = (torch.float16, torch.bfloat16)


def packable(weight: Tensor) -> bool:
    """Whether a weight `[O, I]` can be stored in panels."""
    fits = weight.dim() == 2 and weight.shape[0] % WIDTH == 0
    return fits and weight.device.type == "cpu" and weight.dtype in (torch.float32, *SHORT)


def pack(weight: Tensor) -> Tensor:
    """`[O, I]` -> `[O / 16, I, 16]`, in 16 bits where that changes no value."""
    return shortest(weight).unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()


def shortest(weight: Tensor) -> Tensor:
    """The weight in the first 16-bit dtype that holds all its values, or as it is."""
    for dtype in SHORT if weight.dtype == torch.float32 else ():
        if torch.equal(short := weight.to(dtype), weight):
            return short
    return weight


def unpack(panels: Tensor) -> Tensor:
    """`[O / 16, I, 16]` -> `[O, I]`, a copy."""
    return panels.transpose(1, 2).flatten(0, 1)


def product(x: Tensor, panels: Tensor) -> Tensor:
    """x `[..., I]` times the transpose of the packed weight: `[..., O]`, in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    many = rows.shape[0] >= LIBRARY_ROWS and not (SLOW_IN_SHORT and x.dtype in SHORT)
    if many or not torch.compiler.is_compiling():
        return torch.nn.functional.linear(x, unpack(panels).to(x.dtype))
    n_groups = -(-rows.shape[0] // ROWS)
    each = -(-rows.shape[0] // n_groups)  # equal groups are one loop; two loops take a third longer
    padded = torch.nn.functional.pad(rows, (0, 0, 0, n_groups * each - rows.shape[0]))
    y = _together(padded.unflatten(0, (n_groups, each)), panels)[: rows.shape[0]]
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def _together(x: Tensor, panels: Tensor) -> Tensor:
    """x `[n / r, r, I]` -> `[n, O]`: r sums over one walk through the panels."""
    x, n_rows = x.float(), x.shape[1]
    streams = math.gcd(len(panels), max(1, STREAMS // n_rows))
    sums = []
    for row in range(n_rows):
        parts = [(x[:, row, None, :, None] * part.float()).sum(2) for part in panels.chunk(streams)]
        sums.append(torch.cat(parts, 1) if streams > 1 else parts[0])
    return torch.stack(sums, 1).flatten(2).flatten(0, 1)


def lookup(panels: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the packed weight in the model's dtype: tokens `[...]` -> `[..., I]`."""
    return panels[tokens // WIDTH, :, tokens % WIDTH].to(dtype)
