"""How long does one round take, and where does the time go? Random weights of a named size.

python bench/rounds.py --size 7b --dtype bfloat16 --device cuda
python bench/rounds.py --size tiny --device cpu --no-compile

A round's time does not depend on what the weights are, so nothing is downloaded. How many tokens a
round yields does: no acceptance is measured here, and the table names the one that breaks even.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock import clock, copy_bandwidth, synchronize
from bench.environment import (
    add_run,
    describe,
    device_argument,
    finish,
    say,
    significant,
    spread,
)
from bench.launches import count_launches, count_syncs
from bench.parts import separate
from bench.random_pair import SIZES, Pair, Weight, drafted_levels, kv_bytes, random_pair, weigh
from fasteagle.cache import KVCache
from fasteagle.commands.numbers import positive
from fasteagle.compile import Step
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.quant.layout import GROUP_SIZES
from fasteagle.tree import parse_tree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LENGTH = 2048  # room in the caches, as for a chat


@torch.inference_mode()
def prepare(engine: Engine, context: int) -> tuple[Step, int]:
    """The round at `context` tokens and the slots it reads; the caches hold noise, not zeros.

    No row is active, so `length` stays where it is and every round does the same work.
    """
    n_slots = next(n for n in engine.buckets if n >= context + engine.drafter.n_ahead)
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


def build(pair: Pair, tree: str, *, compiled: bool) -> dict[str, Engine]:
    drafter = EagleDrafter(pair.head, pair.target, parse_tree(tree))
    options = {"max_length": MAX_LENGTH, "compiled": compiled}
    return {
        "plain": Engine(pair.target, **options),
        "eagle": Engine(pair.target, drafter, **options),
    }


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
def measure(
    engines: dict[str, Engine], context: int, weight: Weight, args: argparse.Namespace
) -> dict[str, Any]:
    """Plain step and EAGLE round at one context, timed in turn, against the copy ceiling."""
    device, row = args.device, {"context": context}
    steps = {name: prepare(engine, context) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, (step, _) in steps.items():
            times[name] += clock(step, device, repeats=1, rounds=args.rounds)
    for name, (_, n_slots) in steps.items():
        engine = engines[name]
        levels = drafted_levels(engine.drafter)
        streamed = weight.round(levels)
        read = kv_bytes(engine.builder.cache, n_slots)
        read += levels * kv_bytes(engine.builder.memory, n_slots)
        median = statistics.median(times[name])
        row[name] = {
            "ms": spread(times[name]),
            "slots_read": n_slots,
            "weight_bytes": streamed,
            "kv_bytes": read,
            "ceiling_ms": significant(streamed / args.copy / 1e6),
            "share_of_copy_bandwidth": significant(streamed / median / 1e6 / args.copy),
            "share_with_kv": significant((streamed + read) / median / 1e6 / args.copy),
        }
    plain, eagle = (statistics.median(times[name]) for name in ("plain", "eagle"))
    row["break_even_accept_length"] = significant(eagle / plain)
    say(f"context {context}: plain {plain:.3f} ms, round {eagle:.3f} ms")
    return row


@torch.inference_mode()
def measure_parts(
    engines: dict[str, Engine], context: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Every part of the round alone, in turn with the whole round and a plain step."""
    steps = {name: prepare(engine, context)[0] for name, engine in engines.items()}
    _, n_slots = prepare(engines["eagle"], context)
    steps |= separate(engines["eagle"], n_slots)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name] += clock(step, args.device, repeats=1, rounds=args.rounds)
    ms = {name: statistics.median(found) for name, found in times.items()}
    return {
        "ms": {name: spread(found) for name, found in times.items()},
        "round_over_parts": significant(ms["eagle"] / (ms["verify"] + ms["settle"] + ms["draft"])),
        "verify_over_plain": significant(ms["verify"] / ms["plain"]),
    }


@torch.inference_mode()
def launches(engines: dict[str, Engine], context: int, args: argparse.Namespace) -> Any:
    """Kernels, launches and waits of a round; None without CUDA, which has no launches."""
    if args.device.type != "cuda":
        return None
    found = {}
    for name, engine in engines.items():
        step, _ = prepare(engine, context)
        trace = args.trace if name == "eagle" else None
        found[name] = count_launches(step, engine.state.emitted.tolist, trace=trace)
        found[name]["blocking_syncs_in_step"] = count_syncs(step)
        found[name]["blocking_syncs_to_collect"] = count_syncs(engine.state.emitted.tolist)
    return found


