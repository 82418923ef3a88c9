"""How long does a step take, what are its parts, and what does the device do in it?

For the benches that time steps. Caches hold noise, never zeros, and every row stays at one length.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import refuse, say, significant, spread
from bench.launches import count_launches, count_syncs
from fasteagle.cache import KVCache, bucket_of
from fasteagle.clock import clock, synchronize
from fasteagle.compile import Step
from fasteagle.engine import Engine
from fasteagle.parts import separate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("draft", "verify", "settle")


@torch.inference_mode()
def prepare(engine: Engine, context: int) -> tuple[Step, int]:
    """The round at `context` tokens and the slots it reads; the caches hold noise, not zeros.

    No row is active, so `length` stays where it is and every round does the same work.
    """
    n_slots = bucket_of(engine.buckets, context + engine.drafter.n_ahead)
    for cache in (engine.builder.cache, engine.builder.memory):
        if isinstance(cache, KVCache):
            cache.k.normal_()
            cache.v.normal_()
    engine.state.active.zero_()
    engine.state.length.fill_(context)
    key = ("round", n_slots, False)
    if key not in engine.steps:
        engine.steps[key] = engine.builder.build(*key, engine.compiler)
    return engine.steps[key], n_slots


def warm_up(engines: dict[str, Engine], longest: int, device: torch.device) -> dict[str, float]:
    """Seconds until every step of the shortest bucket is built (a warm compile cache helps)."""
    seconds = {}
    for name, engine in engines.items():
        begin = time.perf_counter()
        engine.warm_up(longest=longest)
        synchronize(device)
        seconds[name] = round(time.perf_counter() - begin, 2)
        say(f"{name}: steps ready in {seconds[name]} s")
    return seconds


@torch.inference_mode()
def in_turn(
    steps: dict[str, Step], device: torch.device, *, repeats: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every step, `repeats` of each, taken in turn; `rounds` calls in a timing."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name] += clock(step, device, repeats=1, rounds=rounds)
    return times


@torch.inference_mode()
def split(
    engines: dict[str, Engine], context: int, *, parts: bool, repeats: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a plain step, of a whole round and, if wanted, of each part of it alone."""
    steps = {name: prepare(engine, context)[0] for name, engine in engines.items()}
    eagle = engines["eagle"]
    if parts:
        _, n_slots = prepare(eagle, context)
        steps |= separate(eagle, n_slots, PARTS)
    times = in_turn(steps, eagle.target.device, repeats=repeats, rounds=rounds)
    ms = {name: statistics.median(found) for name, found in times.items()}
    found: dict[str, Any] = {
        "context": context,
        "ms": {name: spread(values) for name, values in times.items()},
        "break_even_accept_length": significant(ms["eagle"] / ms["plain"]),
    }
    if parts:
        found["round_over_parts"] = significant(ms["eagle"] / sum(ms[name] for name in PARTS))
        found["verify_over_plain"] = significant(ms["verify"] / ms["plain"])
    return found


@torch.inference_mode()
def launches(engines: dict[str, Engine], context: int, *, trace: str | None = None) -> Any:
    """Kernels, launches and waits of a round; None without CUDA, which has no launches.

    trace: where to leave a profile of EAGLE's rounds.
    """
    if engines["plain"].target.device.type != "cuda":
        return None
    found = {}
    for name, engine in engines.items():
        step, _ = prepare(engine, context)
        collect = engine.state.emitted.tolist
        found[name] = count_launches(step, collect, trace=trace if name == "eagle" else None)
        found[name]["blocking_syncs_in_step"] = count_syncs(step)
        found[name]["blocking_syncs_to_collect"] = count_syncs(collect)
    return found


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident on the CPU since the process began."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def round_to_bits(model: nn.Module, bits: int, group_size: int, device: torch.device) -> None:
    """Quantize a model where it is; memory and its peak are then those of what is left."""
    from fasteagle.fill import quantize_  # needs safetensors, the rest of this file does not

    try:
        quantize_(model, bits=bits, group_size=group_size, keep_dense=device.type == "cpu")
    except ValueError as error:
        refuse(str(error))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
