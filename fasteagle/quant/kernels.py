"""Which kernel multiplies how many rows, on which device, and why?

A kernel that reads packed weights saves memory traffic but pays for unpacking at every row; a dense
product does not. So the choice is made by the number of rows x has, once, when a layer is loaded.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NamedTuple

import torch

CPU_INT4, CPU_INT8 = "int4pack (CPU)", "int8pack (CPU)"
TINYGEMM, TRITON = "tinygemm", "Triton"
DENSE = "dense"  # of a dequantized weight: a copy that is kept, or a scratch one
ANY = 1 << 62
# A CPU that multiplies bfloat16 tiles in hardware (AMX) does five dense rows as fast as one: int4
# wins up to four (measured: bench/results/kernels_cpu_intel.json). Others do not: eight, as on a
# Zen 5 core in first trials; `bench/kernels.py --device cpu` tells for yours.
CPU_ROWS, CPU_ROWS_AMX = 8, 4
# It reads the weight again for every 16 rows, and its time grows before that: on an H200, 4096 x
# 4096, it takes 0.7 of Triton's time for 4 rows, the same for 8, 1.5 times for 16 (docs/log.md).
TINYGEMM_ROWS, TINYGEMM_ROWS_ALONE = 8, 16  # with Triton to take over, and without
TRITON_ROWS = 64  # above, the product is bound by arithmetic: dense
TINYGEMM_STEP = 32  # inputs come in whole tiles: 2 inner tiles of 16
OLDEST_BF16 = (8, 0)  # compute capability that tinygemm and bfloat16 products need
OLDEST = (7, 5)  # that Triton compiles for


class Range(NamedTuple):
    """The kernel for products of up to `rows` rows, and the reason."""

    rows: int
    kernel: str
    why: str


def kernels(bits: int, *, device: torch.device, dtype: torch.dtype) -> list[Range]:
    """The kernels of a weight with `bits` bits, by ascending rows; the last takes any number.

    ValueError where this device has no kernel for such a weight in this dtype.
    """
    if device.type == "cpu":
        return _on_cpu(bits, dtype)
    return _on_cuda(bits, device, dtype)


def expert_kernels(bits: int, *, device: torch.device, dtype: torch.dtype) -> list[Range]:
    """The same for a stack of experts: tinygemm cannot be told on the device which one to read."""
    ranges = kernels(bits, device=device, dtype=dtype)
    return [limit for limit in ranges if limit.kernel != TINYGEMM]


def picks_experts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel reads 16-bit experts where they are, and only those that it is told to."""
    if device.type != "cuda" or dtype == torch.float32 or not has_triton():
        return False
    oldest = OLDEST_BF16 if dtype == torch.bfloat16 else OLDEST
    return torch.cuda.get_device_capability(device) >= oldest


def fallbacks(bits: int, *, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What is missing here, and what takes its place: sentences for the user.

    ValueError as in `kernels`, where nothing does.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return []
    if TRITON in {limit.kernel for limit in kernels(bits, device=device, dtype=dtype)}:
        return []
    return [
        f"Triton is not installed: int{bits} products of more than {TINYGEMM_ROWS_ALONE} rows "
        "dequantize the weight first, which is slow; pip install triton"
    ]


def _on_cpu(bits: int, dtype: torch.dtype) -> list[Range]:
    if dtype != torch.bfloat16:
        raise ValueError(
            f"int{bits} weights have no fast CPU kernel in {_text(dtype)}; use --dtype bfloat16, "
            "or float32, which multiplies by the dequantized weights"
        )
    rows = CPU_ROWS_AMX if has_amx() else CPU_ROWS
    kernel = CPU_INT4 if bits == 4 else CPU_INT8
    return [
        Range(rows, kernel, f"reads {bits} bits a weight, wins up to {rows} rows on this CPU"),
        Range(ANY, DENSE, "more rows are bound by arithmetic, not by reading weights"),
    ]


def _on_cuda(bits: int, device: torch.device, dtype: torch.dtype) -> list[Range]:
    ranges = []
    capability = torch.cuda.get_device_capability(device)
    if bits == 4 and dtype == torch.bfloat16 and capability >= OLDEST_BF16:
        rows = TINYGEMM_ROWS if has_triton() else TINYGEMM_ROWS_ALONE
        ranges.append(Range(rows, TINYGEMM, f"wins up to {rows} rows"))
    oldest = OLDEST_BF16 if dtype == torch.bfloat16 else OLDEST
    if has_triton() and capability >= oldest:
        ranges.append(Range(TRITON_ROWS, TRITON, "reads and unpacks each weight once a product"))
    if not ranges:
        have = "with" if has_triton() else "without"
        raise ValueError(
            f"int{bits} weights have no kernel in {_text(dtype)} on this GPU (compute capability "
            f"{capability[0]}.{capability[1]}, {have} Triton, which needs {oldest[0]}.{oldest[1]} "
            "in this dtype); install triton, try --dtype float16, or use --dtype float32, which "
            "multiplies by the dequantized weights"
        )
    return [*ranges, Range(ANY, DENSE, "more rows are bound by arithmetic: dequantized first")]


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 tiles in hardware."""
    return bool(torch.cpu._is_amx_tile_supported())


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
