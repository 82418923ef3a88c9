"""How long from a command's start to its first token? Cold, then with what was kept.

python bench/start.py --out bench/results/start_demo_cpu.json
python bench/start.py --repeats 3 -- --checkpoint_path base --draft_checkpoint_path head

Runs `fasteagle generate --compile` as a process of its own: once with empty caches, then again
and again with what that run kept, and without --compile. Words after `--` go to `fasteagle
generate`; without any it is the embedded pair.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.environment import describe, finish, say, spread  # noqa: E402
from fasteagle.commands.numbers import positive  # noqa: E402
from fasteagle.metrics import significant  # noqa: E402
from fasteagle.step_files import VARIABLE  # noqa: E402

PROMPT = "def mean(values):\n"
COMPILING = re.compile(r"compiling \.\.\. ([0-9.]+) s")


class Watched(NamedTuple):
    """A command that ended well."""

    first: float  # seconds to the first output (after a mark)
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
    begin, out, first = time.perf_counter(), b"", None
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
            if first is None and behind:
                first = time.perf_counter() - begin
        process.wait()
        end = time.perf_counter() - begin
        err.seek(0)
        notes = err.read().decode(errors="replace")
    text = out.decode(errors="replace")
    if process.returncode or first is None:
        sys.exit(f"{' '.join(words)}: ended with status {process.returncode}:\n{text}{notes}")
    return Watched(first, end, text, notes)


def generate(words: Sequence[str], folder: Path, *, compiled: bool) -> Watched:
    """One start of `fasteagle generate` with its compile caches in a folder."""
    command = [sys.executable, "-m", "fasteagle", "generate", "--prompt", PROMPT]
    command += ["--max_new_tokens", "32", *(["--compile"] if compiled else []), *words]
    ran = watch(command, caches(folder))
    say(f"first token after {ran.first:.1f} s, the end after {ran.end:.1f} s")
    return ran


def compiling(run: Watched) -> float:
    """The seconds that a run says it spent on compiling, or on loading what was kept."""
    found = COMPILING.search(run.err)
    if found is None:
        sys.exit(f"generate did not say how long it compiled:\n{run.err}")
    return float(found[1])


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        say("cold")
        cold = generate(args.words, Path(name), compiled=True)
        say("with what was kept")
        warm = [generate(args.words, Path(name), compiled=True) for _ in range(args.repeats)]
        say("without --compile")
        eager = [generate(args.words, Path(name), compiled=False) for _ in range(args.repeats)]
    same = all(run.out == cold.out for run in (*warm, *eager))
    seconds: dict[str, dict[str, Any]] = {
        "cold": {"first_token": significant(cold.first), "end": significant(cold.end)},
        "warm": {
            "first_token": spread([run.first for run in warm]),
            "end": spread([run.end for run in warm]),
            "compiling": spread([compiling(run) for run in warm]),
        },
        "eager": {
            "first_token": spread([run.first for run in eager]),
            "end": spread([run.end for run in eager]),
        },
    }
    seconds["cold"]["compiling"] = compiling(cold)
    result = {
        "bench": "start",
        "seconds": seconds,
        "same_text": same,
        "environment": describe(__file__, sys.argv[1:], device=torch.device("cpu")),
    }
    for kind, runs in (("cold", [cold]), ("warm", warm), ("eager", eager)):
        first = statistics.median(run.first for run in runs)
        end = statistics.median(run.end for run in runs)
        print(f"{kind:>8} {first:7.1f} s to the first token, {end:.1f} s in all ({len(runs)} runs)")
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
