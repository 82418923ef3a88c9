"""How long from a command's start to its first token? Cold, then with what was kept.

python bench/start.py --out bench/results/start_demo_cpu.json
python bench/start.py --repeats 3 -- --checkpoint_path base --draft_checkpoint_path head

Runs `fasteagle generate --compile` as a process of its own: once with empty caches, then again
and again with what that run kept, and without --compile. Words after `--` go to `fasteagle
generate`; without any it is the embedded pair.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.environment import describe, finish, say, spread  # noqa: E402
from fasteagle.commands.numbers import positive  # noqa: E402
from fasteagle.step_files import VARIABLE  # noqa: E402

PROMPT = "def mean(values):\n"


class Watched(NamedTuple):
    """A command that ended well."""

    first: float  # seconds to the first output (after a mark)
    next: float  # seconds to output after that; a fast one comes with the first
    end: float  # seconds to its end
    out: str
    err: str


def caches(folder: Path) -> dict[str, str]:
    """The environment whose compile caches, torch's and ours, are in a folder, as are other files
    that torch makes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        VARIABLE: str(folder / "fasteagle"),
    }


def watch(
    words: Sequence[str], environment: Mapping[str, str], *, mark: str = "", folder: Path = ROOT
) -> Watched:
    """Run a command and see when it first writes to stdout, or more than white space behind a mark.

    SystemExit with its own words if it ends badly or writes nothing.
    """
    begin, out = time.perf_counter(), b""
    pieces: list[float] = []
    with (
        tempfile.TemporaryFile() as err,
        subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=err
        ) as process,
    ):
        assert process.stdout is not None, "stdout is a pipe"
        while piece := os.read(process.stdout.fileno(), 4096):
            out += piece
            behind = out.partition(mark.encode())[2].strip() if mark else out
            if behind:
                pieces.append(time.perf_counter() - begin)
        process.wait()
        end = time.perf_counter() - begin
        err.seek(0)
        notes = err.read().decode(errors="replace")
    text = out.decode(errors="replace")
    if process.returncode or not pieces:
        sys.exit(f"{' '.join(words)}: ended with status {process.returncode}:\n{text}{notes}")
    return Watched(pieces[0], pieces[:2][-1], end, text, notes)


class Start(NamedTuple):
    """Seconds of a start of `generate`, and its text."""

    first_token: float
    first_round: float  # its tokens, behind the prompt's
    end: float
    compiling: float  # or reading what was kept, as the command tells it
    text: str


def generate(words: Sequence[str], folder: Path, *, compiled: bool) -> Start:
    """One start of `fasteagle generate` with its compile caches in a folder."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "fasteagle", "generate", "--prompt", PROMPT]
    command += ["--max_new_tokens", "32", "--json", str(report)]
    ran = watch([*command, *(["--compile"] if compiled else []), *words], caches(folder))
    seconds = json.loads(report.read_text())["compile_seconds"]
    say(
        f"first token after {ran.first:.1f} s, then {ran.next:.1f} s, the end after {ran.end:.1f} s"
    )
    return Start(ran.first, ran.next, ran.end, seconds, ran.out)


def figures(starts: Sequence[Start]) -> dict[str, dict[str, float]]:
    """Spreads over starts, by what was timed."""
    return {
        name: spread([getattr(start, name) for start in starts])
        for name in ("first_token", "first_round", "end", "compiling")
    }


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        say("cold")
        cold = [generate(args.words, Path(name), compiled=True)]
        say("with what was kept")
        warm = [generate(args.words, Path(name), compiled=True) for _ in range(args.repeats)]
        say("without --compile")
        eager = [generate(args.words, Path(name), compiled=False) for _ in range(args.repeats)]
    seconds = {"cold": figures(cold), "warm": figures(warm), "eager": figures(eager)}
    result = {
        "bench": "start",
        "repeats": args.repeats,
        "seconds": seconds,
        "same_text": len({start.text for start in (*cold, *warm, *eager)}) == 1,
        "environment": describe(__file__, sys.argv[1:], device=torch.device("cpu")),
    }
    line = "{:>8} {:>12} {:>12} {:>8} {:>10}"
    print(line.format("seconds", "first token", "first round", "end", "compiling"))
    for kind, found in seconds.items():
        print(line.format(kind, *(f"{values['median']:.1f}" for values in found.values())))
    finish(result, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=positive, default=5, help="warm starts, eager starts")
    parser.add_argument("--out", help="write the JSON there too")
    parser.add_argument("words", nargs="*", metavar="-- FLAG", help="for `fasteagle generate`")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
