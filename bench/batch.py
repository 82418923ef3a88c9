"""How many tokens a second come out of a batch? The embedded trained pair, one interleaved run.

python bench/batch.py --out bench/results/batch_demo_cpu.json
python bench/batch.py --batch_sizes 1 4 --prompts 8 --no-compile

Greedy, fp32, one thread, 64-token prompts of Python source, stop ids off. Every engine decodes the
same queue of prompts: when a text ends, the next prompt takes its row. All engines take turns in
every repeat and must return the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.demo_pair import MODULES, PROMPT_TOKENS, check_room, windows
from bench.environment import (
    add_run,
    describe,
    device_argument,
    finish,
    say,
    significant,
    spread,
)
from fasteagle import demo
from fasteagle.assemble import DTYPES, load, load_drafter
from fasteagle.commands.numbers import positive
from fasteagle.engine import Engine
from fasteagle.metrics import merge
from fasteagle.request import Generation, Request

PARTS = 5  # windows begin one to four fifths into a module
MAX_PROMPTS = len(MODULES) * (PARTS - 1)
NAMES = ("plain", "eagle")
Key = tuple[int, str]  # batch size and engine


class Run(NamedTuple):
    """One queue decoded by one engine."""

    seconds: float
    prefill_seconds: float  # in steps that feed prompts, the other rows waiting
    prefills: int
    rounds: int  # steps of all rows together
    results: list[Generation]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(result.tokens) for result in self.results) / self.seconds


def build(args: argparse.Namespace) -> dict[Key, Engine]:
    """A plain and an EAGLE engine for each batch size, all over one target."""
    loaded = load(None, "none", dtype=args.dtype, device=str(args.device))
    drafters = {"plain": None, "eagle": load_drafter(demo.HEAD, loaded.target)}
    return {
        (batch, name): Engine(
            loaded.target,
            drafters[name],
            tokenizer=loaded.tokenizer,
            batch=batch,
            compiled=args.compile,
        )
        for batch in args.batch_sizes
        for name in NAMES
    }


def decode(engine: Engine, requests: Sequence[Request]) -> Run:
    """Decode a queue, timing its steps by what came out: a first token is a prefill's, and more
    tokens of others beside it are a round's that was launched before (fasteagle.ahead).
    """
    rows = engine.rows(requests)
    begin = last = time.perf_counter()
    prefill_seconds, prefills, rounds, started, written = 0.0, 0, 0, 0, 0
    for _ in engine.decode(rows):
        now = time.perf_counter()
        before, started = started, sum(bool(row.tokens) for row in rows)
        if started > before:
            prefill_seconds += now - last
            prefills += 1
        said, written = written, sum(len(row.tokens) for row in rows)
        rounds += written - said > started - before
        last = now
    return Run(last - begin, prefill_seconds, prefills, rounds, [row.result() for row in rows])


def warm_up(engines: dict[Key, Engine], requests: list[Request], longest: int) -> dict[Key, float]:
    """Seconds until an engine has its steps; each also decodes the queue once, untimed."""
    seconds = {}
    for (batch, name), engine in engines.items():
        begin = time.perf_counter()
        engine.warm_up(longest=longest + engine.drafter.n_path + engine.drafter.n_nodes)
        seconds[batch, name] = round(time.perf_counter() - begin, 2)
        say(f"{name}, batch {batch}: steps ready in {seconds[batch, name]} s")
        decode(engine, requests)
    return seconds


def measure(
    engines: dict[Key, Engine], requests: list[Request], repeats: int
) -> dict[Key, list[Run]]:
    """Every repeat of every engine; the engines take turns."""
    runs: dict[Key, list[Run]] = {key: [] for key in engines}
    for repeat in range(repeats):
        for key, engine in engines.items():
            runs[key].append(decode(engine, requests))
        found = (f"{n} {b}: {r[-1].tokens_per_second:.0f}" for (b, n), r in runs.items())
        say(f"repeat {repeat + 1}, tokens/s: " + ", ".join(found))
    return runs


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Speed over all repeats; counts, which are the same in each."""
    last = runs[-1]
    stats = merge([result.stats for result in last.results])
    return {
        "tokens_per_s": spread([run.tokens_per_second for run in runs]),
        "prefill_share": significant(
            statistics.median(run.prefill_seconds / run.seconds for run in runs)
        ),
        "prefills": last.prefills,
        "rounds": last.rounds,
        "tokens_per_round": significant((stats.new_tokens - len(last.results)) / last.rounds)
        if last.rounds
        else 0.0,
        "accept_length": significant(stats.accept_length),
    }


