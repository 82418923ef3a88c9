"""How does a GPU multiply a few rows by int4 or int8 weights, each weight read once?

    M rows, 1..64  O outputs  J inputs stored  g group size  G groups of a row, J / g

Importing this makes two operators on the portable layout of layout.py, read as it is stored:

    torch.ops.fasteagle.int4_linear(x, codes, scales, zeros, bias) -> [M, O]
    torch.ops.fasteagle.int8_linear(x, codes, scales, bias) -> [M, O]

A weight is read and dequantized once a call, however many rows there are, and sums are float32.
Inputs are cut into ranges where outputs alone are too few programs to fill a GPU; their sums are
added in a fixed order, so equal calls give equal bits. Neither the ranges nor the steps within them
depend on the number of rows, so that verifying a tree sums a row as a plain step would.

torch.compile sees each operator as one opaque call, and a CUDA graph can capture it: outputs and
room for sums come from torch's allocator and nothing is tuned or read back while it runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fasteagle.quant.triton_kernels import add_ranges, int4_tile, int8_tile

MAX_ROWS = 64
ACTIVATIONS = (torch.float16, torch.bfloat16)
STEP_BYTES = 64  # of each weight's row: two sectors of memory, and whole groups of 32, 64 and 128
WANTED_PROGRAMS = 240  # three for each of an RTX 3090's 82 multiprocessors, or nearly
LEAST_STEPS = 8  # of a program: shorter ones spend their time filling the pipeline
ADDED_AT_ONCE = 512  # sums that one program of add_ranges makes


class Tiles(NamedTuple):
    """How a product is cut into programs, and what each is given."""

    outputs: int  # of O, a power of 2
    splits: int  # ranges of J
    step_bytes: int = STEP_BYTES
    warps: int = 4
    stages: int = 3  # steps whose loads are under way at once


def choose_tiles(bits: int, n_rows: int, n_outputs: int, row_bytes: int) -> Tiles:
    """The tiles for x `[M, J]` and codes `[O, row_bytes]`: a rule, so that every run is the same.

    64 outputs leave the dequantized weights and the sums in registers. With int8 and many rows,
    128 make the compiler give each warp weights of its own; with 64, two dequantize the same.
    """
    tiles, splits = triton.cdiv(n_outputs, 64), 1
    while splits * tiles < WANTED_PROGRAMS and row_bytes >= 2 * splits * LEAST_STEPS * STEP_BYTES:
        splits *= 2
    return Tiles(128 if bits == 8 and n_rows > 16 else 64, splits)


def int4_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """x `[M, J]` by the weight of codes `[O, J / 2]`, scales and zeros `[O, G]` -> `[M, O]`.

    `tiles` overrides the rule, for benchmarks that look for a better one.
    """
    check(x, codes, scales, n_stored=codes.shape[1] * 2)
    assert zeros.shape == scales.shape, f"{list(zeros.shape)} zeros, {list(scales.shape)} scales"
    assert zeros.is_contiguous(), "zeros are not contiguous"
    tiles = tiles or choose_tiles(4, x.shape[0], *codes.shape)
    group_size = x.shape[1] // scales.shape[1]
    groups = max(1, tiles.step_bytes * 2 // group_size)
    sums = new_sums(x, codes, bias, tiles)
    int4_tile[programs(codes, tiles)](
        *(x, codes, scales, zeros, sums, x.shape[0], *codes.shape),
        GROUP=group_size,
        GROUPS=groups,
        **options(x, codes, tiles),
    )
    return finish(sums, x, bias)


def int8_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """x `[M, J]` by the weight of codes `[O, J]` and scales `[O, 1]` -> `[M, O]`."""
    check(x, codes, scales, n_stored=codes.shape[1])
    tiles = tiles or choose_tiles(8, x.shape[0], *codes.shape)
    sums = new_sums(x, codes, bias, tiles)
    int8_tile[programs(codes, tiles)](
        *(x, codes, scales, sums, x.shape[0], *codes.shape), **options(x, codes, tiles)
    )
    return finish(sums, x, bias)


def check(x: Tensor, codes: Tensor, scales: Tensor, *, n_stored: int) -> None:
    """The kernels index memory by these facts."""
    assert 1 <= x.shape[0] <= MAX_ROWS, f"{x.shape[0]} rows, not 1..{MAX_ROWS}"
    assert x.shape[1] == n_stored, f"{x.shape[1]} inputs for {n_stored} stored ones"
    assert x.dtype in ACTIVATIONS, f"activations are {x.dtype}, not 16 bits"
    assert scales.shape[0] == codes.shape[0], f"{scales.shape[0]} scales, {codes.shape[0]} outputs"
    for name, tensor in (("x", x), ("codes", codes), ("scales", scales)):
        assert tensor.is_contiguous(), f"{name} is not contiguous"


def programs(codes: Tensor, tiles: Tiles) -> tuple[int, int]:
    return triton.cdiv(codes.shape[0], tiles.outputs), tiles.splits


def options(x: Tensor, codes: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "ROWS": max(16, triton.next_power_of_2(x.shape[0])),
        "OUTPUTS": tiles.outputs,
        "BYTES": tiles.step_bytes,
        "EVEN": codes.shape[1] % tiles.step_bytes == 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def new_sums(x: Tensor, codes: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Room for every range's sums `[splits, M, O]`: the output itself where nothing is to add."""
    dtype = x.dtype if tiles.splits == 1 and bias is None else torch.float32
    return x.new_empty(tiles.splits, x.shape[0], codes.shape[0], dtype=dtype)


def finish(sums: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The output `[..., M, O]` of the ranges' sums `[splits, ..., M, O]`."""
    if sums.dtype == x.dtype:
        return sums.squeeze(0)
    out = x.new_empty(sums.shape[1:])
    add_ranges[(triton.cdiv(out.numel(), ADDED_AT_ONCE),)](
        *(sums, bias, out, out.numel(), out.shape[-1]), SPLITS=sums.shape[0], BLOCK=ADDED_AT_ONCE
    )
    return out


@torch.library.custom_op("fasteagle::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None
) -> Tensor:
    with torch.cuda.device_of(x):  # Triton launches on the current device; no effect on the CPU
        return int4_product(x, codes, scales, zeros, bias)


@torch.library.custom_op("fasteagle::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.cuda.device_of(x):
        return int8_product(x, codes, scales, bias)


@int4_linear.register_fake
@int8_linear.register_fake
def like_output(x: Tensor, codes: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])
