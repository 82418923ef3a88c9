"""Is the tree that the tuner chooses the fastest? A sweep of trees and chains on held-out prompts.

python bench/tuned.py --out bench/results/tuned_demo_cpu.json
python bench/tuned.py --pair golden --out bench/results/tuned_golden_cpu.json

Tunes on one window of ten Python modules each, greedily, then decodes another window of each with
plain decoding, the tuner's choice and every swept tree in one interleaved run. Speeds are those of
rounds: prefill, which no tree changes, is left out. The first run compiles for many minutes; one
that is stopped goes on from the compile cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.demo_pair import MODULES, Encoder, about, windows
from bench.environment import (
    ROOT,
    add_run,
    describe,
    device_argument,
    end_if_different,
    finish,
    say,
    significant,
    spread,
)
from fasteagle import demo
from fasteagle.assemble import DTYPES, draft_maker, find_tokenizer
from fasteagle.checkpoint import load_target
from fasteagle.commands.numbers import positive
from fasteagle.commands.tune import pair_of
from fasteagle.commands.tune_report import rounded, rows_of, table, tree_value
from fasteagle.tree import parse_tree
from fasteagle.tune import tune
from fasteagle.tuning.race import Speed, prepare, race, racer
from fasteagle.tuning.result import PLAIN, Tuning
from fasteagle.tuning.setting import Pair, Settings

GOLDEN = ROOT / "tests" / "golden" / "byte_pair"
PAIRS = {"demo": (demo.BASE, demo.HEAD), "golden": (GOLDEN / "base", GOLDEN / "eagle1")}
# Nothing of these comes from the tuner: chains, EAGLE's own trees and what a person would try.
SWEPT = {
    **{f"chain-{n}": f"chain-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8)},
    "mc_sim_7b_63": "mc_sim_7b_63",
    "pair-3": "[[0], [1], [0, 0], [0, 0, 0]]",
    "pair-5": "[[0], [1], [0, 0], [0, 1], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0]]",
    "binary-3": "[[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]",
    "wide-2": "[[0], [1], [2], [0, 0], [0, 1], [1, 0]]",
    "dynamic-8-3-2": "dynamic-8-3-2",
}


class Bytes:
    """The golden pair's alphabet: a byte is 3 more than itself, 1 begins a text."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return [1, *(byte + 3 for byte in text.encode())]


def load_pair(args: argparse.Namespace) -> tuple[Pair, Encoder]:
    """The pair that is named, and what makes token ids of text."""
    base, head = PAIRS[args.pair]
    target = load_target(base, dtype=DTYPES[args.dtype], device=args.device)
    return pair_of(target, draft_maker(head, target)), find_tokenizer(base) or Bytes()


def sweep(
    pair: Pair, choice: Tuning, prompts: list[list[int]], args: argparse.Namespace
) -> tuple[dict[str, Speed], bool]:
    """Speeds by tree on held-out prompts, and whether all wrote the same tokens."""
    trees = {name: parse_tree(SWEPT[name]) for name in args.trees}
    made = {name: tree for name, tree in trees.items() if tree != choice.best.tree}
    made["choice"] = choice.best.tree
    options = {
        "max_length": choice.max_length,
        "compiled": args.compile,
        "sampled": False,
    }
    engines = {PLAIN: racer(pair.target, None, **options)}
    for name, tree in made.items():
        engines[name] = racer(pair.target, pair.make(tree), **options)
    limits = {"max_new_tokens": args.max_new_tokens, "stop_ids": []}
    prepare(engines, prompts[0], limits, say=say)
    speeds, written = race(engines, prompts, limits, repeats=args.repeats, say=say)
    for name in trees.keys() - made.keys():
        speeds[name] = speeds["choice"]
    texts = [[result.tokens for result in found] for found in written.values()]
    return speeds, all(text == texts[0] for text in texts)


def compare(choice: Tuning, speeds: dict[str, Speed]) -> dict[str, Any]:
    """The choice against the best of the sweep and against its own prediction."""
    gains = {n: s.over(speeds[PLAIN]) for n, s in speeds.items() if n not in {"choice", PLAIN}}
    best, mine = max(gains, key=lambda name: gains[name]), speeds["choice"]
    measured, parts = choice.measured(choice.name), choice.by_parts[choice.name]
    at_its_pace = choice.plain * mine.over(speeds[PLAIN])  # the machine may be another by now
    return {
        "choice": choice.name,
        "choice_tree": tree_value(choice.best.tree),
        "choice_over_best_swept": significant(mine.over(speeds[best])),
        "best_swept": best,
        "plain_is_faster": choice.plain_is_faster,
        "predicted_over_measured": significant(choice.best.speed / measured),
        "by_parts_over_measured": significant(parts.speed / measured),
        "predicted_over_held_out": significant(choice.best.speed / at_its_pace),
        "choice_over_plain": significant(mine.over(speeds[PLAIN])),
    }


def row_of(name: str, speed: Speed, plain: Speed) -> dict[str, Any]:
    """A tree of the sweep, for the JSON."""
    return {
        "tree": SWEPT.get(name),
        "over_plain": significant(speed.over(plain)),
        "tokens_per_s": spread(speed.tokens_per_s),
        "round_ms": spread(speed.round_ms),
        "tokens_a_round": significant(speed.tokens_a_round),
    }


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    line = "{:>16} {:>8} {:>9} {:>9} {:>9} {:>8} {:>8}"
    print(line.format("held out", "x plain", "tokens/s", "min", "max", "a round", "ms"))
    rows = sorted(result["swept"].items(), key=lambda row: -row[1]["over_plain"])
    for name, row in rows:
        speed = (row["tokens_per_s"][key] for key in ("median", "min", "max"))
        cells = row["over_plain"], *speed, row["tokens_a_round"], row["round_ms"]["median"]
        print(line.format(name, *cells))
    for key in ("choice", "choice_over_best_swept", "predicted_over_measured"):
        print(f"{key}: {result[key]}")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    pair, encoder = load_pair(args)
    prompts = windows(encoder, args.prompts, part=1)
    held_out = windows(encoder, args.prompts, part=2)
    settings = Settings(
        compiled=args.compile,
        max_new_tokens=args.max_new_tokens,
        stop_ids=[],
        repeats=args.repeats,
    )
    begin = time.perf_counter()
    choice = tune(pair, prompts, settings, say=say)
    seconds = time.perf_counter() - begin
    print(table(choice))
    speeds, same = sweep(pair, choice, held_out, args)
    tuning = {"race": rounded(rows_of(choice)), "seconds": significant(seconds)}
    result = {
        "bench": "tuned",
        "pair": args.pair,
        "dtype": args.dtype,
        "compiled": args.compile,
        **about(held_out, args),
        **compare(choice, speeds),
        "identical_tokens": same and choice.same,
        "swept": {name: row_of(name, s, speeds[PLAIN]) for name, s in speeds.items()},
        "tuning": tuning,
        "verify_ms": rounded(choice.costs.verify),
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    end_if_different(args.dtype, same=result["identical_tokens"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=PAIRS, default="demo", help="golden: the byte-level pair")
    parser.add_argument("--trees", nargs="+", choices=SWEPT, default=list(SWEPT), help="to sweep")
    parser.add_argument("--device", type=device_argument, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--prompts", type=positive, choices=range(1, len(MODULES) + 1), default=10)
    add_run(parser, new_tokens=128, repeats=5)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
