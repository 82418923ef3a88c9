"""What does one program of a product by chosen experts do? The kernels of triton_experts.py.

    n slots  M rows of x  E experts  O outputs  J inputs stored  B bytes of a weight's row
    g group size  G groups of a row, J / g

The third number of a program is its slot. A slot that repeats the first one's expert does nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from fasteagle.quant.triton_kernels import (
    int4_tile,
    int8_tile,
    load_codes,
    step_range,
    store_tile,
    tile_outputs,
)


@triton.jit
def slot_of(experts):
    """This program's slot, its expert, and whether there is anything to do."""
    slot = tl.program_id(2)
    expert = tl.load(experts + slot)
    return slot, expert, (slot == 0) | (expert != tl.load(experts))


@triton.jit
def int4_expert_tile(
    x,  # [n, M, J] float16 or bfloat16
    experts,  # [n] int64
    codes,  # [E, O, B] uint8, B = J / 2
    scales,  # [E, O, G] floating
    zeros,  # [E, O, G] floating
    sums,  # [splits, n, M, O] floating
    x_stride,  # from slot to slot; 0 where they share x
    n_rows,
    n_outputs,
    row_bytes,
    GROUP: constexpr,
    GROUPS: constexpr,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    BYTES: constexpr,
    EVEN: constexpr,
):
    """`int4_tile` of a slot's expert."""
    slot, expert, useful = slot_of(experts)
    if useful:
        first = expert * n_outputs
        n_groups = row_bytes * 2 // GROUP
        x += slot * x_stride
        codes += first * row_bytes
        scales += first * n_groups
        zeros += first * n_groups
        sums += slot * n_rows * n_outputs
        int4_tile(
            x, codes, scales, zeros, sums, n_rows, n_outputs, row_bytes,
            GROUP, GROUPS, ROWS, OUTPUTS, BYTES, EVEN,
        )  # fmt: skip


@triton.jit
def int8_expert_tile(
    x,  # [n, M, J] float16 or bfloat16
    experts,  # [n] int64
    codes,  # [E, O, B] int8, B = J
    scales,  # [E, O, 1] floating
    sums,  # [splits, n, M, O] floating
    x_stride,
    n_rows,
    n_outputs,
    row_bytes,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    BYTES: constexpr,
    EVEN: constexpr,
):
    """`int8_tile` of a slot's expert."""
    slot, expert, useful = slot_of(experts)
    if useful:
        first = expert * n_outputs
        x += slot * x_stride
        codes += first * row_bytes
        scales += first
        sums += slot * n_rows * n_outputs
        int8_tile(x, codes, scales, sums, n_rows, n_outputs, row_bytes, ROWS, OUTPUTS, BYTES, EVEN)


@triton.jit
def dense_expert_tile(
    x,  # [n, M, J] float16 or bfloat16
    experts,  # [n] int64
    weights,  # [E, O, J] of the same dtype
    sums,  # [splits, n, M, O] floating
    x_stride,
    n_rows,
    n_outputs,
    n_inputs,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    BYTES: constexpr,  # here inputs of a step
    EVEN: constexpr,
):
    """`dense_tile` of a slot's expert."""
    slot, expert, useful = slot_of(experts)
    if useful:
        x += slot * x_stride
        weights += expert * n_outputs * n_inputs
        sums += slot * n_rows * n_outputs
        dense_tile(x, weights, sums, n_rows, n_outputs, n_inputs, ROWS, OUTPUTS, BYTES, EVEN)


@triton.jit
def dense_tile(
    x,  # [M, J] float16 or bfloat16
    weight,  # [O, J] of the same dtype
    sums,  # [splits, M, O] floating
    n_rows,
    n_outputs,
    n_inputs,
    ROWS: constexpr,
    OUTPUTS: constexpr,
    STEP: constexpr,  # inputs
    EVEN: constexpr,
):
    """Sums over one range of inputs."""
    outputs, held = tile_outputs(n_outputs, OUTPUTS)
    rows, local = tl.arange(0, ROWS)[None, :], tl.arange(0, STEP)
    x += rows * n_inputs + local[:, None]
    weight += held[:, None] * n_inputs + local[None, :]
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    first, last = step_range(n_inputs, STEP)
    for step in range(first, last):
        start = step * STEP
        part, known = load_codes(weight + start, start + local, rows < n_rows, n_inputs, EVEN)
        acc = tl.dot(part, tl.load(x + start, known, 0.0), acc)
    store_tile(sums, acc, rows, outputs, n_rows, n_outputs)
