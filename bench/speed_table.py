"""What do the runs of bench/speed.py amount to? Rates, shares of the ceiling, parts, the table.

ceiling    the bytes of weights, keys and values that a round reads, over a copy's bandwidth
host       what a round takes end to end beyond the device's own time for it
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import significant, spread
from bench.random_pair import drafted_levels, kv_bytes
from bench.speed_pair import Subject
from bench.steps import PARTS
from fasteagle.cache import bucket_of
from fasteagle.metrics import Stats, merge
from fasteagle.request import Generation


def ceiling(subject: Subject, context: int, copy: float) -> dict[str, Any]:
    """By engine: bytes of a round at `context` tokens and its milliseconds at `copy` GB/s."""
    found = {}
    for name, engine in subject.engines.items():
        slots = bucket_of(engine.buckets, context + engine.drafter.n_ahead)
        levels = drafted_levels(engine.drafter)
        weights = subject.weight.round(levels)
        read = kv_bytes(engine.builder.cache, slots)
        read += levels * kv_bytes(engine.builder.memory, slots)
        found[name] = {
            "weight_bytes": weights,
            "kv_bytes": read,
            "slots_read": slots,
            "ms": significant((weights + read) / copy / 1e6),
        }
    return found


def after_prefill(run: Sequence[Generation]) -> tuple[Stats, float]:
    """A repeat's statistics, and how many of its seconds came after first tokens."""
    merged = merge([made.stats for made in run])
    return merged, merged.seconds - sum(made.stats.ttft for made in run)


def round_ms(run: Sequence[Generation]) -> float:
    """Milliseconds of a round in a repeat's generations, the host's part included, prefill not."""
    merged, seconds = after_prefill(run)
    return 1000 * seconds / max(1, merged.rounds)


def summarize(runs: Sequence[Sequence[Generation]]) -> dict[str, Any]:
    """An engine's speed over repeats `[repeats][prompts]`, and its acceptance in the last one."""
    totals = []
    for run in runs:
        found, seconds = after_prefill(run)
        totals.append((found.new_tokens / found.seconds, (found.new_tokens - len(run)) / seconds))
    stats, _ = after_prefill(runs[-1])
    with_prefill, decoding = zip(*totals, strict=True)
    return {
        "tokens_per_s": spread(with_prefill),
        "decode_tokens_per_s": spread(decoding),
        "round_ms_with_host": spread([round_ms(run) for run in runs]),
        "rounds": stats.rounds,
        "accept_length": significant(stats.accept_length),
        "acceptance": [significant(share) for share in stats.acceptance],
    }


def compare(made: dict[str, list[list[Generation]]]) -> dict[str, Any]:
    """EAGLE over plain, medians of neighbours' ratios, and whether their tokens are the same."""
    ratios, decoding = [], []
    for plain, eagle in zip(made["plain"], made["eagle"], strict=True):
        ours, theirs = (merge([g.stats for g in run]) for run in (eagle, plain))
        ratios.append(theirs.seconds / ours.seconds)
        after = [sum(g.stats.seconds - g.stats.ttft for g in run) for run in (plain, eagle)]
        decoding.append(after[0] / after[1])
    texts = {name: [made.tokens for made in runs[-1]] for name, runs in made.items()}
    differences = [
        next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        for one, other in zip(texts["plain"], texts["eagle"], strict=True)
        if one != other
    ]
    return {
        "eagle_over_plain": significant(statistics.median(ratios)),
        "eagle_over_plain_decoding": significant(statistics.median(decoding)),
        "identical_tokens": not differences,
        "first_difference": min(differences, default=None),
    }


def where_the_time_goes(
    row: dict[str, Any],
    made: dict[str, list[list[Generation]]],
    device_ms: dict[str, list[float]],
    copy: float,
) -> None:
    """Add to a precision's row: shares of the ceiling, and the host's share of a round, which is
    what a repeat's rounds took longer than those without the host that were timed after it.
    """
    ms = row["round"]["ms"]
    for name, found in row["engines"].items():
        limit, device = row["ceiling"][name], ms[name]["median"]
        found["ceiling_tokens_per_s"] = significant(1000 * found["accept_length"] / limit["ms"])
        found["share_of_ceiling"] = significant(
            found["decode_tokens_per_s"]["median"] / found["ceiling_tokens_per_s"]
        )
        found["share_of_copy_bandwidth"] = significant(limit["weight_bytes"] / device / 1e6 / copy)
        found["device_ms"] = device
        pairs = zip(map(round_ms, made[name]), device_ms[name], strict=True)
        found["host_ms"] = significant(statistics.median(whole - ms for whole, ms in pairs))


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    pair = result["pair"] if isinstance(result["pair"], str) else " + ".join(result["pair"])
    compiled = "compiled" if result["compiled"] else "eager"
    words = f"{pair}, {result['weights']} weights, tree {result['tree']}, {compiled}"
    print(f"{words}, {acceptance(result)}")
    print(f"copy bandwidth {result['copy_gb_per_s']} GB/s; ceiling by bytes over that")
    line = "{:>9} {:>6} {:>9} {:>8} {:>8} {:>8} {:>7} {:>9} {:>9} {:>7} {:>7}"
    heads = ("", "", "GB/round", "limit/s", "tok/s", "decode/s", "x plain", "device ms", "host ms")
    print(line.format(*heads, "share", "tau"))
    for precision, row in result["precisions"].items():
        for name, found in row["engines"].items():
            limit = row["ceiling"][name]
            ratio = row["eagle_over_plain_decoding"] if name == "eagle" else 1.0
            cells = [significant((limit["weight_bytes"] + limit["kv_bytes"]) / 1e9)]
            cells += [found["ceiling_tokens_per_s"], found["tokens_per_s"]["median"]]
            cells += [found["decode_tokens_per_s"]["median"], ratio, found["device_ms"]]
            cells += [found["host_ms"], found["share_of_ceiling"], found["accept_length"]]
            print(line.format(precision, name, *cells))
    for precision, row in result["precisions"].items():
        show_round(precision, row)


def acceptance(result: dict[str, Any]) -> str:
    """How a run's acceptance came about, for its tables."""
    if result["acceptance"] == "real":
        return "real acceptance"
    return f"SIMULATED acceptance {', '.join(map(str, result['rates']))}"


def show_round(precision: str, row: dict[str, Any]) -> None:
    """A round's parts, the wait for a first token, launches and memory of one precision."""
    ms, eagle = row["round"]["ms"], row["engines"]["eagle"]
    parts = [f"{name} {ms[name]['median']}" for name in PARTS if name in ms]
    print(
        f"{precision}: round {ms['eagle']['median']} ms on the device, host {eagle['host_ms']}; "
        f"alone: {', '.join(parts) or 'not timed'}"
    )
    if parts:
        found = row["round"]
        print(
            f"  round over its parts {found['round_over_parts']}, verify over a plain step "
            f"{found['verify_over_plain']}, EAGLE gains above {found['break_even_accept_length']} "
            "tokens a round"
        )
    print(
        f"  EAGLE over plain {row['eagle_over_plain']} with prefill, "
        f"{row['eagle_over_plain_decoding']} decoding; identical tokens: {row['identical_tokens']}"
    )
    for length, times in row["ttft_ms"].items():
        print(f"  first token of {length}: " + ", ".join(f"{n} {t} ms" for n, t in times.items()))
    for name, found in (row["launches"] or {}).items():
        kept = {k: v for k, v in found.items() if k not in {"calls", "longest"}}
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in kept.items()))
    print(f"  peak memory {row['peak_memory_gib']} GiB, first runs {row['first_run_seconds']} s")
