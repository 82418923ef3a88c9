"""What does a product by quantized weights cost, for one row and for the rows of a tree?

python bench/kernels.py --device cuda --out bench/results/kernels_cuda.json
python bench/kernels.py --device cpu --shape 4096x4096 --threads 1

On CUDA: every layer shape of LLaMA2-7B and LLaMA3-8B, each kernel in a CUDA graph over copies of
the weight that together are larger than the GPU's cache, as in a model, where no weight is read
twice in a row. `--search` also looks for better tiles of our kernels. On the CPU: one shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock import copy_bandwidth
from bench.environment import describe, device_argument, finish, say, significant, spread
from bench.products import Product, products, read_bytes
from bench.tiles import search
from fasteagle.clock import clock
from fasteagle.compile import captured

ROWS = (1, 2, 4, 8, 16, 26, 32, 64)
# [O, I] of each product and how often a step does it: 32 layers and lm_head.
MODELS = {
    "LLaMA2-7B": {
        "qkv": (12288, 4096, 32),
        "o": (4096, 4096, 32),
        "gate_up": (22016, 4096, 32),
        "down": (4096, 11008, 32),
        "lm_head": (32000, 4096, 1),
    },
    "LLaMA3-8B": {
        "qkv": (6144, 4096, 32),
        "o": (4096, 4096, 32),
        "gate_up": (28672, 4096, 32),
        "down": (4096, 14336, 32),
        "lm_head": (128256, 4096, 1),
    },
}
LAUNCHES = 8  # in one graph, at least
Shape = tuple[int, int]


class Budget:
    """Seconds left of --seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def spent(self) -> bool:
        return time.monotonic() > self.end


class Replay:
    """A captured call. The graph knows addresses only, so what it reads must live as long."""

    def __init__(self, call: Callable[[], object], *read: object) -> None:
        self.read = read
        call()  # Triton compiles
        torch.cuda.synchronize()
        self.graph = captured(call)

    def __call__(self) -> None:
        self.graph.replay()


def rotated(product: Product, x: Tensor) -> tuple[Callable[[], object], int]:
    """A call that multiplies x by each copy of the weight in turn, and how many products it is."""
    copies = product.copies
    n = max(LAUNCHES, len(copies)) if x.is_cuda else 1

    def call() -> None:
        for i in range(n):
            product.multiply(x, copies[i % len(copies)])

    return (Replay(call, x, copies) if x.is_cuda else call), n


