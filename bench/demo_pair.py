"""How much faster is EAGLE than plain decoding on the embedded trained pair? One interleaved run.

python bench/demo_pair.py --out bench/results/demo_pair_cpu.json
python bench/demo_pair.py --device cuda --dtype float16 --repeats 9

Greedy, fp32, one thread, 64-token prompts of Python source, stop ids off. Both engines are compiled
alike, take turns on every prompt and must return the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import (
    add_run,
    describe,
    device_argument,
    end_if_different,
    finish,
    refuse,
    say,
    significant,
    spread,
)
from fasteagle import demo
from fasteagle.assemble import DTYPES, load, load_drafter
from fasteagle.commands.numbers import positive
from fasteagle.engine import Engine
from fasteagle.metrics import Stats, merge
from fasteagle.request import Generation

# One window of each; the pair was trained on the standard library, these files may be among it.
MODULES = (
    "json.decoder", "random", "textwrap", "argparse", "heapq",
    "shlex", "csv", "statistics", "tempfile", "fractions",
)  # fmt: skip
PROMPT_TOKENS = 64
TREES = {"eagle": None, "eagle_tree": "mc_sim_7b_63"}  # None: the tree beside the head, chain-3
LOOP = 8  # repeated tokens that make a loop


class Encoder(Protocol):
    """Whatever turns text into token ids, BOS first."""

    def encode(self, text: str) -> list[int]: ...


def windows(
    tokenizer: Encoder | None,
    count: int,
    *,
    part: int = 1,
    parts: int = 3,
    n_tokens: int = PROMPT_TOKENS,
) -> list[list[int]]:
    """BOS and `n_tokens` - 1 more from part / parts of the way into each module's source."""
    assert tokenizer is not None, "the embedded pair has a tokenizer"
    prompts = []
    for name in MODULES[:count]:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"no source of {name} in this Python; use a full installation")
        bos, *tokens = tokenizer.encode(Path(spec.origin).read_text(encoding="utf-8"))
        start = len(tokens) * part // parts
        prompts.append([bos, *tokens[start : start + n_tokens - 1]])
    return prompts


