"""How does the cost of a step grow with context, verified rows, batch and model? Random weights.

python bench/scaling.py --device cpu --plot scaling.png
python bench/scaling.py --size 7b --sizes 1b 8b --dtype bfloat16 --device cuda --seconds 300

A plain step and an EAGLE round are timed in turn at one point, then along one axis after the other.
Along the axis of rows the tree is a root with leaves, so drafting costs one level whatever its size
and `verify` is the target's pass alone. No acceptance is measured. Eager on a CPU unless --compile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock import copy_bandwidth
from bench.environment import (
    check_plot,
    describe,
    device_argument,
    finish,
    refuse,
    say,
    significant,
    spread,
)
from bench.random_pair import SIZES, Pair, drafted_levels, kv_bytes, random_pair, weigh
from bench.steps import DTYPES, in_turn, prepare
from fasteagle.commands.numbers import positive
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.parts import separate
from fasteagle.tree import MAX_NODES, StaticTree, parse_tree, static_tree

AXES = ("context", "rows", "batch", "size")
COLOURS = {"plain": "#3b6ea5", "round": "#d98032", "verify": "#5a9367"}
# On a CPU as much as a minute allows; a GPU takes the sizes that people use.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "size": "demo",
        "sizes": ["tiny"],
        "contexts": [128, 512, 2048, 8192],
        "rows": [1, 4, 8, 16, 32, 64],
        "batches": [1, 2, 4, 8],
        "repeats": 5,
        "dtype": "float32",
    },
    "cuda": {
        "size": "7b",
        "sizes": ["1b", "8b"],
        "contexts": [128, 512, 2048, 8192],
        "rows": [1, 4, 8, 16, 26, 32, 64],
        "batches": [1, 2, 4, 8],
        "repeats": 7,
        "dtype": "bfloat16",
    },
}


class Point(NamedTuple):
    """What a step is timed at; rows None: the tree of --tree."""

    axis: str
    size: str
    context: int
    batch: int = 1
    rows: int | None = None


def points(args: argparse.Namespace) -> Iterator[Point]:
    """All points, axis by axis; each axis passes through the first one."""
    context = args.contexts[0]
    for longer in args.contexts:
        yield Point("context", args.size, longer)
    for rows in args.rows:
        yield Point("rows", args.size, context, rows=rows)
    for batch in args.batches:
        yield Point("batch", args.size, context, batch=batch)
    for size in dict.fromkeys([*args.sizes, args.size]):
        yield Point("size", size, context)


def star(rows: int) -> StaticTree:
    """A root and `rows` - 1 leaves."""
    return static_tree([[rank] for rank in range(rows - 1)], name=f"star-{rows}")


def build(point: Point, pair: Pair, args: argparse.Namespace) -> dict[str, Engine]:
    """The engines of a point: plain, and EAGLE unless one row is all that is verified."""
    room = max(args.contexts) if point.axis == "context" else point.context
    sizes: dict[str, Any] = {"max_length": room + 64, "batch": point.batch}
    engines = {"plain": Engine(pair.target, compiled=args.compile, **sizes)}
    if point.rows != 1:
        tree = parse_tree(args.tree) if point.rows is None else star(point.rows)
        drafter = EagleDrafter(pair.head, pair.target, tree)
        engines["round"] = Engine(pair.target, drafter, compiled=args.compile, **sizes)
    return engines


@torch.inference_mode()
def measure(point: Point, pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every step at a point, and the bytes of weights, keys and values it reads."""
    engines = build(point, pair, args)
    prepared = {name: prepare(engine, point.context) for name, engine in engines.items()}
    steps = {name: step for name, (step, _) in prepared.items()}
    if point.axis == "rows" and "round" in engines:
        steps |= separate(engines["round"], prepared["round"][1], ["verify"])
    times = in_turn(steps, args.device, repeats=args.repeats, rounds=args.rounds)
    ms = {name: statistics.median(found) for name, found in times.items()}
    weight, read = weigh(pair), {}
    for name, engine in engines.items():
        levels, slots = drafted_levels(engine.drafter), prepared[name][1]
        read[name] = weight.round(levels) + kv_bytes(engine.builder.cache, slots)
        read[name] += levels * kv_bytes(engine.builder.memory, slots)
    nodes = {name: engine.drafter.n_nodes for name, engine in engines.items()}
    row = {
        **point._asdict(),
        "rows": nodes.get("round", 1),
        "ms": {name: spread(found) for name, found in times.items()},
        "bytes": read,
        "ceiling_ms": {name: significant(n / args.copy / 1e6) for name, n in read.items()},
        "round_over_plain": significant(ms["round"] / ms["plain"]) if "round" in ms else None,
    }
    say(f"{point}: " + ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items()))
    return row


