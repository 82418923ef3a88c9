"""Plain and EAGLE decoding of the embedded pair, side by side.

fasteagle demo
fasteagle demo --no_compile

First a text streams, sampled at temperature 0.7, and shows which tokens the draft guessed; then
both ways of decoding are compiled and timed on the same greedy prompts. The exit status is 1 if
their outputs differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasteagle.assemble import load, pick_device
from fasteagle.commands.compile_help import HELPS, side_by_side
from fasteagle.commands.compiling import compiler_problem
from fasteagle.commands.numbers import positive
from fasteagle.commands.report import BOLD, DIM, GREEN, has_colour, note, paint, write
from fasteagle.engine import Engine
from fasteagle.metrics import Stats, merge
from fasteagle.sample import SamplingParams

TEXT_PROMPT = "class Stack:\n    def __init__(self):\n"
TEXT_SAMPLING = SamplingParams(temperature=0.7, seed=2)
TEXT_TOKENS = 80
NAME = "demo"  # to its own second process
# Greedy text of so small a model loops after some 50 tokens, and loops are easy to draft.
BENCH_TOKENS = 64
REPEATS = 5
PROMPTS = (
    'def read_config(path, encoding="utf-8"):\n    """Read a file and return its values.\n\n',
    "import os\nimport sys\n\n\ndef find_files(folder, suffix):\n    names = []\n    for name in ",
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        ",
    "    def write(self, data):\n        if self.closed:\n            raise ValueError(",
    "def copy_file(source, target):\n    with open(source, 'rb') as reader:\n        ",
    '    def __repr__(self):\n        return "<%s at %#x>" % (',
    "        try:\n            value = int(text)\n        except ValueError:\n            ",
    "# Errors of this module.\n\nclass Error(Exception):\n    pass\n\nclass ",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle demo`."""
    parser.add_argument(
        "--no_compile",
        action="store_true",
        help="time the eager engines; the tiny model then waits for Python, not for arithmetic",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="CPU threads; the pair is too small for more (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Show text, then the table; 1 if EAGLE's output differs from plain decoding's."""
    with threads(args.threads):
        eagle = load(device=args.device, dtype="float32")
        helps = os.environ.get(HELPS) == NAME
        if not helps:
            show_text(eagle)
        problem = compiler_problem(pick_device(args.device))
        if problem and not args.no_compile:
            note(f"torch.compile needs {problem}; timing the eager engines instead")
        compiled = not (problem or args.no_compile)
        plain = Engine(eagle.target, tokenizer=eagle.tokenizer, compiled=compiled)
        if compiled:
            eagle = Engine(
                eagle.target, eagle.drafter, tokenizer=eagle.tokenizer, compiled=compiled
            )
        engines = {"plain": plain, "EAGLE": eagle}
        if helps:
            ready("EAGLE", eagle)
            return 0
        side_by_side(
            lambda: ready("plain", plain),
            lambda: ready("EAGLE", eagle),
            engine=eagle,
            call=args.call,
            part=NAME,
        )
        note(
            f"timing {len(PROMPTS)} prompts of {BENCH_TOKENS} greedy tokens {REPEATS} times each, "
            f"float32 on {args.device}, CPU threads: {args.threads}"
        )
        return compare(engines, "compiled" if compiled else "eager")


@contextmanager
def threads(n_threads: int) -> Iterator[None]:
    """Run with this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show_text(engine: Engine) -> None:
    """Stream one text; colours, or bars where there are none, show what each target pass gave."""
    colour = has_colour(sys.stdout)
    legend = (
        f"{paint('green', GREEN, sys.stdout)}: drafted by the EAGLE head and accepted; "
        "plain: the model's own token"
        if colour
        else "each | ends the tokens that one pass of the model gave"
    )
    write(f"Sampled at temperature {TEXT_SAMPLING.temperature} ({legend}):\n\n")
    write(paint(TEXT_PROMPT, DIM, sys.stdout))
    for piece in engine.stream(TEXT_PROMPT, max_new_tokens=TEXT_TOKENS, sampling=TEXT_SAMPLING):
        bar = "" if colour or piece.drafted else "|"
        write(paint(piece.text, GREEN, sys.stdout) if piece.drafted else piece.text + bar)
        if piece.result:
            stats = piece.result.stats
            write(
                f"\n\n{stats.new_tokens} tokens in {stats.rounds} passes after the prompt, "
                f"{sum(stats.accepted)} of them accepted drafts\n\n"
            )


def ready(name: str, engine: Engine) -> None:
    """Decode a little, which compiles what is needed, and say how long it took."""
    if engine.compiler.enabled:
        note(f"compiling {name} ...", end=" ")
    started = time.perf_counter()
    engine.generate(PROMPTS[:1], max_new_tokens=8)
    if engine.compiler.enabled:
        note(f"{time.perf_counter() - started:.1f} s")


def compare(engines: dict[str, Engine], how: str) -> int:
    """Time the engines in turns, print the table and whether outputs are the same."""
    outputs: dict[str, list[list[int]]] = {}
    stats: dict[str, Stats] = {}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(REPEATS):
        for name, engine in engines.items():
            # One by one: together they would count the wait of each for the others.
            results = [engine.generate([p], max_new_tokens=BENCH_TOKENS)[0] for p in PROMPTS]
            outputs[name] = [result.tokens for result in results]
            stats[name] = merge([result.stats for result in results])
            rates[name].append(stats[name].tokens_per_second)
    base = statistics.median(rates["plain"])
    write(
        paint(f"{how:10}{'tokens/s':>10}{'accept_length':>15}{'speed-up':>10}\n", BOLD, sys.stdout)
    )
    for name in engines:
        rate = statistics.median(rates[name])
        length = stats[name].accept_length
        write(f"{name:10}{rate:10.0f}{length:15.2f}{rate / base:9.2f}x\n")
    same = all(tokens == outputs["plain"] for tokens in outputs.values())
    n_tokens = sum(map(len, outputs["plain"]))
    note("The head costs over a third of this 4-layer model; deeper models gain more.")
    write(f"\nidentical: {'yes' if same else 'no'} ({n_tokens} greedy tokens of each compared)\n")
    return 0 if same else 1
