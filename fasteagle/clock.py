"""How long does a call take on a device?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
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
    timer: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Milliseconds a call, once for each repeat of `rounds` calls in a row, after a warm-up. timer
    tells seconds on the CPU.
    """
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(device))
            for _ in range(rounds):
                call()
            end.record(torch.cuda.current_stream(device))
            end.synchronize()
            times.append(start.elapsed_time(end) / rounds)
        else:
            begin = timer()
            for _ in range(rounds):
                call()
            times.append((timer() - begin) * 1000 / rounds)
    return times


def own_timer(device: torch.device) -> Callable[[], float]:
    """Seconds that this thread works, where it does all the work: others on a busy machine do not
    count then. Else seconds that pass.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def take_turns(
    calls: Mapping[Name, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    before: Mapping[Name, Callable[[], object]] | None = None,
) -> dict[Name, float]:
    """Milliseconds a call of each, the median over visits in turn for `seconds` or a little more.

    What slows the machine for a while then slows all of them alike. By `own_timer`. before: what
    runs, untimed, ahead of every call of a name: a call alone finds its weights in the caches.
    """
    before, timer = before or {}, own_timer(device)

    def visit(name: Name) -> Callable[[], float]:
        call, other = calls[name], before.get(name)
        [once] = clock(call, device, repeats=1, rounds=1, timer=timer)
        rounds = max(1, min(50, round(VISIT * 1000 / max(once, 1e-3))))
        if other is not None:
            return partial(clock_after, call, other, device, rounds=rounds, timer=timer)
        return lambda: clock(call, device, repeats=1, rounds=rounds, warm_up=1, timer=timer)[0]

    found = visits_in_turn({name: visit(name) for name in calls}, seconds=seconds)
    return {name: statistics.median(times) for name, times in found.items()}


def visits_in_turn(
    visits: Mapping[Name, Callable[[], float]], *, seconds: float
) -> dict[Name, list[float]]:
    """What visits return, each made in every turn, for `seconds` or a little more."""
    found: dict[Name, list[float]] = {name: [] for name in visits}
    begin, turns = time.perf_counter(), 0
    while turns < LEAST_VISITS or time.perf_counter() - begin < seconds:
        for name, visit in visits.items():
            found[name].append(visit())
        turns += 1
    return found


def clock_after(
    call: Callable[[], object],
    other: Callable[[], object],
    device: torch.device,
    *,
    rounds: int,
    timer: Callable[[], float],
) -> float:
    """Milliseconds of a call, the mean of `rounds`, each after one of `other`, which is not timed.

    On a GPU all are launched ahead, so that events stand between calls and not the host.
    """
    other()
    call()
    synchronize(device)
    if device.type != "cuda":
        seconds = 0.0
        for _ in range(rounds):
            other()
            begin = timer()
            call()
            seconds += timer() - begin
        return seconds * 1000 / rounds
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        other()
        start.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
    synchronize(device)
    return sum(start.elapsed_time(end) for start, end in events) / rounds
