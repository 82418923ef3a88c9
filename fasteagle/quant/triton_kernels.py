"""What does one program of a quantized product do? The kernels that triton_ops.py starts.

    M rows of x  O outputs  J inputs stored  B bytes of a weight's row
    g group size  G groups of a row, J / g

A program has a tile of OUTPUTS outputs, all M rows (padded to ROWS) and one range of the inputs,
which it walks in steps of BYTES bytes of each of its outputs' weights. The weight is the first
operand of the product, because the compiler then dequantizes it in the registers that the tensor
cores read; as the second it would be written to shared memory and read back.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def int4_tile(
    x,  # [M, J] float16 or bfloat16
    codes,  # [O, B] uint8, B = J / 2
    scales,  # [O, G] floating
    zeros,  # [O, G] floating
    sums,  # [splits, M, O] floating
    n_rows,
    n_outputs,
    row_bytes,
    GROUP: constexpr,  # g
    GROUPS: constexpr,  # those that a step reads, or 1 where it reads a part of one
    ROWS: constexpr,
    OUTPUTS: constexpr,
    BYTES: constexpr,
    EVEN: constexpr,  # whole steps fill a row: nothing to mask
):
    """Sums over one range of inputs: byte j of a group meets columns j and j + g / 2."""
    outputs, held = tile_outputs(n_outputs, OUTPUTS)
    rows, local = tl.arange(0, ROWS)[None, :], tl.arange(0, BYTES)
    half: constexpr = GROUP // 2
    # Written as a product, it tells the compiler that several groups can be read at once.
    n_groups = row_bytes // BYTES * GROUPS if EVEN and GROUPS > 1 else row_bytes // half
    x += rows * (row_bytes * 2) + (local // half * GROUP + local % half)[:, None]
    codes += held[:, None] * row_bytes + local[None, :]
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    first, last = step_range(row_bytes, BYTES)
    for step in range(first, last):
        start = step * BYTES
        column = start // half * GROUP + start % half
        groups = start // half + tl.arange(0, GROUPS)
        packed, known = load_codes(codes + start, start + local, rows < n_rows, row_bytes, EVEN)
        if not EVEN:
            groups = tl.minimum(groups, n_groups - 1)
        x_low, x_high = tl.load(x + column, known, 0.0), tl.load(x + (column + half), known, 0.0)
        group_at = held[:, None] * n_groups + groups[None, :]
        scale, zero = tl.load(scales + group_at), tl.load(zeros + group_at)
        low, high = dequantized(packed.reshape(OUTPUTS, GROUPS, BYTES // GROUPS), scale, zero)
        acc = tl.dot(low.reshape(OUTPUTS, BYTES).to(x_low.dtype), x_low, acc)
        acc = tl.dot(high.reshape(OUTPUTS, BYTES).to(x_low.dtype), x_high, acc)
    store_tile(sums, acc, rows, outputs, n_rows, n_outputs)


@triton.jit
def dequantized(packed, scale, zero):
    """Bytes `[OUTPUTS, GROUPS, bytes of a group]` -> the weights of low codes and of high ones."""
    bits, scale, zero = packed.to(tl.int32), scale.to(tl.float32), zero.to(tl.float32)
    low = beyond_two_to_23(bits & 15)
    high = beyond_two_to_23(bits) - low  # 16 times the code
    low = (low - 8388616) * scale[:, :, None] + zero[:, :, None]  # 2 ** 23 + 8
    return low, high * (scale * 0.0625)[:, :, None] + (zero - 8 * scale)[:, :, None]


@triton.jit
def int8_tile(
    x,  # [M, J] float16 or bfloat16
    codes,  # [O, B] int8, B = J
    scales,  # [O, 1] floating
    sums,  # [splits, M, O] floating
    n_rows,
    n_outputs,
    row_bytes,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    BYTES: constexpr,
    EVEN: constexpr,
):
    """Sums over one range of inputs; 16 bits hold a code exactly, so the scale comes last."""
    outputs, held = tile_outputs(n_outputs, OUTPUTS)
    rows, local = tl.arange(0, ROWS)[None, :], tl.arange(0, BYTES)
    x += rows * row_bytes + local[:, None]
    codes += held[:, None] * row_bytes + local[None, :]
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    first, last = step_range(row_bytes, BYTES)
    for step in range(first, last):
        start = step * BYTES
        packed, known = load_codes(codes + start, start + local, rows < n_rows, row_bytes, EVEN)
        x_part = tl.load(x + start, known, 0.0)
        bits = packed.to(tl.uint8, bitcast=True).to(tl.int32)
        # The flipped sign bit makes it 2 ** 23 + 128 + code, in one instruction with the exponent.
        weight = (bits ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736
        acc = tl.dot(weight.to(x_part.dtype), x_part, acc)
    acc *= tl.load(scales + held).to(tl.float32)[:, None]
    store_tile(sums, acc, rows, outputs, n_rows, n_outputs)


@triton.jit
def beyond_two_to_23(bits):
    """2 ** 23 + bits in float32, exact below 2 ** 23: converting takes four times as long."""
    return (bits | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def tile_outputs(n_outputs, OUTPUTS: constexpr):
    """This program's outputs, and which weights to read for them: past the end, some again."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    return outputs, (outputs % n_outputs).to(tl.int64)


@triton.jit
def step_range(row_bytes, BYTES: constexpr):
    """The first step of this program's range of inputs, and the one after its last."""
    n_steps = tl.cdiv(row_bytes, BYTES)
    share = tl.cdiv(n_steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, n_steps)


@triton.jit
def load_codes(codes_at, at, known, row_bytes, EVEN: constexpr):
    """A step's codes `[OUTPUTS, BYTES]`, and `known` rows of x without inputs past the end."""
    if EVEN:
        packed = tl.load(codes_at)
    else:
        packed = tl.load(codes_at, (at < row_bytes)[None, :], 0)
        known = known & (at < row_bytes)[:, None]
    return packed, known


@triton.jit
def store_tile(sums, acc, rows, outputs, n_rows, n_outputs):
    """acc `[OUTPUTS, ROWS]` to this range's part of sums `[splits, M, O]`.

    Where a third number of programs is one of slots (triton_experts.py), a range has all of them.
    """
    sums += tl.program_id(1) * tl.num_programs(2) * n_rows * n_outputs
    known = (rows < n_rows) & (outputs[:, None] < n_outputs)
    tl.store(sums + rows * n_outputs + outputs[:, None], acc, known)


@triton.jit
def add_ranges(
    sums,  # [splits, M, O] float32
    bias,  # [O] floating, or None
    out,  # [M, O] float16 or bfloat16
    n_sums,  # M * O
    n_outputs,
    SPLITS: constexpr,
    BLOCK: constexpr,
):
    """out = the sums of all ranges, added in their order, and the bias."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < n_sums
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(sums + part * n_sums + at, known, 0.0)
    if bias is not None:
        total += tl.load(bias + at % n_outputs, known, 0.0).to(tl.float32)
    tl.store(out + at, total, known)
