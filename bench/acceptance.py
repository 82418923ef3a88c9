"""How many tokens does a round yield, at which depth and by which guess? EAGLE, T = 0 and T = 1.

python bench/acceptance.py --out bench/results/acceptance_demo.json
python bench/acceptance.py --base BASE --head HEAD --prompts 8 --temperatures 0 --tree chain-5

The embedded pair by default. Small bases soon run in circles, where any draft is right: rounds
before the circle closes (novel) and after (looping) are counted apart. Speed plays no part.

tau         tokens a round, the bonus included
by depth    share of rounds that accept depth d among those that accept depth d - 1
by rank     share of accepted parents with a guess r whose r-th guess is accepted, best first
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.demo_pair import MODULES, PROMPT_TOKENS, check_room, fresh_rounds, windows
from bench.environment import describe, device_argument, finish, refuse, say, significant
from bench.peers import encoder
from fasteagle import demo
from fasteagle.assemble import DTYPES, load
from fasteagle.commands.numbers import positive
from fasteagle.engine import Engine
from fasteagle.metrics import Stats
from fasteagle.request import Generation
from fasteagle.sample import SamplingParams


class Level(NamedTuple):
    """One accepted node and what it was chosen from: its children in the tree, best guess first."""

    n_guesses: int
    rank: int | None  # of the accepted child; None: none was


Trail = list[Level]  # of a round, from the root down to the node without an accepted child


def follow(tokens: Sequence[int], parents: Sequence[int], emitted: Sequence[int]) -> Trail:
    """The path of what a round emitted down its tree of tokens `[N]` and parents `[N]`.

    tokens [7, 4, 5, 6], parents [0, 0, 0, 2], emitted [5, 6, 9]: guess 1 of two, guess 0 of one,
    then none of none
    """
    node, path = 0, []
    for token in emitted:
        children = [n for n in range(1, len(parents)) if parents[n] == node]
        ranks = [rank for rank, child in enumerate(children) if tokens[child] == token]
        path.append(Level(len(children), ranks[0] if ranks else None))
        if not ranks:
            break
        node = children[ranks[0]]
    return path


def decode(engine: Engine, prompt: Sequence[int], **limits: Any) -> tuple[Generation, list[Trail]]:
    """A request's result and the path of every round."""
    engine.ahead = False  # the state is to be that of the round just read
    [row] = rows = engine.rows([engine.request(prompt, **limits)])
    paths: list[Trail] = []
    before: list[Any] | None = None
    for _ in engine.decode(rows):
        if before is not None:
            *emitted, count = engine.state.emitted[0].tolist()
            paths.append(follow(*before, emitted[:count]))
        # What the next round verifies; it writes another tree in its place.
        before = [part[0].tolist() for part in engine.state.tree]
    return row.result(), paths


def count(paths: Sequence[Trail], depth: int) -> dict[str, Any]:
    """Everything about some rounds; shares that nothing stands behind are None."""
    accepted = [sum(level.rank is not None for level in path) for path in paths]
    stats = Stats(accepted=accepted, max_depth=depth)
    table = [by_rank([path[at] for path in paths if len(path) > at]) for at in range(depth)]
    reached = [sum(a >= at for a in accepted) for at in range(depth)]
    return {
        "rounds": stats.rounds,
        "accept_length": significant(stats.accept_length) if accepted else None,
        "by_depth": [
            significant(share) if n else None
            for share, n in zip(stats.acceptance, reached, strict=True)
        ],
        "by_rank": by_rank([level for path in paths for level in path]),
        "by_depth_and_rank": table,
        "histogram": [Counter(accepted)[n] for n in range(depth + 1)],
    }


def by_rank(levels: Sequence[Level]) -> list[float | None]:
    """For every rank: how often that guess was accepted, of the nodes that had one."""
    widest = max((level.n_guesses for level in levels), default=0)
    shares: list[float | None] = []
    for rank in range(widest):
        had = [level for level in levels if level.n_guesses > rank]
        shares.append(significant(sum(level.rank == rank for level in had) / len(had)))
    return shares


