"""Which tiles make our Triton kernels fastest on a shape? A handful are tried, in bounded time."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import significant
from bench.products import Product, triton
from fasteagle.clock import clock

SEARCHED_ROWS = (1, 16, 32, 64)
KINDS = (("int4.g32", 4, 32), ("int4.g128", 4, 128), ("int8", 8, 32))
SHAPES = ((64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3))
SPLITS = (1, 2, 4, 8)
Rotated = Callable[[Product, Tensor], tuple[Callable[[], object], int]]


@torch.inference_mode()
def search(
    shape: tuple[int, int],
    rotated: Rotated,
    args: argparse.Namespace,
    spent: Callable[[], bool],
) -> list[dict[str, Any]]:
    """The best tiles for bfloat16 by kind of weight and rows, beside what the rule gives."""
    from triton.runtime.errors import OutOfResources

    from fasteagle.quant.triton_ops import Tiles, choose_tiles

    found = []
    for kind, bits, group in KINDS:
        copies: list[Any] = []
        for n_rows in SEARCHED_ROWS:
            rule = choose_tiles(bits, n_rows, shape[0], shape[1] * bits // 8)
            x = torch.randn(n_rows, shape[1], device=args.device).bfloat16()
            tried: dict[Tiles, float] = {}
            for tiles in (rule, *(Tiles(o, s, b, w, n) for o, b, w, n in SHAPES for s in SPLITS)):
                if spent():
                    break
                options = {"bits": bits, "group": group, "dtype": x.dtype, "tiles": tiles}
                product = triton(f"{kind} search", shape, args.device, copies=copies, **options)
                copies = product.copies
                try:
                    call, n = rotated(product, x)
                except OutOfResources:  # more shared memory than this GPU has
                    continue
                tried[tiles] = statistics.median(clock(call, args.device, repeats=3, rounds=2)) / n
            if rule in tried:
                found.append({"shape": f"{shape[0]}x{shape[1]}", "kind": kind, "rows": n_rows})
                found[-1] |= best_of(tried, rule)
    return found


def best_of(tried: dict[Any, float], rule: Any) -> dict[str, Any]:
    """The fastest tiles and the rule's, with microseconds."""
    best = min(tried, key=lambda tiles: tried[tiles])
    return {
        "rule": list(rule),
        "rule_us": significant(tried[rule] * 1000),
        "best": list(best),
        "best_us": significant(tried[best] * 1000),
        "tried": len(tried),
    }