def about(prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """What a run decodes, for its JSON."""
    return {
        "prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "modules": list(MODULES[: args.prompts]),
        "prompts_sha256": hashlib.sha256(str(prompts).encode()).hexdigest(),
    }


def check_room(context: int, new_tokens: int) -> None:
    """End the program if the prompts leave less room in a context than is asked for."""
    room = context - PROMPT_TOKENS
    if new_tokens > room:
        refuse(f"--max_new_tokens {new_tokens}; a prompt leaves room for {room}")


def fresh_tokens(tokens: Sequence[int]) -> int:
    """How many tokens come before the output runs in a circle until its end.

    1 2 3 1 2 3 1 2 3 with LOOP = 3 in place of 8: the first 3 are fresh, the rest repeat them.
    """
    fresh = len(tokens)
    for period in range(1, len(tokens) // 2 + 1):
        start = len(tokens)
        while start > period and tokens[start - 1] == tokens[start - 1 - period]:
            start -= 1
        if len(tokens) - start >= max(period, LOOP):
            fresh = min(fresh, start)
    return fresh


def fresh_rounds(result: Generation) -> list[int]:
    """The accepted counts of the rounds that end before the text loops."""
    limit, length = fresh_tokens(result.tokens), 1  # the first token comes from prefill
    kept = []
    for accepted in result.stats.accepted:
        length += accepted + 1
        if length > limit:
            break
        kept.append(accepted)
    return kept


def build(args: argparse.Namespace) -> dict[str, Engine]:
    """Plain and EAGLE engines over one target."""
    device = str(args.device)
    plain = load(None, "none", dtype=args.dtype, device=device, compiled=args.compile)
    engines = {"plain": plain}
    for name, tree in TREES.items():
        if name in args.engines:
            drafter = load_drafter(demo.HEAD, plain.target, tree=tree)
            engines[name] = Engine(
                plain.target, drafter, tokenizer=plain.tokenizer, compiled=args.compile
            )
    return engines


def warm_up(
    engines: dict[str, Engine], prompts: list[list[int]], limits: dict[str, Any]
) -> dict[str, float]:
    """Seconds until an engine has all its steps; each also decodes every prompt once, untimed."""
    seconds = {}
    for name, engine in engines.items():
        begin = time.perf_counter()
        engine.warm_up()
        seconds[name] = round(time.perf_counter() - begin, 2)
        say(f"{name}: {len(engine.steps)} steps ready in {seconds[name]} s")
        engine.generate(prompts, **limits)
    return seconds


def run(
    engines: dict[str, Engine], prompts: list[list[int]], limits: dict[str, Any], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[Generation]]]:
    """Seconds of every repeat and the last repeat's results; the engines take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats):
        results: dict[str, list[Generation]] = {name: [] for name in engines}
        for prompt in prompts:
            for name, engine in engines.items():
                results[name] += engine.generate([prompt], **limits)
        for name, found in results.items():
            seconds[name].append(merge([r.stats for r in found]).seconds)
        say(f"repeat {repeat + 1}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()))
    return seconds, results


def summarize(results: list[Generation], seconds: list[float]) -> dict[str, Any]:
    """Speed of all repeats and acceptance, in all text and before text loops."""
    stats = merge([result.stats for result in results])
    fresh = Stats(accepted=[a for result in results for a in fresh_rounds(result)])
    return {
        "tokens_per_s": spread([stats.new_tokens / s for s in seconds]),
        "ttft_ms": significant(stats.ttft * 1000),
        "tpot_ms": significant(stats.tpot * 1000),
        "rounds": stats.rounds,
        "accept_length": significant(stats.accept_length),
        "accept_length_before_loops": significant(fresh.accept_length),
        "rounds_before_loops": fresh.rounds,
        "acceptance": [significant(share) for share in stats.acceptance],
    }


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Speed-ups over plain: the median over repeats, each against the plain run beside it."""
    return {
        f"{name}_over_plain": significant(
            statistics.median(p / s for p, s in zip(seconds["plain"], found, strict=True))
        )
        for name, found in seconds.items()
        if name != "plain"
    }


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    line = "{:>10} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8}"
    print(line.format("", "tokens/s", "min", "max", "x plain", "accept", "no loop"))
    for name, found in result["engines"].items():
        speed = found["tokens_per_s"]
        speeds = (speed[key] for key in ("median", "min", "max"))
        accept = (found[key] for key in ("accept_length", "accept_length_before_loops"))
        print(line.format(name, *speeds, result.get(f"{name}_over_plain", 1.0), *accept))
    print(f"prompts: one window each of {', '.join(result['modules'])}")
    print(f"identical tokens: {result['identical_tokens']}")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    engines = build(args)
    check_room(engines["plain"].max_length, args.max_new_tokens)
    prompts = windows(engines["plain"].tokenizer, args.prompts)
    limits = {"max_new_tokens": args.max_new_tokens, "stop_ids": []}
    compiling = warm_up(engines, prompts, limits)
    seconds, results = run(engines, prompts, limits, args.repeats)
    tokens = {name: [r.tokens for r in found] for name, found in results.items()}
    result = {
        "bench": "demo_pair",
        "dtype": args.dtype,
        "compiled": args.compile,
        **about(prompts, args),
        **compare(seconds),
        "identical_tokens": all(found == tokens["plain"] for found in tokens.values()),
        "engines": {name: summarize(results[name], seconds[name]) for name in engines},
        "prompts_that_loop": sum(fresh_tokens(t) < len(t) for t in tokens["plain"]),
        "compile_seconds": compiling,
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    end_if_different(args.dtype, same=result["identical_tokens"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=device_argument, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--engines", nargs="*", choices=TREES, default=list(TREES))
    parser.add_argument("--prompts", type=positive, choices=range(1, len(MODULES) + 1), default=10)
    add_run(parser, new_tokens=128, repeats=5)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