def measure(engine: Engine, prompts: list[list[int]], temperature: float, args: Any) -> Any:
    """All prompts at one temperature: novel and looping rounds apart, and together."""
    novel: list[Trail] = []
    looping: list[Trail] = []
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=temperature, seed=args.seed + number)
        limits = {"max_new_tokens": args.max_new_tokens, "stop_ids": [], "sampling": sampling}
        result, paths = decode(engine, prompt, **limits)
        assert [len(path) - (path[-1].rank is None) for path in paths] == result.stats.accepted
        fresh = len(fresh_rounds(result))
        novel += paths[:fresh]
        looping += paths[fresh:]
    depth = engine.drafter.n_path - 1
    groups = {"novel": novel, "looping": looping, "all": novel + looping}
    found = {name: count(paths, depth) for name, paths in groups.items()}
    say(f"T = {temperature:g}: tau {found['all']['accept_length']}")
    return found


def rows_of(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for temperature, groups in result["temperatures"].items():
        for name, found in groups.items():
            yield temperature, name, found


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    print(f"{result['pair']}, {result['draft']}, {result['nodes']} nodes, real acceptance")
    line = "{:>4} {:>8} {:>7} {:>6}  {:<34} {:<30} {}"
    print(line.format("T", "text", "rounds", "tau", "by depth", "by rank", "accepted 0, 1, ..."))
    for temperature, name, found in rows_of(result):
        depth, rank = (words(found[key]) for key in ("by_depth", "by_rank"))
        tau = "-" if found["accept_length"] is None else f"{found['accept_length']:.3f}"
        histogram = " ".join(map(str, found["histogram"]))
        print(line.format(temperature, name, found["rounds"], tau, depth, rank, histogram))


def words(shares: Sequence[float | None]) -> str:
    return " ".join("-" if share is None else f"{share:.3f}" for share in shares)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    options = {"dtype": args.dtype, "device": str(args.device), "compiled": args.compile}
    prompts = windows(encoder(args.base, args.max_new_tokens), args.prompts)
    try:
        engine = load(args.base, args.head, tree=args.tree, **options)
    except (ValueError, OSError) as error:
        refuse(str(error))
    check_room(engine.max_length, args.max_new_tokens)
    result = {
        "bench": "acceptance",
        "pair": "embedded" if args.embedded else f"{Path(args.base).name} + {Path(args.head).name}",
        "acceptance": "real",
        "draft": engine.drafter.words,
        "nodes": engine.drafter.n_nodes,
        "dtype": args.dtype,
        "prompts": len(prompts),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "temperatures": {f"{t:g}": measure(engine, prompts, t, args) for t in args.temperatures},
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)


def temperature(text: str) -> float:
    try:
        return SamplingParams(temperature=float(text)).temperature
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature ({error})") from error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="folder of a target (default: the embedded pair)")
    parser.add_argument("--head", help="folder of its draft")
    parser.add_argument("--tree", help="default: mc_sim_7b_63 for the embedded pair, else its own")
    parser.add_argument("--device", type=device_argument, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--prompts", type=positive, choices=range(1, len(MODULES) + 1), default=10)
    parser.add_argument("--temperatures", type=temperature, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seed", type=int, default=0, help="of sampling; prompt n takes seed + n")
    parser.add_argument("--compile", action="store_true", help="costs more than it saves here")
    parser.add_argument("--max_new_tokens", type=positive, default=128)
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU")
    parser.add_argument("--out", help="write the JSON there too")
    args = parser.parse_args()
    if (args.base is None) != (args.head is None):
        refuse("--base and --head make a pair; give both, or neither for the embedded pair")
    args.embedded = args.base is None
    if args.embedded:
        args.base, args.head = str(demo.BASE), str(demo.HEAD)
        args.tree = args.tree or "mc_sim_7b_63"
    return args


if __name__ == "__main__":
    main(parse())
