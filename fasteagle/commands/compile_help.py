"""Who compiles rounds while a command compiles what prompts need? The same command once more."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fasteagle.compile import before_tracing
from fasteagle.engine import Engine
from fasteagle.step_files import cache_folder

HELPS = "FASTEAGLE_COMPILE_HELPER"  # set in a helper: what it is to compile
MOST_BYTES = 2**30  # of weights that are loaded twice for it


class Process(subprocess.Popen[bytes]):
    """A second process, with the compilers that it starts in a session of their own."""

    def kill(self) -> None:
        """Stop it and its compilers."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def side_by_side(
    first: Callable[[], object],
    rest: Callable[[], object],
    *,
    engine: Engine,
    call: Sequence[str] | None,
    part: str,
    lag: bool = False,
) -> bool:
    """Do `first`, then `rest`, each of which compiles steps of an engine. A second process, which
    finds `part` in HELPS, does the rest meanwhile and keeps it for this one.

    It starts only when something is to be compiled, and where it can be kept, there is a core for
    it and memory for a second copy of the model. What it has not done when it ends is done here.
    call: the words of this command. lag: return after `first`, and do the rest when a step of it
    first runs. Returned is whether it came to that.
    """
    started: list[Process] = []
    words = list(call or ())
    if words and can_help(engine):
        before_tracing.append(lambda: started.append(helper(words, part)))
    try:
        first()
        before_tracing[:] = [process.wait for process in started]
        if lag and started:
            atexit.register(end, started)
            return True
        rest()
    except BaseException:
        end(started)
        raise
    end(started)
    return False


def end(processes: Sequence[Process]) -> None:
    """Stop processes that nobody waits for any longer, and let the next command start its own."""
    before_tracing.clear()
    for process in processes:
        process.kill()
        process.wait()


def can_help(engine: Engine) -> bool:
    """Whether a second process is worth its while."""
    if not engine.compiler.traces:
        return False
    modules = [engine.target, engine.drafter.weights]
    weights = {p.data_ptr(): p.nbytes for m in modules if m is not None for p in m.parameters()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) > 1 and cache_folder() is not None and sum(weights.values()) <= MOST_BYTES


def helper(call: Sequence[str], part: str) -> Process:
    """This command once more, silently, up to where its rounds are compiled. What the first token
    waits for goes first.
    """
    nice = shutil.which("nice")
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return Process(
        [*([nice, "-n", "5"] if nice else []), sys.executable, "-m", "fasteagle", *call],
        env={**os.environ, HELPS: part, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
