"""Which drafter is the fastest on one base? All of them, same prompts, one interleaved run.

python bench/drafters.py --out bench/results/drafters_demo_cpu.json
python bench/drafters.py --size 7b --device cuda --dtype bfloat16

Without --size: the embedded base with its EAGLE head and the small heads of bench/heads, greedy,
three kinds of text. With --size: random weights of that size, so a round's time is measured and
what it yields is SIMULATED: the accept_length that the papers report (bench/published.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import (
    add_run,
    describe,
    device_argument,
    end_if_different,
    finish,
    significant,
    spread,
)
from bench.published import PUBLISHED
from bench.random_pair import SIZES, random_drafter, random_target
from bench.steps import DTYPES, prepare, warm_up
from fasteagle.clock import clock
from fasteagle.commands.numbers import positive
from fasteagle.draft.kinds import Options
from fasteagle.engine import Engine
from fasteagle.parts import separate
from fasteagle.tree import parse_tree

# Random weights in the papers' own settings: a row of DRAFTERS, its tree.
RANDOM: dict[str, tuple[str, str | None]] = {
    "eagle_chain": ("eagle", "chain-5"),
    "eagle_tree": ("eagle", "mc_sim_7b_63"),
    "eagle2": ("eagle", "dynamic-60-5-10"),
    "eagle3": ("eagle3", "dynamic-60-7-10"),
    "medusa": ("medusa", None),
    "standalone": ("standalone", "chain-5"),
    "lookup": ("lookup", None),
    "lookahead": ("lookahead", None),
}
TEXTS = ("code", "prose", "repeated")  # bench/draft_texts.py
CONTEXT = 384  # tokens in the caches while a round of random weights is timed
ROUNDS = 20  # in a row, a timing


def build_random(args: argparse.Namespace) -> dict[str, Engine]:
    """The same on random weights of a named size."""
    dtype = DTYPES[args.dtype]
    target = random_target(args.size, dtype=dtype, device=args.device)
    sizes = {"compiled": args.compile, "max_length": 1024}
    engines = {"plain": Engine(target, **sizes)}
    for name in args.drafters:
        kind, tree = RANDOM[name]
        options = Options(tree=parse_tree(tree) if tree else None)
        engines[name] = Engine(target, random_drafter(kind, target, options), **sizes)
    return engines


@torch.inference_mode()
def time_rounds(
    engines: dict[str, Engine], context: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a round, in turn, and the share of it that drafting alone takes."""
    steps, drafts = {}, {}
    for name, engine in engines.items():
        steps[name], n_slots = prepare(engine, context)
        if name != "plain":
            drafts[name] = separate(engine, n_slots, ["draft"])["draft"]
    times: dict[str, list[float]] = {name: [] for name in steps}
    alone: dict[str, list[float]] = {name: [] for name in drafts}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name] += clock(step, args.device, repeats=1, rounds=ROUNDS)
        for name, step in drafts.items():
            alone[name] += clock(step, args.device, repeats=1, rounds=ROUNDS)
    rows: dict[str, Any] = {}
    for name, measured in times.items():
        drafter = engines[name].drafter
        rows[name] = {
            "words": drafter.words,
            "nodes": drafter.n_nodes,
            "round_ms": spread(measured),
        }
        if name in alone:
            ms = statistics.median(measured)
            rows[name]["draft_ms"] = spread(alone[name])
            rows[name]["share_drafting"] = significant(statistics.median(alone[name]) / ms)
            plain = statistics.median(times["plain"])
            rows[name]["round_over_plain"] = significant(ms / plain)
    return rows


def simulate(rounds: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second that a round's time gives with a paper's accept_length."""
    plain, found = rounds["plain"]["round_ms"]["median"], {}
    for name, row in rounds.items():
        tau, source = PUBLISHED.get(name, (None, "not published for this target"))
        ms = row["round_ms"]["median"]
        found[name] = {"accept_length": tau, "source": source}
        if tau is not None:
            found[name]["tokens_per_s"] = significant(1000 * tau / ms)
            found[name]["over_plain"] = significant(tau * plain / ms)
    return found


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    line = "{:>12} {:>6} {:>9} {:>9} {:>8} {:>9} {:>9}"
    print(line.format("", "nodes", "round ms", "drafting", "x plain", "tokens/s", "accept"))
    for kind, found in result["texts"].items():
        print(f"{kind}:")
        for name, row in found["engines"].items():
            timed = result["rounds"][name]
            share, ratio = timed.get("share_drafting", 0.0), found.get(f"{name}_over_plain", 1.0)
            speed, tau = row["tokens_per_s"]["median"], row["accept_length"]
            ms = timed["round_ms"]["median"]
            print(line.format(name, timed["nodes"], ms, share, ratio, speed, tau))
    for name, row in result["simulated"].items():
        timed = result["rounds"][name]
        cells = (row.get(key, "-") for key in ("over_plain", "tokens_per_s"))
        share, ms = timed.get("share_drafting", 0.0), timed["round_ms"]["median"]
        tau = f"{row['accept_length']}*" if row["accept_length"] else "-"
        print(line.format(name, timed["nodes"], ms, share, *cells, tau))
    if result["simulated"]:
        print("* SIMULATED acceptance: random weights, the papers' accept_length")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    same = True
    if args.size:
        engines = build_random(args)
        compiling = warm_up(engines, CONTEXT, args.device)
    else:
        from bench import trained_drafters  # with --size, torch is all that is needed

        engines = trained_drafters.build(args)
        compiling, found, same = trained_drafters.compare_all(engines, args)
    context = CONTEXT if args.size else 128
    rounds = time_rounds(engines, context, args)
    result = {
        "bench": "drafters",
        "size": args.size or "demo",
        "dtype": args.dtype,
        "compiled": args.compile,
        "context": context,
        "prompts": args.prompts,
        "new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "identical_tokens": same,
        "rounds": rounds,
        "texts": found,
        "simulated": simulate(rounds) if args.size else {},
        "compile_seconds": compiling,
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    end_if_different(args.dtype, same=same)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="random weights; default: the embedded pair")
    parser.add_argument("--device", type=device_argument, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--drafters", nargs="*", choices=RANDOM, default=list(RANDOM))
    parser.add_argument("--texts", nargs="*", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--prompts", type=positive, default=5, help="of each kind of text")
    add_run(parser, new_tokens=96, repeats=5)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
