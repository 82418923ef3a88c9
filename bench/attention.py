"""What does attention cost for the rows of a tree, torch's and ours, and what does keep?

python bench/attention.py --device cuda --out bench/results/attention_cuda.json
python bench/attention.py --device cpu --models 8b --rows 1 6 --slots 64

On CUDA: one layer of LLaMA2-7B and LLaMA3-8B, each in a CUDA graph over caches that together are
larger than the GPU's own, so that none is read twice in a row. floor is the time in which a copy
moves as many bytes as keys and values have. `--search` tries other tiles of our kernel. On the CPU
ours runs only in Triton's interpreter (TRITON_INTERPRET=1), whose times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.clock import copy_bandwidth
from bench.environment import describe, device_argument, finish, say, significant, spread
from bench.kernels import Replay
from fasteagle.attention_trial import Attention, Inputs, Shape, in_turn, layers
from fasteagle.cache import KVCache
from fasteagle.clock import clock
from fasteagle.commands.numbers import positive
from fasteagle.quant.kernels import has_triton
from fasteagle.tree_attention import Tiles, attend_tree, choose_tiles, reference

ROWS = (1, 6, 16, 26, 60, 64)
SLOTS = (512, 1024, 2048, 8192)
PATHS = (6, 9)  # of the 26-node tree and of a deeper one
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS = 4  # graphs timed together
SEARCHED = [
    (block, programs, warps) for block in (32, 64, 128) for programs in (132, 264, 528)
    for warps in (4, 8)
]  # fmt: skip


class Model(NamedTuple):
    """What attention knows of a model."""

    layers: int
    heads: int  # kv heads
    group: int  # query heads of each
    dim: int


MODELS = {
    "7b": Model(32, 32, 1, 128),  # LLaMA2-7B
    "8b": Model(32, 8, 4, 128),  # LLaMA3-8B
    "tiny": Model(2, 1, 2, 64),
}


def runs_ours(device: torch.device) -> bool:
    """Whether our kernels can be called here."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and has_triton()


def over(attention: Attention, inputs: list[Inputs]) -> tuple[Callable[[], object], int]:
    """The same as a graph on CUDA: `in_turn`, whose inputs live as long."""
    call, n = in_turn(attention, inputs)
    return (Replay(call, inputs) if inputs[0].q.is_cuda else call), n


def measure(calls: dict[str, tuple[Callable[[], object], int]], args: argparse.Namespace) -> Any:
    """Microseconds of each call, in turn, `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, (call, n) in calls.items():
            [ms] = clock(call, args.device, repeats=1, rounds=ROUNDS)
            times[name].append(ms * 1000 / n)
    return {name: spread(found) for name, found in times.items()}


def shapes(model: Model, args: argparse.Namespace) -> Iterator[tuple[int, Shape]]:
    """Every number of rows and of slots."""
    for n_slots in args.slots:
        for rows in args.rows:
            size = (1, model.heads, rows * model.group, model.dim, n_slots)
            yield rows, Shape(*size, DTYPES[args.dtype], args.device)


def attention_rows(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both attentions of a model, and other tiles of ours if asked for."""
    found = []
    for rows, shape in shapes(MODELS[name], args):
        say(f"{name}: {rows} rows, {shape.slots} slots")
        inputs = layers(shape)
        calls = {"sdpa": over(reference, inputs)}
        if runs_ours(args.device):
            calls["triton"] = over(attend_tree, inputs)
        n_bytes = 2 * shape.heads * shape.slots * shape.dim * shape.dtype.itemsize
        row = {
            "rows": rows,
            "slots": shape.slots,
            "us": measure(calls, args),
            "floor_us": significant(n_bytes / args.copy / 1e3),
            "tiles": list(choose_tiles(shape.heads, shape.rows, shape.dim, shape.slots)),
        }
        if args.search and "triton" in calls:
            row["search"] = search(shape, inputs, args)
        found.append(row)
    return found


def search(shape: Shape, inputs: list[Inputs], args: argparse.Namespace) -> dict[str, Any]:
    """The best of other tiles, and its time."""
    rule = choose_tiles(shape.heads, shape.rows, shape.dim, shape.slots)
    programs = shape.heads * -(-shape.rows // rule.rows)
    times: dict[Tiles, float] = {}
    for block, wanted, warps in SEARCHED:
        splits = max(1, min(-(-shape.slots // block), wanted // programs, 64))
        tiles = rule._replace(block=block, splits=splits, warps=warps)
        if tiles in times:
            continue
        call = over(partial(attend_tree, tiles=tiles), inputs)
        times[tiles] = measure({"us": call}, args)["us"]["median"]
    best = min(times, key=lambda tiles: times[tiles])
    return {"tiles": list(best), "us": times[best]}


def triton_keep() -> Callable[..., None]:
    """Imported late: it needs Triton."""
    from fasteagle.triton_cache import move_rows

    return move_rows


def keep_rows(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Keep of a whole model's cache: gather and scatter, and one kernel."""
    model, n_slots = MODELS[name], min(args.slots)
    shape = (model.layers, 1, model.heads, n_slots, model.dim)
    cache = KVCache(shape, dtype=DTYPES[args.dtype], device=args.device)
    start = torch.tensor([n_slots // 2], device=args.device)
    found = []
    for n_path in PATHS:
        path = torch.arange(n_path, device=args.device)[None] * 2
        calls = {}
        for way in ("gather", "triton")[: 1 + runs_ours(args.device)]:
            call = partial(cache.keep, start, path, mode="eager")
            if way == "triton":
                call = partial(triton_keep(), cache.k, cache.v, start, path)
            calls[way] = (Replay(call, cache) if args.device.type == "cuda" else call, 1)
        found.append({"path": n_path, "us": measure(calls, args)})
    return found


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    line = "{:>6} {:>6} {:>6} {:>9} {:>9} {:>9} {:>9}"
    print(line.format("model", "slots", "rows", "sdpa us", "triton us", "floor us", "ratio"))
    for name, rows in result["attention"].items():
        for row in rows:
            print(line.format(name, row["slots"], row["rows"], *cells(row["us"], row["floor_us"])))
            if "search" in row:
                print(f"       best tiles {row['search']['tiles']}: {row['search']['us']} us")
    for name, rows in result["keep"].items():
        for row in rows:
            times = ", ".join(f"{way} {us['median']} us" for way, us in row["us"].items())
            print(f"{name}: keep of a path of {row['path']}: {times}")


def cells(us: dict[str, Any], floor: float) -> tuple[Any, ...]:
    """Torch's time, ours, the floor, and ours over torch's."""
    theirs = us["sdpa"]["median"]
    if "triton" not in us:
        return theirs, "-", floor, "-"
    ours = us["triton"]["median"]
    return theirs, ours, floor, significant(ours / theirs, 3)


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.copy = copy_bandwidth(args.device, args.repeats)
    result = {
        "bench": "attention",
        "inputs": "random, all slots live, half of them seen by each row",
        "dtype": args.dtype,
        "repeats": args.repeats,
        "copy_gb_per_s": significant(args.copy),
        "attention": {name: attention_rows(name, args) for name in args.models},
        "keep": {name: keep_rows(name, args) for name in args.models},
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["7b", "8b"])
    parser.add_argument("--rows", type=positive, nargs="+", default=list(ROWS), help="tree nodes")
    parser.add_argument("--slots", type=positive, nargs="+", default=list(SLOTS), help="read of it")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--search", action="store_true", help="also try other tiles (slow)")
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
