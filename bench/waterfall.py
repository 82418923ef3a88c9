"""What does each idea add? From eager plain decoding to EAGLE, one idea more a step, as a picture.

python bench/waterfall.py --prompts 10 --max_new_tokens 128 --repeats 5 --plot
python bench/waterfall.py --size 7b --device cuda --plot --out bench/results/waterfall_7b.json

eager      plain decoding, nothing compiled, attention over all of the cache
compile    compiled; on a CPU the whole step, on CUDA block by block as torch.compile would
panels     (CPU) weights in panels, in 16 bits where that changes no value
graph      (CUDA) the step captured in one CUDA graph
bucket     attention over the slots that the text needs so far, not over all (of caches that have
           more than one bucket: 640 slots or more)
tree       EAGLE
int4       (CUDA, or --precisions A,int4) EAGLE on quantized weights

All take turns on the same prompts. Tokens/s are those of decoding: prefill is left out. With random
weights (--size) the acceptance of `tree` and `int4` is SIMULATED (bench/simulated.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import (
    add_run,
    check_plot,
    describe,
    end_if_different,
    finish,
    refuse,
    say,
    significant,
)
from bench.simulated import SimulatedDrafter
from bench.speed import add_pair, check, rehearse
from bench.speed_pair import ROOM, Subject, make, make_prompts, random_parts, stored_parts
from bench.speed_table import summarize
from fasteagle.clock import synchronize
from fasteagle.compile import Compiler, Step
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Generation

WORDS = {
    "eager": "eager",
    "compile": "+ compile",
    "panels": "+ panels of weights",
    "graph": "+ CUDA graph",
    "bucket": "+ KV bucket",
    "tree": "+ EAGLE",
    "int4": "+ int4",
}


class Stage(NamedTuple):
    """An engine of the waterfall; the texts that its simulated drafter is to know, by prompt."""

    engine: Engine
    plans: list[Any]

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[Generation]:
        """One untimed or timed run over all prompts."""
        made = []
        for at, prompt in enumerate(prompts):
            if isinstance(self.engine.drafter, SimulatedDrafter):
                self.engine.drafter.load(*self.plans[at])
            made += self.engine.generate([prompt], max_new_tokens=new_tokens, stop_ids=[])
        return made


class PartByPart(Compiler):
    """CUDA without graphs: compiled parts that Python calls one after another."""

    def step(self, function: Step, *_: object, **__: object) -> Step:
        """The step as it is; `part` has compiled what is in it."""
        return function


def plain(target: Transformer, room: int, compiler: Compiler | None = None) -> Engine:
    """Plain decoding with all of the cache as its only bucket, under a compile policy."""
    engine = Engine(target, max_length=room)
    if compiler is not None:  # not by Engine: it would repack the weights
        engine.compiler = compiler
        engine._allocate(room)
    engine.buckets = [engine.n_slots]
    return engine


def plain_stages(args: argparse.Namespace, subject: Subject) -> dict[str, Engine]:
    """The steps up to compiled plain decoding, in order."""
    packed = subject.engines["plain"].target
    cuda, room = args.device.type == "cuda", subject.engines["plain"].room
    whole = Compiler(enabled=True, device=args.device)
    if cuda:
        parts = PartByPart(enabled=True, device=args.device)
        made = {"eager": plain(packed, room), "compile": plain(packed, room, parts)}
        made["graph"] = plain(packed, room, whole)
        made["graph"].ahead = True  # graphs are what can be launched ahead
        return made
    parts_of = stored_parts if args.base is not None else random_parts
    target = parts_of(args.precisions[0], args)[0].target
    made = {"eager": plain(target, room), "compile": plain(target, room, whole)}
    return made | {"panels": plain(packed, room, whole)}


def stages(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Stage]:
    """All steps, built and run once."""
    first = make(args.precisions[0], args)
    found = {name: Stage(engine, []) for name, engine in plain_stages(args, first).items()}
    if len(first.engines["plain"].buckets) > 1:
        found["bucket"] = Stage(first.engines["plain"], [])
    for name, precision in zip(("tree", "int4"), args.precisions, strict=False):
        subject = first if name == "tree" else make(precision, args)
        plans = rehearse(subject, prompts, args.max_new_tokens)["plans"]
        found[name] = Stage(subject.engines["eagle"], plans)
    for name, stage in reversed(found.items()):  # the graphs choose the attention of the parts
        stage.decode(prompts, args.max_new_tokens)
        say(f"{name}: ready")
    return found


def take_turns(
    found: dict[str, Stage], prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, list[list[Generation]]]:
    """Generations by step, repeat and prompt."""
    runs: dict[str, list[list[Generation]]] = {name: [] for name in found}
    for repeat in range(args.repeats):
        for name, stage in found.items():
            synchronize(args.device)
            runs[name].append(stage.decode(prompts, args.max_new_tokens))
        say(f"repeat {repeat + 1} of {args.repeats}")
    return runs


def rows_of(runs: dict[str, list[list[Generation]]]) -> dict[str, dict[str, Any]]:
    """By step: speed, and what it gains on the one before and on the first."""
    rows: dict[str, dict[str, Any]] = {}
    before, first = 0.0, 0.0
    for name, made in runs.items():
        row = summarize(made)
        speed = row["decode_tokens_per_s"]["median"]
        first, before = first or speed, before or speed
        rows[name] = {
            "decode_tokens_per_s": row["decode_tokens_per_s"],
            "tokens_a_round": row["accept_length"],
            "times_before": significant(speed / before),
            "times_first": significant(speed / first),
        }
        before = speed
    return rows


def draw(result: dict[str, Any], out: Path) -> None:
    """A bar a step, the part that is new in colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result["steps"])
    speeds = [row["decode_tokens_per_s"]["median"] for row in result["steps"].values()]
    figure, panel = plt.subplots(figsize=(7.5, 0.5 * len(names) + 1.3), layout="constrained")
    steps = list(itertools.pairwise([0.0, *speeds]))
    bases = [min(step) for step in steps]
    gains = [abs(now - then) for then, now in steps]
    colours = ["#3b6ea5" if now >= then else "#b5423c" for then, now in steps]
    panel.barh(range(len(names)), bases, color="#dddddd")
    panel.barh(range(len(names)), gains, left=bases, color=colours)
    for at, (name, speed) in enumerate(zip(names, speeds, strict=True)):
        times = result["steps"][name]["times_before"]
        text = f" {speed:.4g}" + (f"  (x {times:.3g})" if at else "")
        panel.text(max(speed, bases[at] + gains[at]), at, text, va="center", fontsize=8)
    panel.set_yticks(range(len(names)), [WORDS[name] for name in names])
    panel.invert_yaxis()
    panel.set_xlabel("decoding, tokens/s")
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.2)
    environment = result["environment"]
    where = environment["gpu"] or {"name": environment["machine"]["processor"]}
    accepted = "" if result["acceptance"] == "real" else ", SIMULATED acceptance"
    figure.suptitle(
        f"{result['pair']}, {result['precisions'][0]}{accepted}; {where['name']}", fontsize=9
    )
    figure.savefig(out, dpi=130)
    plt.close(figure)


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"{'':>20} {'tokens/s':>9} {'x before':>9} {'x first':>8}")
    for name, row in result["steps"].items():
        speed = row["decode_tokens_per_s"]["median"]
        print(f"{WORDS[name]:>20} {speed:>9} {row['times_before']:>9} {row['times_first']:>8}")
    print(f"acceptance: {result['acceptance']}")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    prompts = make_prompts(args)
    runs = take_turns(stages(args, prompts), prompts, args)
    texts = {n: [g.tokens for g in made[-1]] for n, made in runs.items() if n != "int4"}
    result = {
        "bench": "waterfall",
        "pair": args.pair if isinstance(args.pair, str) else " + ".join(args.pair),
        "precisions": args.precisions,
        "acceptance": "simulated" if args.accept else "real",
        "tree": args.tree or "the head's own",
        "context": args.context,
        "prompts": args.prompts,
        "new_tokens": args.max_new_tokens,
        "room": ROOM if args.base is None else "the model's context",
        "steps": rows_of(runs),
        "identical_tokens": all(text == texts["eager"] for text in texts.values()),
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    if args.plot:
        picture = picture_of(args)
        draw(result, picture)
        say(f"drew {picture}")
    end_if_different(args.precisions[0], same=result["identical_tokens"])


def picture_of(args: argparse.Namespace) -> Path:
    """What --plot draws."""
    return Path(args.out or f"waterfall_{args.device.type}.json").with_suffix(".png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_pair(parser)
    parser.add_argument("--plot", action="store_true", help="draw a PNG, beside --out if given")
    add_run(parser, new_tokens=None, repeats=None, eager=False)
    args = parser.parse_args()
    args.compile, args.prompt_lengths, args.rounds = True, None, None
    if args.precisions is None and args.device.type == "cuda" and args.size not in (None, "demo"):
        args.precisions = ["bfloat16", "int4"]
    check(args)
    check_plot(picture_of(args) if args.plot else None)
    if len(args.precisions) > 2 or args.precisions[1:] not in ([], ["int4"]):
        refuse("--precisions takes one, and int4 after it")
    return args


if __name__ == "__main__":
    main(parse())
