"""What does the device do in one round: kernels, launches, copies and waits of the host?

Read from PyTorch's own profiler and its sync debug mode; all of it is None without CUDA.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROFILED_ROUNDS = 2
SYNC_WARNING = "called a synchronizing CUDA operation"
# Names of CUDA calls as they appear in traces, runtime and driver alike.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")


def count_launches(
    step: Callable[[], None], collect: Callable[[], object], *, trace: str | None = None
) -> dict[str, Any]:
    """Profile a few rounds, each followed by the host's copy of its tokens; counts are per round.

    trace: where to leave the profile, a chrome trace (compressed if it ends in .gz).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trace or f"{folder}/trace.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities):  # the first profile of a process loses events
            step()
            collect()
        with profile(activities=activities) as seen:
            for _ in range(PROFILED_ROUNDS):
                step()
                collect()
        seen.export_chrome_trace(str(path))
        return summarize(path)


def summarize(trace: Path) -> dict[str, Any]:
    """Counts a round from a chrome trace of PROFILED_ROUNDS rounds."""
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt", encoding="utf-8") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    kinds = Counter(event.get("cat") for event in events)
    calls = Counter(e["name"] for e in events if e.get("cat") in {"cuda_runtime", "cuda_driver"})
    busy = sum(e["dur"] for e in events if e.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"})
    launches = sum(n for name, n in calls.items() if "LaunchKernel" in name)
    rounds = PROFILED_ROUNDS
    return {
        "kernels": kinds["kernel"] / rounds,
        "copies": kinds["gpu_memcpy"] / rounds,
        "memsets": kinds["gpu_memset"] / rounds,
        "graph_launches": calls["cudaGraphLaunch"] / rounds,
        "kernel_launches": launches / rounds,
        "waits": sum(calls[name] for name in WAITS) / rounds,
        "device_busy_ms": round(busy / 1000 / rounds, 4),
        "longest": longest(events),
        "calls": {name: n / rounds for name, n in sorted(calls.items())},
    }


def longest(events: list[dict[str, Any]], count: int = 12) -> list[dict[str, Any]]:
    """The kernels that a round spends most time in: name, calls a round, microseconds a round."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            times.setdefault(event["name"], []).append(event["dur"])
    order = sorted(times, key=lambda name: -sum(times[name]))[:count]
    return [
        {
            "kernel": name[:80],
            "calls": len(times[name]) / PROFILED_ROUNDS,
            "us": round(sum(times[name]) / PROFILED_ROUNDS, 1),
        }
        for name in order
    ]


def count_syncs(call: Callable[[], object]) -> int:
    """How often a call makes the host wait for the device, by torch's sync debug mode."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum(SYNC_WARNING in str(warning.message) for warning in seen)
