"""How do trained drafters of the embedded base compare on its texts? For bench/drafters.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.demo_pair import check_room, compare, fresh_tokens, summarize, warm_up
from bench.draft_texts import texts
from bench.environment import say
from fasteagle import demo
from fasteagle.assemble import load, load_drafter
from fasteagle.draft.kinds import DRAFTERS, Options
from fasteagle.engine import Engine
from fasteagle.metrics import merge
from fasteagle.request import Generation

HEADS = Path(__file__).resolve().parent / "heads"
DYNAMIC = "dynamic-26-5-6"  # EAGLE-2's tree as large as EAGLE-1's
# Name, folder of its weights (a kind's name where it has none), tree.
TRAINED: dict[str, tuple[str | Path, str | None]] = {
    "eagle_chain": (demo.HEAD, "chain-4"),
    "eagle_tree": (demo.HEAD, "mc_sim_7b_63"),
    "eagle2": (demo.HEAD, DYNAMIC),
    "eagle3": (HEADS / "eagle3", DYNAMIC),
    "medusa": (HEADS / "medusa" / "model_int8.safetensors", None),
    "standalone": (HEADS / "standalone", "chain-4"),
    "lookup": ("lookup", None),
    "lookahead": ("lookahead", None),
}


def build(args: argparse.Namespace) -> dict[str, Engine]:
    """Plain decoding and every drafter of the embedded base."""
    plain = load(None, "none", dtype=args.dtype, device=str(args.device), compiled=args.compile)
    engines = {"plain": plain}
    for name in args.drafters:
        source, tree = TRAINED[name]
        if source in DRAFTERS:
            drafter = DRAFTERS[str(source)].drafter(None, plain.target, Options())
        else:
            drafter = load_drafter(
                source, plain.target, tree=tree, dtype=args.dtype, tokenizer=plain.tokenizer
            )
        engines[name] = Engine(
            plain.target, drafter, tokenizer=plain.tokenizer, compiled=args.compile
        )
    return engines


def compare_all(
    engines: dict[str, Engine], args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any], bool]:
    """Seconds of compiling, what each kind of text gave, and whether all engines wrote the same."""
    check_room(engines["plain"].max_length, args.max_new_tokens)
    prompts = texts(engines["plain"], args.prompts, args.texts)
    everything = [prompt for windows in prompts.values() for prompt in windows]
    limits = {"max_new_tokens": args.max_new_tokens, "stop_ids": []}
    compiling = warm_up(engines, everything, limits)
    return compiling, *run(engines, prompts, args)


def run(
    engines: dict[str, Engine], prompts: dict[str, list[list[int]]], args: argparse.Namespace
) -> tuple[dict[str, Any], bool]:
    """Every kind of text: engines take turns on each prompt; whether all wrote the same."""
    limits, found, same = {"max_new_tokens": args.max_new_tokens, "stop_ids": []}, {}, True
    for kind, windows in prompts.items():
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        results: dict[str, list[Generation]] = {}
        for _ in range(args.repeats):
            results = {name: [] for name in engines}
            for prompt in windows:
                for name, engine in engines.items():
                    results[name] += engine.generate([prompt], **limits)
            for name, made in results.items():
                seconds[name].append(merge([one.stats for one in made]).seconds)
        tokens = {name: [one.tokens for one in made] for name, made in results.items()}
        same = same and all(made == tokens["plain"] for made in tokens.values())
        loops = sum(fresh_tokens(text) < len(text) for text in tokens["plain"])
        rows = {name: summarize(results[name], seconds[name]) for name in engines}
        found[kind] = {"engines": rows, "prompts_that_loop": loops, **compare(seconds)}
        say(f"{kind}: " + ", ".join(f"{n} {r['tokens_per_s']['median']}" for n, r in rows.items()))
    return found, same
