"""How fast is decoding, plain and with EAGLE, how far from the limit, and where does the time go?

python bench/speed.py --size 7b --precisions bfloat16,int4 --device cuda
python bench/speed.py --size 1b --device cpu --tree chain-3 --draft_vocab 16384

A size gives random weights: a round takes the same time with any weights, and the acceptance is
SIMULATED (bench/simulated.py) at the EAGLE paper's rates or --accept. --size demo is the embedded
trained pair, --base and --head are folders: their acceptance is real unless --accept is given.

The ceiling comes first: what a round reads from memory over the measured bandwidth of a copy. Then
both engines decode the same prompts in turn. Greedy, stop ids off, prefill included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import simulated
from bench.clock import copy_bandwidth
from bench.environment import (
    add_run,
    describe,
    device_argument,
    end_if_different,
    finish,
    refuse,
    say,
    significant,
)
from bench.random_pair import SIZES
from bench.speed_pair import EMBEDDED, PRECISIONS, Subject, make, make_prompts, random_prompt
from bench.speed_table import ceiling, compare, show, summarize, where_the_time_goes
from bench.steps import in_turn, launches, peak_memory, prepare, split
from fasteagle.clock import synchronize
from fasteagle.commands.numbers import positive
from fasteagle.quant.layout import GROUP_SIZES
from fasteagle.request import Generation
from fasteagle.tree import parse_tree

# What a flag is when nobody says: a compiled step of a large model takes minutes on a CPU.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"context": 64, "prompts": 2, "max_new_tokens": 48, "repeats": 3, "rounds": 3},
    "cuda": {"context": 128, "prompts": 3, "max_new_tokens": 128, "repeats": 5, "rounds": 20},
}
PROMPT_LENGTHS = {"cpu": (64,), "cuda": (64, 512, 2048)}


def rehearse(subject: Subject, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Run both engines once, untimed: builds their steps, and finds what simulated drafts say."""
    engines, seconds, stable = subject.engines, {}, True
    drafter = subject.simulated
    depth = engines["eagle"].drafter.n_path
    # A last round may look further than the last token.
    limits: dict[str, Any] = {"max_new_tokens": new_tokens + depth, "stop_ids": []}
    begin = time.perf_counter()
    texts = [made.tokens for made in engines["plain"].generate(prompts, **limits)]
    seconds["plain"], begin = time.perf_counter() - begin, time.perf_counter()
    plans = []
    if drafter is None:
        engines["eagle"].generate(prompts, **limits)
    else:
        drawn = simulated.fair_draw(drafter.rates, depth - 1, prompts, new_tokens)
        for prompt, text, right in zip(prompts, texts, drawn, strict=True):
            known, same = simulated.rehearse(engines["eagle"], prompt, text, right, limits)
            plans.append((len(prompt), known, right))
            stable &= same
    seconds["eagle"] = time.perf_counter() - begin
    for name, found in seconds.items():
        say(f"{name}: built and run once in {found:.1f} s")
    first = {name: round(found, 2) for name, found in seconds.items()}
    return {"first_run_seconds": first, "plans": plans, "stable": stable}


def take_turns(
    subject: Subject, prompts: list[list[int]], plans: list[Any], args: argparse.Namespace
) -> tuple[dict[str, list[list[Generation]]], dict[str, list[float]]]:
    """Generations by engine, repeat and prompt, and by engine and repeat the milliseconds of a
    round without the host, timed in the same minute. The engines take turns on every prompt.
    """
    limits: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "stop_ids": []}
    found: dict[str, list[list[Generation]]] = {name: [] for name in subject.engines}
    device_ms: dict[str, list[float]] = {name: [] for name in subject.engines}
    for repeat in range(args.repeats):
        for made in found.values():
            made.append([])
        for at, prompt in enumerate(prompts):
            if subject.simulated is not None:
                subject.simulated.load(*plans[at])
            for name, engine in subject.engines.items():
                found[name][-1] += engine.generate([prompt], **limits)
        times = {name: sum(g.stats.seconds for g in made[-1]) for name, made in found.items()}
        say(f"repeat {repeat + 1}: " + ", ".join(f"{n} {s:.2f} s" for n, s in times.items()))
        steps = {n: prepare(e, middle(args))[0] for n, e in subject.engines.items()}
        for name, ms in in_turn(steps, args.device, repeats=1, rounds=args.rounds).items():
            device_ms[name] += ms
    return found, device_ms


