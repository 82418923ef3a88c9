"""In which Python does a peer run? A virtual environment of its own, made on first use.

Versions are those of constraints.txt, torch above all, except where a peer needs others. PIP_ARGS
adds flags for pip, as in the Makefile. A folder is made anew when what belongs in it changes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.environment import say  # noqa: E402
from bench.peer_link import PeerError  # noqa: E402

CONSTRAINTS = HERE.parent / "constraints.txt"
MADE = "made.txt"  # written last, so that half an environment is not taken for one


class Environment(NamedTuple):
    """What pip installs, and in a second call what comes `alone`, without its dependencies."""

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    free: frozenset[str] = frozenset()  # names that constraints.txt must not pin


ENVIRONMENTS = {
    "transformers": Environment(("torch", "numpy", "safetensors", "transformers")),
    # Its metadata pins a torch of 2023 and wants a chat server, three web clients and wandb.
    "eagle_llm": Environment(
        ("torch", "numpy", "safetensors", "transformers==4.36.2", "accelerate==1.15.0"),
        alone=("eagle-llm==1.2.0",),
        free=frozenset({"transformers", "tokenizers", "huggingface-hub"}),
    ),
}


def default_folder() -> Path:
    """In the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fasteagle" / "peers"


def interpreter(name: str, folder: Path) -> str:
    """The Python of ENVIRONMENTS[name] below `folder`; PeerError if it cannot be made."""
    environment = ENVIRONMENTS[name]
    place = folder / name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = constraints(environment)
    installs = environment.packages + environment.alone
    wanted = "\n".join([sys.version, *installs, *pins])
    made = place / MADE
    if made.is_file() and python.is_file() and made.read_text() == wanted:
        return str(python)
    say(f"{name}: installing {', '.join(installs)} into {place}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "constraints.txt").write_text("\n".join(pins) + "\n")
    call(name, [sys.executable, "-m", "venv", str(place)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["-c", str(place / "constraints.txt"), *shlex.split(os.environ.get("PIP_ARGS", ""))]
    call(name, [*pip, *environment.packages])
    if environment.alone:
        call(name, [*pip, "--no-deps", *environment.alone])
    made.write_text(wanted)
    return str(python)


def constraints(environment: Environment) -> list[str]:
    """The pins of constraints.txt, but those that the peer chooses itself."""
    lines = [line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    return [line for line in lines if line and normal(line) not in environment.free]


def normal(requirement: str) -> str:
    """A requirement's name as pip compares it: `Jinja_2==3.1` -> `jinja-2`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s=<>!~;\[]", requirement)[0]).lower()


def call(name: str, words: list[str]) -> None:
    """Run a step of the installation; PeerError with its last line if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said or ["no message"]
        step = "the venv module" if "venv" in words else "pip"
        raise PeerError(
            f"the environment {name} cannot be made: {step} ended with status {done.returncode}: "
            f"{errors[0]:.300}; see to it, or leave its engines out with --engines"
        )