def decode(
    pair: Pair, engines: dict[str, Engine], context: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Whole greedy requests: host included, and the same tokens from every engine."""
    prompt = torch.randint(
        pair.target.config.vocab_size, (context,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    options = {"max_new_tokens": args.max_new_tokens, "stop_ids": []}
    eager = Engine(pair.target, max_length=MAX_LENGTH)
    wanted = eager.generate([prompt], **options)[0].tokens
    found: dict[str, Any] = {"new_tokens": len(wanted)}
    for name, engine in engines.items():
        runs = [engine.generate([prompt], **options)[0] for _ in range(3)]
        times = [(r.stats.seconds - r.stats.ttft) * 1000 / r.stats.rounds for r in runs]
        differs = [i for i, (a, b) in enumerate(zip(runs[0].tokens, wanted, strict=True)) if a != b]
        found[name] = {
            "ms_a_round_with_host": spread(times),
            "ttft_ms": spread([r.stats.ttft * 1000 for r in runs]),
            "same_tokens_as_eager": not differs,
            "first_difference": differs[0] if differs else None,
        }
    return found


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident on the CPU (there with the copies' 0.5 GiB)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    label = "{size} {dtype}, quantized {quantized}, tree {tree}, compiled {compiled}: "
    print(label.format(**result) + "RANDOM WEIGHTS, no acceptance")
    plain = result["contexts"][0]["plain"]
    print(
        f"copy {result['copy_gb_per_s']:.1f} GB/s; {plain['weight_bytes'] / 1e9:.4g} GB a plain "
        f"step, at best {1000 / plain['ceiling_ms']:.4g} tokens/s"
    )
    print(f"{'context':>7} {'step':>6} {'ms':>9} {'min':>9} {'max':>9} {'MBU':>6} {'+KV':>6}")
    for row in result["contexts"]:
        for name in ("plain", "eagle"):
            ms = row[name]["ms"]
            print(
                f"{row['context']:>7} {name:>6} {ms['median']:>9.4g} {ms['min']:>9.4g} "
                f"{ms['max']:>9.4g} {row[name]['share_of_copy_bandwidth']:>6.3f} "
                f"{row[name]['share_with_kv']:>6.3f}"
            )
        print(f"{'':>7} EAGLE gains above {row['break_even_accept_length']} tokens a round")
        if "parts" in row:
            parts = ", ".join(f"{k} {v['median']:.4g}" for k, v in row["parts"]["ms"].items())
            print(f"{'':>7} alone (ms): {parts}; round / parts {row['parts']['round_over_parts']}")
    for name, found in (result["launches"] or {}).items():
        line = ", ".join(
            f"{key} {value}" for key, value in found.items() if key not in {"calls", "longest"}
        )
        print(f"{name}: {line}")
    for key in ("compile_seconds", "decode", "peak_memory_gib"):
        print(f"{key}: {result[key]}")


def quantize_pair(pair: Pair, args: argparse.Namespace) -> None:
    """Round both models where they are; memory and its peak are then those of what is left."""
    from fasteagle.fill import quantize_  # needs safetensors, the rest of this file does not

    bits = int(args.quantize.removeprefix("int"))
    for model in pair:
        try:
            quantize_(
                model, bits=bits, group_size=args.groupsize, keep_dense=args.device.type == "cpu"
            )
        except ValueError as error:
            sys.exit(f"error: {error}")
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    say(f"making a random {args.size} pair in {args.dtype}")
    args.copy = copy_bandwidth(args.device, args.repeats)
    pair = random_pair(args.size, dtype=DTYPES[args.dtype], device=args.device)
    if args.quantize:
        quantize_pair(pair, args)
    engines, weight = build(pair, args.tree, compiled=args.compile), weigh(pair)
    first = args.contexts[0]
    longest = first + max(engine.drafter.n_ahead for engine in engines.values())
    compiling = warm_up(engines, longest, args.device)
    rows = [measure(engines, context, weight, args) for context in args.contexts]
    rows[0]["parts"] = measure_parts(engines, first, args)
    result = {
        "bench": "rounds",
        "weights": "random; acceptance is not measured",
        "size": args.size,
        "dtype": args.dtype,
        "quantized": f"{args.quantize} g{args.groupsize}" if args.quantize else None,
        "tree": args.tree,
        "nodes": engines["eagle"].drafter.n_nodes,
        "compiled": args.compile,
        "repeats": args.repeats,
        "copy_gb_per_s": significant(args.copy),
        "plain_ceiling_tokens_per_second": significant(args.copy * 1e9 / weight.step),
        "contexts": rows,
        "launches": launches(engines, first, args),
        "decode": decode(pair, engines, first, args),
        "compile_seconds": compiling,
        "peak_memory_gib": peak_memory(args.device),
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="every matrix, and the head's")
    parser.add_argument("--groupsize", type=int, choices=GROUP_SIZES, default=32, help="of int4")
    parser.add_argument("--tree", default="mc_sim_7b_63", help="mc_sim_7b_63, chain-5, ...")
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--contexts", type=positive, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=positive, default=20, help="rounds timed together")
    parser.add_argument("--trace", help="write a profile of two rounds there (.json or .json.gz)")
    add_run(parser, new_tokens=32, repeats=7)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