def ratio(runs: list[Run], over: list[Run]) -> float:
    """How many times as fast: the median over repeats, each against the run of the same repeat."""
    pairs = zip(runs, over, strict=True)
    return significant(statistics.median(b.seconds / a.seconds for a, b in pairs))


def table(runs: dict[Key, list[Run]], sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By batch size: both engines, EAGLE over plain, and each over its own smallest batch."""
    return {
        str(batch): {
            "engines": {name: summarize(runs[batch, name]) for name in NAMES},
            "eagle_over_plain": ratio(runs[batch, "eagle"], runs[batch, "plain"]),
            **{
                f"{name}_over_batch_{sizes[0]}": ratio(runs[batch, name], runs[sizes[0], name])
                for name in NAMES
            },
        }
        for batch in sizes
    }


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    line = "{:>6} {:>10} {:>10} {:>9} {:>11} {:>11} {:>10} {:>10}"
    first = result["batch_sizes"][0]
    print(
        line.format(
            "batch", "plain", "EAGLE", "ratio", f"plain/b{first}", f"EAGLE/b{first}",
            "prefill", "prefill",
        )
    )  # fmt: skip
    for batch, row in result["batches"].items():
        engines = [row["engines"][name] for name in NAMES]
        speeds = (found["tokens_per_s"]["median"] for found in engines)
        gains = (row[f"{name}_over_batch_{first}"] for name in NAMES)
        shares = (found["prefill_share"] for found in engines)
        print(line.format(batch, *speeds, row["eagle_over_plain"], *gains, *shares))
    print(
        f"tokens/s with prefill; prefill: its share of the time, plain and EAGLE; "
        f"{result['prompts']} prompts of {PROMPT_TOKENS} tokens, {result['new_tokens']} new ones"
    )
    print(f"identical tokens: {result['identical_tokens']}")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.batch_sizes = sorted(set(args.batch_sizes))
    engines = build(args)
    one = engines[args.batch_sizes[0], "plain"]
    check_room(one.max_length, args.max_new_tokens)
    parts = (
        windows(one.tokenizer, len(MODULES), part=part, parts=PARTS) for part in range(1, PARTS)
    )
    prompts = list(itertools.chain.from_iterable(parts))[: args.prompts]
    requests = [
        one.request(tokens, max_new_tokens=args.max_new_tokens, stop_ids=[]) for tokens in prompts
    ]
    compiling = warm_up(engines, requests, PROMPT_TOKENS + args.max_new_tokens)
    runs = measure(engines, requests, args.repeats)
    tokens = {key: [r.tokens for r in found[-1].results] for key, found in runs.items()}
    result = {
        "bench": "batch",
        "dtype": args.dtype,
        "compiled": args.compile,
        "prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": args.max_new_tokens,
        "prefill_chunk": one.prefill_chunk,
        "repeats": args.repeats,
        "prompts_sha256": hashlib.sha256(str(prompts).encode()).hexdigest(),
        "batch_sizes": args.batch_sizes,
        "batches": table(runs, args.batch_sizes),
        "identical_tokens": all(found == next(iter(tokens.values())) for found in tokens.values()),
        "compile_seconds": {f"{name}_{batch}": s for (batch, name), s in compiling.items()},
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    if not result["identical_tokens"] and args.dtype == "float32":
        sys.exit("the engines disagree in fp32: a tie to the last bit, or a bug")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=device_argument, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch_sizes", nargs="+", type=positive, default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--prompts", type=positive, choices=range(1, MAX_PROMPTS + 1), default=32, metavar="N"
    )
    add_run(parser, new_tokens=128, repeats=5)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
