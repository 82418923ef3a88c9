"""What does one program of tree attention do? The two kernels that tree_attention.py starts.

    B batch  G kv heads  R rows of all query heads of a kv head  T cache slots  D head dim

A program has ROWS rows of one kv head and one range of its slots, which it walks in blocks with an
online softmax (arXiv 2205.14135, algorithm 1). Slots are cut into ranges because rows and heads
alone are too few programs to fill a GPU; a second kernel adds the ranges in their order, so equal
calls give equal bits.

    sums    [B * G, SPLITS, R, D] float32, of weights 2 ** (score - peak) times values
    scales  [B * G, SPLITS, 2, R] float32: the peak of the scores, and the sum of the weights

Scores are in base 2: exp2 is one instruction. Ranges without slots write nothing and are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

LOG2_E = constexpr(1.4426950408889634)


@triton.jit
def attend_range(
    q,  # [B, G, R, D]; the last dims of q, k and v are contiguous
    k, v,  # [B, G, T, D]
    bias,  # [B, 1, R, T], contiguous
    newest,  # [B] int64, the last slot that any row sees
    out,  # [B, R, G, D], written where there is one range
    sums, scales,
    heads, n_rows, n_slots,  # G, R, T
    q_batch, q_head, q_row, kv_batch, kv_head, kv_slot, newest_batch,  # strides
    scale,  # of a product of q and k, a factor log2(e) with it
    DIM: constexpr, WIDTH: constexpr,  # D, and D padded to a power of 2
    ROWS: constexpr, BLOCK: constexpr, SPLITS: constexpr,
):  # fmt: skip
    """Weights, peaks and sums of one range of slots, or the output where the range is all."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    live, share = live_slots(newest + batch * newest_batch, n_slots, BLOCK, SPLITS)
    first = tl.program_id(2) * share
    if first >= live:
        return
    rows, dims = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known = (rows < n_rows)[:, None] & (dims < DIM)[None, :]
    q += batch * q_batch + head * q_head
    queries = tl.load(q + rows[:, None] * q_row + dims[None, :], known, 0.0)
    held = batch * kv_batch + head * kv_head + dims[None, :]
    bias += batch * n_rows * n_slots
    end = tl.minimum(first + share, live)
    acc, peak, total = walk(
        *(queries, k + held, v + held, bias, rows, n_rows, first, end, n_slots, kv_slot, scale),
        *(DIM, WIDTH, ROWS, BLOCK),
    )
    if SPLITS == 1:
        store_rows(out, acc, total, batch, head, heads, rows, n_rows, DIM, WIDTH)
    else:
        part = pair * SPLITS + tl.program_id(2)
        tl.store(sums + (part * n_rows + rows[:, None]) * DIM + dims[None, :], acc, known)
        scales += part * 2 * n_rows + rows
        tl.store(scales, peak, rows < n_rows)
        tl.store(scales + n_rows, total, rows < n_rows)


@triton.jit
def walk(
    queries,  # [ROWS, WIDTH]
    k, v,  # where [1, WIDTH] of slot 0 are
    bias, rows, n_rows, first, end, n_slots, kv_slot, scale,
    DIM: constexpr, WIDTH: constexpr, ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Slots `first` to `end`: weighted values `[ROWS, WIDTH]`, peaks and weights `[ROWS]`."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, end, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        # Up to T, not to the newest slot: several slots of a row are then one load. It comes first
        # because the keys are waited for.
        known = (rows < n_rows)[:, None] & (slots < n_slots)[None, :]
        added = tl.load(bias + rows[:, None] * n_slots + slots[None, :], known, 0.0)
        there = (slots < end)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
        keys = tl.load(k + slots[:, None] * kv_slot, there, 0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale + added.to(tl.float32) * LOG2_E
        scores = tl.where((slots < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no slot yet: -inf less -inf would be NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights, kept = tl.exp2(scores - level[:, None]), tl.exp2(peak - level)
        values = tl.load(v + slots[:, None] * kv_slot, there, 0.0)
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * kept[:, None])
        peak = higher
    return acc, peak, total


@triton.jit
def add_ranges(
    sums, scales,
    newest,  # [B] int64
    out,  # [B, R, G, D]
    heads, n_rows, n_slots, newest_batch,
    DIM: constexpr, WIDTH: constexpr, ROWS: constexpr,
    BLOCK: constexpr, SPLITS: constexpr,  # as attend_range has them, which cuts the same ranges
):  # fmt: skip
    """out = the sums of all ranges, each scaled to the highest peak, over their weights."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    live, share = live_slots(newest + batch * newest_batch, n_slots, BLOCK, SPLITS)
    rows, dims = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        used = rows < tl.where(split * share < live, n_rows, 0)
        peaks = scales + (pair * SPLITS + split) * 2 * n_rows + rows
        highest = tl.maximum(highest, tl.load(peaks, used, float("-inf")))
    level = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        used = rows < tl.where(split * share < live, n_rows, 0)
        part = pair * SPLITS + split
        peaks = scales + part * 2 * n_rows + rows
        factor = tl.exp2(tl.load(peaks, used, float("-inf")) - level)
        total += factor * tl.load(peaks + n_rows, used, 0.0)
        at = (part * n_rows + rows[:, None]) * DIM + dims[None, :]
        acc += factor[:, None] * tl.load(sums + at, used[:, None] & (dims < DIM)[None, :], 0.0)
    store_rows(out, acc, total, batch, head, heads, rows, n_rows, DIM, WIDTH)


@triton.jit
def live_slots(newest, n_slots, BLOCK: constexpr, SPLITS: constexpr):
    """How many slots are read of a sequence, and how many of them each range has."""
    live = tl.minimum(tl.load(newest) + 1, n_slots).to(tl.int32)
    return live, tl.cdiv(tl.cdiv(live, BLOCK), SPLITS) * BLOCK


@triton.jit
def store_rows(out, acc, total, batch, head, heads, rows, n_rows, DIM: constexpr, WIDTH: constexpr):
    """acc `[ROWS, WIDTH]` over the weights' total `[ROWS]` to one head of out `[B, R, G, D]`."""
    dims = tl.arange(0, WIDTH)
    at = ((batch * n_rows + rows[:, None]) * heads + head) * DIM + dims[None, :]
    # A row that sees nothing has no weights; 0 is as good as any.
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    known = (rows < n_rows)[:, None] & (dims < DIM)[None, :]
    tl.store(out + at, mean.to(out.dtype.element_ty), known)