@torch.inference_mode()
def measure(shape: Shape, args: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Microseconds of every kernel and number of rows; on the CPU all of them take turns."""
    found = []
    for make in products(shape, args.device):
        if budget.spent():
            say(f"--seconds is over before {shape}: {make.name} and what follows is left out")
            break
        product = make.build()
        for n_rows in args.rows:
            x = torch.randn(n_rows, shape[1], device=args.device).to(product.dtype)
            call, n = rotated(product, x)
            found.append({"kernel": product.name, "rows": n_rows, "call": call, "products": n})
            found[-1]["times"] = []
        if args.device.type == "cuda":  # one kernel's weights at a time, or memory runs out
            run(found[-len(args.rows) :], args)
    if args.device.type == "cpu":  # neighbours in time are compared
        run(sorted(found, key=lambda entry: entry["rows"]), args)
    return [row_of(entry, found, shape, args) for entry in found]


def run(entries: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Time the calls in turn, `repeats` times, and let go of them."""
    for _ in range(args.repeats):
        for entry in entries:
            [ms] = clock(entry["call"], args.device, repeats=1, rounds=args.rounds)
            entry["times"].append(ms * 1000 / entry["products"])
    for entry in entries:
        del entry["call"]


def row_of(
    entry: dict[str, Any], entries: list[dict[str, Any]], shape: Shape, args: argparse.Namespace
) -> dict[str, Any]:
    """What the table shows of one kernel at one number of rows."""
    same = [e for e in entries if e["kernel"] == entry["kernel"]]
    single = statistics.median(min(same, key=lambda e: e["rows"])["times"])
    median = statistics.median(entry["times"])
    n_bytes = read_bytes(entry["kernel"], shape)
    return {
        "kernel": entry["kernel"],
        "rows": entry["rows"],
        "us": spread(entry["times"]),
        "share_of_copy_bandwidth": significant(n_bytes / median / 1e3 / args.copy),
        "over_least_rows": significant(median / single),
    }


def ours_over_best(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """What our layer loses: its time over the best kernel, by its precision and rows.

    int4 against all kernels, int8 against those that it could use.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if " ours " in row["kernel"]:
            kinds = ("dense", "int8") if row["kernel"].startswith("int8") else ("dense", "int")
            others = [
                r
                for r in rows
                if r["rows"] == row["rows"]
                and r["kernel"].startswith(kinds)
                and " ours " not in r["kernel"]
            ]
            best = min(r["us"]["median"] for r in others)
            ratio = significant(row["us"]["median"] / best)
            found.setdefault(row["kernel"], {})[row["rows"]] = ratio
    return found


def summarize(layers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All products of a model: ms a plain step, and a verify of 16 and 32 rows over it."""
    found: dict[str, Any] = {}
    for model, shapes in MODELS.items():
        names = [f"{n_out}x{n_in}" for n_out, n_in, _ in shapes.values()]
        if any(name not in layers for name in names):
            continue
        times = [
            {(r["kernel"], r["rows"]): r["us"]["median"] for r in layers[name]} for name in names
        ]
        counts = [count for _, _, count in shapes.values()]
        found[model] = {}
        for kernel in dict.fromkeys(kernel for kernel, _ in times[0]):
            ms = {
                rows: sum(n * t[kernel, rows] for n, t in zip(counts, times, strict=True)) / 1000
                for rows in (1, 16, 32)
                if all((kernel, rows) in t for t in times)
            }
            found[model][kernel] = {"step_ms": significant(ms[1])} if 1 in ms else {}
            for rows in (16, 32):
                if {1, rows} <= set(ms):
                    found[model][kernel][f"verify_{rows}_over_step"] = significant(ms[rows] / ms[1])
    return found


def show(result: dict[str, Any]) -> None:
    """The tables for people: microseconds, the share of bandwidth and the ratio to one row."""
    print(f"copy {result['copy_gb_per_s']:.1f} GB/s; microseconds (share of it, times least rows)")
    for name, rows in result["layers"].items():
        numbers = sorted({row["rows"] for row in rows})
        print(f"{name:<22}" + "".join(f"{n:>20}" for n in numbers))
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            cells = [
                f"{r['us']['median']:.4g} ({r['share_of_copy_bandwidth']:.2f}, "
                f"{r['over_least_rows']:.2f})"
                for r in rows
                if r["kernel"] == kernel
            ]
            print(f"  {kernel:<20}" + "".join(f"{cell:>20}" for cell in cells))
    for name, kernels in result["ours_over_best"].items():
        for kernel, ratios in kernels.items():
            print(f"{name} {kernel} over the best kernel: {ratios}")
    for model, kernels in result["models"].items():
        for kernel, numbers in kernels.items():
            print(f"{model} {kernel}: " + ", ".join(f"{k} {v}" for k, v in numbers.items()))
    for found in result["search"]:
        print("search: " + ", ".join(f"{key} {value}" for key, value in found.items()))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    budget = Budget(args.seconds)
    # Model by model, so that what time allows is a whole one.
    every = dict.fromkeys(shape[:2] for model in MODELS.values() for shape in model.values())
    default = list(every) if args.device.type == "cuda" else [(4096, 4096)]
    args.copy = copy_bandwidth(args.device, args.repeats)
    layers, shapes = {}, args.shape or default
    for shape in shapes:
        say(f"{shape[0]}x{shape[1]}")
        rows = measure(shape, args, budget)
        if rows:
            layers[f"{shape[0]}x{shape[1]}"] = rows
    tried = []
    if args.search and args.device.type == "cuda":
        for shape in shapes:
            tried += search(shape, rotated, args, budget.spent)
    result = {
        "bench": "kernels",
        "weights": "random",
        "rows": args.rows,
        "repeats": args.repeats,
        "copy_gb_per_s": significant(args.copy),
        "layers": layers,
        "ours_over_best": {name: ours_over_best(rows) for name, rows in layers.items()},
        "models": summarize(layers),
        "search": tried,
        "out_of_time": budget.spent(),
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)


def shape_argument(text: str) -> Shape:
    """`OUTPUTSxINPUTS`; inputs in whole groups of 128."""
    n_out, _, n_in = text.partition("x")
    if not (n_out.isdigit() and n_in.isdigit() and int(n_out) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give outputs x inputs: 4096x4096")
    if int(n_in) % 128 or int(n_in) == 0 or int(n_out) % 16:
        raise argparse.ArgumentTypeError(f"{text!r}: outputs go by 16 and inputs by 128")
    return int(n_out), int(n_in)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--shape", type=shape_argument, nargs="+", help="such as 4096x4096")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="graphs or products timed together")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=100, help="start nothing new after that")
    parser.add_argument("--search", action="store_true", help="also try other tiles (CUDA)")
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