def middle(args: argparse.Namespace) -> int:
    """Tokens in the caches when half of a text is written."""
    return int(args.context + args.max_new_tokens // 2)


def first_tokens(
    subject: Subject, made: dict[str, list[list[Generation]]], args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds to the first token by prompt length and engine, medians.

    Those of prompts as long as --context are known from the runs `made`.
    """
    known = {n: [g.stats.ttft * 1000 for run in runs for g in run] for n, runs in made.items()}
    found: dict[str, Any] = {}
    size = subject.engines["plain"].target.config.vocab_size
    for length in args.prompt_lengths:
        if length == args.context:
            found[str(length)] = {n: significant(statistics.median(t)) for n, t in known.items()}
            continue
        prompt, times = random_prompt(size, length, 0), {name: [] for name in subject.engines}
        for repeat in range(args.repeats + 1):  # the first builds steps
            for name, engine in subject.engines.items():
                [one] = engine.generate([prompt], max_new_tokens=1, stop_ids=[])
                if repeat:
                    times[name].append(one.stats.ttft * 1000)
        found[str(length)] = {n: significant(statistics.median(t)) for n, t in times.items()}
        say(f"ttft of {length} tokens: {found[str(length)]}")
    return found


def measure(precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one precision."""
    say(f"{precision}: making the pair")
    subject = make(precision, args)
    prompts = make_prompts(args)
    row = {"ceiling": ceiling(subject, middle(args), args.copy)}
    first = rehearse(subject, prompts, args.max_new_tokens)
    made, device_ms = take_turns(subject, prompts, first["plans"], args)
    drafter, eagle = subject.simulated, subject.engines["eagle"].drafter
    row["engines"] = {name: summarize(found) for name, found in made.items()}
    row |= compare(made)
    timing = {"parts": args.parts, "repeats": args.repeats, "rounds": args.rounds}
    row["round"] = split(subject.engines, middle(args), **timing)
    where_the_time_goes(row, made, device_ms, args.copy)
    row["ttft_ms"] = first_tokens(subject, made, args)
    row["launches"] = launches(subject.engines, middle(args), trace=args.trace)
    return row | {
        "draft": eagle.words,
        "nodes": eagle.n_nodes,
        "expected_accept_length": drafter and significant(drafter.expected_accept_length),
        "known_text_is_stable": first["stable"],
        "first_run_seconds": first["first_run_seconds"],
        "peak_memory_gib": peak_memory(args.device),
    }


def forget(device: torch.device) -> None:
    """Give a precision's memory and graphs back before the next."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.copy = copy_bandwidth(args.device, args.repeats)
    say(f"copy bandwidth {args.copy:.1f} GB/s")
    rows = {}
    for precision in args.precisions:
        rows[precision] = measure(precision, args)
        forget(args.device)
    result = {
        "bench": "speed",
        "pair": args.pair,
        "weights": "random" if args.base is None else "trained",
        "acceptance": "simulated" if args.accept else "real",
        "rates": args.accept,
        "tree": args.tree or "the head's own",
        "draft_vocab": args.draft_vocab,
        "compiled": args.compile,
        "context": args.context,
        "prompts": args.prompts,
        "new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "copy_gb_per_s": significant(args.copy),
        "precisions": rows,
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    for precision, row in rows.items():
        end_if_different(precision, same=row["identical_tokens"])


def comma_list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A type for argparse: `a,b` as a list of what `kind` makes of each."""

    def parsed(text: str) -> list[Any]:
        return [kind(word) for word in text.split(",")]

    return parsed


def precision_name(text: str) -> str:
    if text not in PRECISIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no precision; give some of {', '.join(PRECISIONS)}, commas between"
        )
    return text


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is measured, and where."""
    parser.add_argument("--size", choices=SIZES, help="random weights, except demo (default: demo)")
    parser.add_argument("--base", help="folder of a target")
    parser.add_argument("--head", help="folder of its EAGLE head")
    parser.add_argument(
        "--precisions",
        type=comma_list(precision_name),
        help=f"some of {', '.join(PRECISIONS)}; default: bfloat16, but float32 for demo and tiny",
    )
    parser.add_argument("--groupsize", type=int, choices=GROUP_SIZES, default=32, help="of int4")
    parser.add_argument(
        "--tree", help="default: the head's own; random weights: mc_sim_7b_63, on a CPU chain-3"
    )
    parser.add_argument("--draft_vocab", help="tokens to guess among: a number, or a head's file")
    parser.add_argument(
        "--accept", type=simulated.parse_rates, help="SIMULATED acceptance rates by depth: a1,a2,.."
    )
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--context", type=positive, help="tokens of a prompt")
    parser.add_argument("--prompts", type=positive)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_pair(parser)
    parser.add_argument(
        "--prompt_lengths", type=comma_list(positive), help="whose first token is waited for"
    )
    parser.add_argument("--rounds", type=positive, help="rounds timed together")
    parser.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the parts of a round alone: a step more to compile for each",
    )
    parser.add_argument("--trace", help="write a profile of two rounds there (CUDA; .json.gz)")
    add_run(parser, new_tokens=None, repeats=None)
    args = parser.parse_args()
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """End the program unless the flags fit each other; fill in what was not given."""
    if (args.base is None) != (args.head is None):
        refuse("--base and --head make a pair; give both, or a --size")
    if args.base and args.size:
        refuse("--size and --base are two ways to name a pair; give one of them")
    args.size = None if args.base else args.size or EMBEDDED
    args.pair = args.size or [Path(args.base).name, Path(args.head).name]
    try:
        parse_tree(args.tree or "chain-1")
    except ValueError as error:
        refuse(str(error))
    small = args.size in (EMBEDDED, "tiny")
    if args.size == EMBEDDED:
        from fasteagle import demo

        args.base, args.head = str(demo.BASE), str(demo.HEAD)
    args.precisions = args.precisions or ["float32" if small else "bfloat16"]
    for name, value in DEFAULTS[args.device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.prompt_lengths = args.prompt_lengths or PROMPT_LENGTHS[args.device.type]
    if args.base is None:
        args.accept = args.accept or simulated.PAPER
        args.tree = args.tree or ("chain-3" if args.device.type == "cpu" else "mc_sim_7b_63")


if __name__ == "__main__":
    main(parse())
