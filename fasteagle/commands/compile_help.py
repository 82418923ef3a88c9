"""Who compiles rounds while a command compiles what prompts need? The same command once more."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from fasteagle.compile import before_tracing
from fasteagle.engine import Engine
from fasteagle.step_files import cache_folder

HELPS = "FASTEAGLE_COMPILE_ROUNDS"  # set in a helper: "greedy" or "sampled"
MOST_BYTES = 2**30  # of weights that are loaded twice for it


class Sizes(TypedDict):
    """What Engine.warm_up prepares for."""

    sampled: bool
    longest: int


def with_help(
    engine: Engine,
    sizes: Sizes,
    prompts: Sequence[str],
    call: Sequence[str] | None,
    choice: str,
    *,
    lag: bool,
) -> bool:
    """Compile what prompts need here and rounds in a second process, which keeps them for this one.

    It starts only when something is to be compiled, and where it can be kept, there is a core for
    it and memory for a second copy of the model. The first round waits for it, and if it fails
    this process does its part. lag: return before that; whether it came to that is returned.
    """
    started: list[subprocess.Popen[bytes]] = []
    words = list(call or ())
    if words and engine.compiler.traces and can_help(engine):
        before_tracing.append(lambda: started.append(helper(words, choice)))
    try:
        engine.warm_up(**sizes, kinds=prompts)
        before_tracing[:] = [process.wait for process in started]
        if lag and started:
            atexit.register(end, started)
            return True
        engine.warm_up(**sizes, kinds=["round"])
    except BaseException:
        end(started)
        raise
    end(started)
    return False


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop processes that nobody waits for any longer, and let the next command start its own."""
    before_tracing.clear()
    for process in processes:
        process.kill()
        process.wait()


def can_help(engine: Engine) -> bool:
    """Whether a second process is worth its while."""
    modules = [engine.target, engine.drafter.weights]
    weights = {p.data_ptr(): p.nbytes for m in modules if m is not None for p in m.parameters()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) > 1 and cache_folder() is not None and sum(weights.values()) <= MOST_BYTES


def helper(call: Sequence[str], choice: str) -> subprocess.Popen[bytes]:
    """This command once more, silently, up to where its rounds are compiled. What the first token
    waits for goes first.
    """
    nice = shutil.which("nice")
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [*([nice, "-n", "5"] if nice else []), sys.executable, "-m", "fasteagle", *call],
        env={**os.environ, HELPS: choice, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
