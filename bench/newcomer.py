"""How long does a newcomer wait? From git clone to the demo's first token and its table.

python bench/newcomer.py --out bench/results/newcomer_cpu.json
python bench/newcomer.py --source https://example.org/fasteagle.git

Clones into an empty folder and runs `make demo` there with an empty compile cache. Pip's cache is
the user's own: run it twice for the time with a warm one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.environment import describe, finish, say  # noqa: E402
from bench.start import caches, watch  # noqa: E402
from fasteagle.commands.demo import TEXT_PROMPT  # noqa: E402


def timed(words: list[str], folder: Path) -> float:
    """Seconds that a command takes; its output goes to stderr."""
    say(f"$ {' '.join(words)}")
    begin = time.perf_counter()
    status = subprocess.run(words, cwd=folder, stdout=sys.stderr).returncode
    if status:
        sys.exit(f"{' '.join(words)} ended with status {status}; its own message is above")
    return time.perf_counter() - begin


def watch_demo(folder: Path, cache: Path) -> dict[str, float]:
    """Seconds from the start of `make demo` to its first token, and to its end."""
    say("$ make demo")
    ran = watch(["make", "demo"], caches(cache), mark=TEXT_PROMPT, folder=folder)
    if "identical: yes" not in ran.out:
        sys.exit(f"the demo's engines disagree:\n{ran.out}{ran.err}")
    say(ran.out)
    return {"first_token": ran.first, "demo": ran.end}


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "fasteagle"
        seconds = {"clone": timed(["git", "clone", "-q", args.source, str(clone)], ROOT)}
        seconds["install"] = timed(["make", ".venv/.runtime"], clone)
        seconds |= watch_demo(clone, Path(name) / "cache")
    before = seconds["clone"] + seconds["install"]
    result: dict[str, Any] = {
        "bench": "newcomer",
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
        "clone_to_first_token": round(before + seconds["first_token"], 1),
        "clone_to_table": round(before + seconds["demo"], 1),
        "environment": describe(__file__, sys.argv[1:], device=torch.device("cpu")),
    }
    print(f"{'clone':>22} {seconds['clone']:7.1f} s\n{'install':>22} {seconds['install']:7.1f} s")
    for step in ("first_token", "demo"):
        print(f"{step + ' after install':>22} {seconds[step]:7.1f} s")
    finish(result, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=str(ROOT), help="what to clone (default: this clone)")
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
