"""On what machine, with which software and by which command was a number measured?

python bench/environment.py
python bench/environment.py --out bench/results/environment.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fasteagle.commands.numbers import positive  # noqa: E402
from fasteagle.metrics import significant  # noqa: E402
from fasteagle.processor import processor_name  # noqa: E402
from fasteagle.safewrite import write_json  # noqa: E402

SWITCHES = {"FASTEAGLE_ATTENTION", "TRITON_INTERPRET"}
GPU_FIELDS = ("name", "driver_version", "power.limit", "clocks.max.sm", "memory.total")


def describe(script: str, argv: Sequence[str], *, device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge a number, as plain JSON values."""
    return {
        "command": command(script, argv),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "gpu": gpu(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def command(script: str, argv: Sequence[str]) -> str:
    """The call as typed in the repository's root, with the variables that change what runs."""
    path = Path(script).resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    names = [name for name in sorted(os.environ) if name.endswith("_TUNING") or name in SWITCHES]
    switches = [f"{name}={os.environ[name]}" for name in names]
    return shlex.join([*switches, "python", name, *argv])


def commit() -> dict[str, Any]:
    """The git commit and whether files differ from it. COMMIT names it for a copy without git."""
    if told := os.environ.get("COMMIT"):
        return {"sha": told, "changed": None}
    sha = run("git", "rev-parse", "HEAD")
    changed = run("git", "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return {"sha": sha, "changed": None if changed is None else bool(changed)}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, system."""
    memory = Path("/proc/meminfo")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    total = memory.read_text().split("\n", 1)[0].split()[1] if memory.is_file() else None
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "cores": len(cores),
        "memory_gib": round(int(total) / 2**20, 1) if total else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Name, size, driver and power limit of a CUDA device; None for the CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    query = run("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    rows = [[field.strip() for field in line.split(",")] for line in (query or "").splitlines()]
    row = next((r for r in rows if r[0] == found.name), [None] * len(GPU_FIELDS))
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": row[1],
        "power_limit": row[2],
        "clock_max": row[3],
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(*words: str) -> str | None:
    """Output of a command run in the repository, or None where it is missing or fails."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: significant(value, digits) for name, value in named.items()}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def device_argument(name: str | None) -> torch.device:
    """The type of --device: the device named, or CUDA where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in {"cpu", "cuda"}:
        raise argparse.ArgumentTypeError(f"{name!r} is not supported; give cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name!r} asked for, but torch sees no CUDA; give cpu")
    return torch.device(name)


def add_run(
    parser: argparse.ArgumentParser,
    *,
    new_tokens: int | None,
    repeats: int | None,
    eager: bool = True,
) -> None:
    """The flags of every bench that decodes, and their defaults; eager: compiling can be off."""
    if eager:
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--max_new_tokens", type=positive, default=new_tokens)
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU")
    parser.add_argument("--out", help="write the JSON there too")


def end_if_different(dtype: str, *, same: bool) -> None:
    """End the program where engines wrote different tokens in float32, in which they must not."""
    if not same and dtype == "float32":
        sys.exit("the engines disagree in fp32; that is a bug")


def refuse(text: str) -> NoReturn:
    """End the program because of what it was asked for."""
    say(f"error: {text}")
    sys.exit(2)


def check_plot(picture: str | Path | None) -> None:
    """End the program, before anything is measured, where no picture can be drawn."""
    if picture is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        refuse("--plot needs matplotlib; install it or leave the flag out")
    if not Path(picture).resolve().parent.is_dir():
        refuse(f"--plot {picture}: there is no folder {Path(picture).parent}; make it first")


def finish(result: dict[str, Any], out: str | None) -> None:
    """Write the result to `out` if given, and print it as the last line of stdout."""
    if out:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    print(json.dumps(result), flush=True)


def main(args: argparse.Namespace) -> None:
    finish(describe(__file__, sys.argv[1:], device=args.device), args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
