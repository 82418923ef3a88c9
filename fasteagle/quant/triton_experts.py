"""How does a GPU multiply a few rows by the experts that they chose, each read once at most?

    n slots  M rows, 1..64  E experts  O outputs  J inputs stored  g group size  G groups of a row

Importing this makes three operators. x is `[n, M, J]`, or `[1, M, J]` for all slots; experts `[n]`
says which one each slot multiplies by, and a slot that repeats the first one is left 0, unread:

    torch.ops.fasteagle.int4_experts(x, experts, codes, scales, zeros) -> [n, M, O]
    torch.ops.fasteagle.int8_experts(x, experts, codes, scales) -> [n, M, O]
    torch.ops.fasteagle.dense_experts(x, experts, weights) -> [n, M, O]

The first two are the products of triton_ops.py, started once a slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasteagle.quant.triton_expert_kernels import (
    dense_expert_tile,
    int4_expert_tile,
    int8_expert_tile,
)
from fasteagle.quant.triton_ops import Tiles, check, choose_tiles, finish, options, programs

DENSE_STEP = 64  # inputs of a 16-bit weight's row that a step reads


def expert_product(x: Tensor, experts: Tensor, *held: Tensor, tiles: Tiles | None = None) -> Tensor:
    """x `[n or 1, M, J]` by experts `[n]` of what is held: codes, scales and zeros; codes and
    scales; or weights. Returns `[n, M, O]`.
    """
    codes, n_slots = held[0], len(experts)
    bits = {1: 16, 2: 8, 3: 4}[len(held)]
    n_inputs = codes.shape[2] * (2 if bits == 4 else 1)
    check(x[0], codes[0], codes[0] if bits == 16 else held[1][0], n_stored=n_inputs)
    assert len(x) in (1, n_slots), f"x of {len(x)} slots for {n_slots}"
    assert x.is_contiguous(), "x is not contiguous"
    for stack in held:
        assert stack.is_contiguous(), "a stack is not contiguous"
    _, n_outputs, width = codes.shape
    if tiles is None:
        tiles = choose_tiles(min(bits, 8), x.shape[1], n_outputs, width * (bits // 8 or 1))
        tiles = tiles._replace(step_bytes=DENSE_STEP) if bits == 16 else tiles
    dtype = x.dtype if tiles.splits == 1 else torch.float32
    sums = x.new_zeros(tiles.splits, n_slots, x.shape[1], n_outputs, dtype=dtype)
    stride = x.stride(0) if len(x) > 1 else 0
    constants: dict[str, Any] = options(x[0], codes[0], tiles)
    if bits == 4:
        group_size = n_inputs // held[1].shape[2]
        constants |= {"GROUP": group_size, "GROUPS": max(1, tiles.step_bytes * 2 // group_size)}
    tile = {16: dense_expert_tile, 8: int8_expert_tile, 4: int4_expert_tile}[bits]
    tile[(*programs(codes[0], tiles), n_slots)](
        *(x, experts, *held, sums, stride, x.shape[1], n_outputs, width), **constants
    )
    return finish(sums, x, None)


@torch.library.custom_op("fasteagle::int4_experts", mutates_args=())
def int4_experts(
    x: Tensor, experts: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor
) -> Tensor:
    with torch.cuda.device_of(x):  # Triton launches on the current device; no effect on the CPU
        return expert_product(x, experts, codes, scales, zeros)


@torch.library.custom_op("fasteagle::int8_experts", mutates_args=())
def int8_experts(x: Tensor, experts: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return expert_product(x, experts, codes, scales)


@torch.library.custom_op("fasteagle::dense_experts", mutates_args=())
def dense_experts(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return expert_product(x, experts, weights)


@int4_experts.register_fake
@int8_experts.register_fake
@dense_experts.register_fake
def like_output(x: Tensor, experts: Tensor, stack: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(len(experts), x.shape[1], stack.shape[1])
