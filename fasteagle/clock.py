"""How long does a call take on a device?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name")
VISIT = 0.02  # seconds of calls in a row, so that a clock's own cost does not count
LEAST_VISITS = 5


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    rounds: int,
    warm_up: int = 3,
) -> list[float]:
    """Milliseconds a call, once for each repeat of `rounds` calls in a row, after a warm-up."""
    for _ in range(warm_up):
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


def take_turns(
    calls: Mapping[Name, Callable[[], object]], device: torch.device, *, seconds: float
) -> dict[Name, float]:
    """Milliseconds a call of each, the median over visits in turn for `seconds` or a little more.

    What slows the machine for a while then slows all of them alike.
    """
    rounds = {}
    for name, call in calls.items():
        [once] = clock(call, device, repeats=1, rounds=1)
        rounds[name] = max(1, min(50, round(VISIT * 1000 / max(once, 1e-3))))
    found: dict[Name, list[float]] = {name: [] for name in calls}
    begin, visits = time.perf_counter(), 0
    while visits < LEAST_VISITS or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            found[name] += clock(call, device, repeats=1, rounds=rounds[name], warm_up=1)
        visits += 1
    return {name: statistics.median(times) for name, times in found.items()}
