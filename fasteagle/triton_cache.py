"""How are the accepted rows of all layers brought together at once on a GPU?

    L layers  B batch  G kv heads  P longest path  T cache slots  D head dim

A program has some columns of one head of one layer, keys and values: it reads all P rows before it
writes the first, so source and target may overlap and no other program touches either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

HELD = 4096  # elements that a program holds of keys, and as many of values


def move_rows(k: Tensor, v: Tensor, start: Tensor, path: Tensor) -> None:
    """Copy slots `start + path` of k, v `[L, B, G, T, D]` to `start ..`, for path `[B, P]`.

    start is `[B]`. Slots past the end are the last one, as source and as target, where any of the
    rows may land.
    """
    layers, batch, heads, n_slots, dim = k.shape
    assert k.is_contiguous(), "keys are not contiguous"
    assert v.is_contiguous(), "values are not contiguous"
    assert k.shape == v.shape, f"{list(k.shape)} keys, {list(v.shape)} values"
    n_path = path.shape[1]
    rows = triton.next_power_of_2(n_path)
    columns = min(triton.next_power_of_2(dim), max(16, HELD // rows))
    with torch.cuda.device_of(k):
        move_path[(layers * batch * heads, triton.cdiv(dim, columns))](
            *(k, v, start, path, batch, heads, n_path, n_slots, dim),
            *(start.stride(0), *path.stride()),
            ROWS=rows,
            COLUMNS=columns,
        )


@triton.jit
def move_path(
    k,  # [L, B, G, T, D]
    v,
    start,  # [B] int64
    path,  # [B, P] int64
    batch,
    heads,
    n_path,
    n_slots,
    dim,
    start_batch,
    path_batch,
    path_row,
    ROWS: constexpr,  # P padded to a power of 2
    COLUMNS: constexpr,
):
    """Some columns of the P rows of one head of one layer."""
    place = tl.program_id(0).to(tl.int64)
    row = place // heads % batch
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(start + row * start_batch)
    nodes = tl.load(path + row * path_batch + rows * path_row, rows < n_path, 0)
    source = tl.minimum(begin + nodes, n_slots - 1)
    target = tl.minimum(begin + rows, n_slots - 1)
    known = (rows < n_path)[:, None] & (columns < dim)[None, :]
    at = place * n_slots * dim + columns[None, :]
    read, written = at + source[:, None] * dim, at + target[:, None] * dim
    keys, values = tl.load(k + read, known), tl.load(v + read, known)
    tl.debug_barrier()  # all threads have read before the first one writes
    tl.store(k + written, keys, known)
    tl.store(v + written, values, known)
