"""How long does a call take on a device, and how fast does the device copy?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s of a large copy, bytes read and bytes written both counted: the ceiling used below."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    times = clock(lambda: target.copy_(source), device, repeats=repeats, rounds=4)
    n_bytes = 2 * source.nbytes
    if device.type == "cuda":  # these buffers are no part of the model's memory
        del source, target
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return n_bytes / statistics.median(times) / 1e6


def clock(
    call: Callable[[], object], device: torch.device, *, repeats: int, rounds: int
) -> list[float]:
    """Milliseconds a call, once for each repeat of `rounds` calls in a row, after a warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(rounds):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / rounds)
        else:
            begin = time.perf_counter()
            for _ in range(rounds):
                call()
            times.append((time.perf_counter() - begin) * 1000 / rounds)
    return times