def sweep(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all points, and the points that --seconds left no time for."""
    rows, late = [], []
    begin, pairs = time.monotonic(), {}
    positions = max(4096, *(context + 64 for context in args.contexts))
    for point in points(args):
        if args.seconds and time.monotonic() - begin > args.seconds:
            late.append(point._asdict())
            continue
        if point.size not in pairs:
            pairs.clear()  # one model at a time
            kind = {"dtype": DTYPES[args.dtype], "device": args.device, "positions": positions}
            pairs[point.size] = random_pair(point.size, **kind)
        rows.append(measure(point, pairs[point.size], args))
        torch.compiler.reset()
    return rows, late


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    compiled = "compiled" if result["compiled"] else "eager"
    print(f"{result['dtype']}, {compiled}, tree {result['tree']}; RANDOM WEIGHTS, no acceptance")
    line = "{:>8} {:>5} {:>8} {:>5} {:>6} {:>10} {:>10} {:>10} {:>8} {:>9}"
    heads = ("axis", "size", "context", "rows", "batch", "plain ms", "round ms", "verify ms")
    print(line.format(*heads, "x plain", "limit ms"))
    for row in result["points"]:
        where = [row[key] for key in ("axis", "size", "context", "rows", "batch")]
        times = [row["ms"].get(k, {"median": "-"})["median"] for k in ("plain", "round", "verify")]
        ratio = "-" if row["round_over_plain"] is None else row["round_over_plain"]
        print(line.format(*where, *times, ratio, row["ceiling_ms"]["plain"]))
    print(f"no time left for {len(result['out_of_time'])} points")


def draw(result: dict[str, Any], out: str) -> None:
    """A panel an axis: milliseconds of each step, and the ceiling of a plain one."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, panel in zip(AXES, panels.flat, strict=True):
        found = [row for row in result["points"] if row["axis"] == axis]
        for name, colour in COLOURS.items():
            known = [row for row in found if name in row["ms"]]
            ms = [row["ms"][name]["median"] for row in known]
            panel.plot([str(row[axis]) for row in known], ms, "o-", color=colour, label=name, ms=4)
        limits = [row["ceiling_ms"]["plain"] for row in found]
        at = [str(row[axis]) for row in found]
        panel.plot(at, limits, ":", color="#888888", label="limit of a plain step")
        panel.set(xlabel=axis, ylabel="ms", yscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    machine = result["environment"]["gpu"] or result["environment"]["machine"]
    named = machine.get("name") or machine.get("processor") or ""
    figure.suptitle(f"{result['size']}, {result['dtype']}, tree {result['tree']}; {named}")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.copy = copy_bandwidth(args.device, args.repeats)
    rows, late = sweep(args)
    result = {
        "bench": "scaling",
        "weights": "random; acceptance is not measured",
        "size": args.size,
        "dtype": args.dtype,
        "tree": args.tree,
        "compiled": args.compile,
        "repeats": args.repeats,
        "copy_gb_per_s": significant(args.copy),
        "points": rows,
        "out_of_time": late,
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    if args.plot:
        draw(result, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="default: demo on a CPU, 7b on a GPU")
    parser.add_argument("--sizes", choices=SIZES, nargs="*", help="more, along that axis")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--tree", default="chain-5", help="of rounds on the other axes")
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--contexts", type=positive, nargs="+", help="tokens in the caches")
    parser.add_argument("--rows", type=positive, nargs="*", help="verified together")
    parser.add_argument("--batches", type=positive, nargs="*", help="texts decoded together")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--rounds", type=positive, default=5, help="rounds timed together")
    parser.add_argument("--repeats", type=positive)
    parser.add_argument("--seconds", type=positive, help="begin no point after so many")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU")
    parser.add_argument("--plot", help="draw a PNG there; needs matplotlib")
    parser.add_argument("--out", help="write the JSON there too")
    args = parser.parse_args()
    kind = args.device.type
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.compile = kind == "cuda" if args.compile is None else args.compile
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """End the program for trees that cannot be, and a plot that cannot be drawn."""
    check_plot(args.plot)
    try:
        width = max(parse_tree(args.tree).width, *(rows - 1 for rows in args.rows), 0)
    except ValueError as error:
        refuse(str(error))
    if max([1, *args.rows]) > MAX_NODES:
        refuse(f"--rows asks for {max(args.rows)} rows; a tree has at most {MAX_NODES}")
    for size in (args.size, *args.sizes):
        if width > SIZES[size].vocab_size:
            refuse(f"--rows asks for {width} guesses, more than {size} has tokens; ask for fewer")


if __name__ == "__main__":
    main(parse())
