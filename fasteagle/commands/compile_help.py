"""Who compiles a command's other steps while it compiles some? The same command once more."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fasteagle.commands.report import note
from fasteagle.compile import before_tracing
from fasteagle.engine import Engine
from fasteagle.step_files import writable_folder

HELPS = "FASTEAGLE_COMPILE_HELPER"  # set in a helper: what it is to compile
MOST_BYTES = 2**30  # of weights that are loaded twice for it
NICE = 10  # a tenth of a core that this process wants, too
helping: list[Process] = []  # those that compile for the next command


class Process(subprocess.Popen[bytes]):
    """A second process, with the compilers that it starts in a process group of their own."""

    def kill(self) -> None:
        """Stop it and its compilers."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


class NotKeptError(Exception):
    """A step has to be compiled."""


def side_by_side(
    first: Callable[[], object],
    rest: Callable[[], object],
    *,
    engine: Engine,
    call: Sequence[str] | None,
    part: str,
) -> None:
    """Do `first`, then `rest`, each of which compiles steps of an engine. A second process, which
    finds `part` in HELPS, does the rest meanwhile and keeps it for this one.

    It starts only when something is to be compiled, and where it can be kept, there is a core for
    it and memory for a second copy of the model. What it has not done when it ends is done here.
    call: the words of this command.
    """
    started: list[Process] = []
    words = list(call or ())
    if words and can_help(engine):
        before_tracing.append(lambda: started.append(helper(words, part)))
    try:
        first()
        before_tracing[:] = [process.wait for process in started]
        rest()
    finally:
        before_tracing.clear()
        end(started)


def is_kept(build: Callable[[], object]) -> bool:
    """Do `build`; False as soon as a step was not kept, which is not compiled."""

    def stop() -> None:
        raise NotKeptError

    before_tracing[:] = [stop]
    try:
        build()
    except NotKeptError:
        return False
    finally:
        before_tracing.clear()
    return True


def help_later(call: Sequence[str], part: str) -> None:
    """Let a second process compile `part` for the next command, within `waiting_for_help`."""
    helping.append(helper(call, part))


@contextmanager
def waiting_for_help() -> Iterator[None]:
    """Around a command: wait at its end until second processes have kept what they compile for the
    next one, or stop them where it fails or is told to.
    """
    try:
        yield
        if any(process.poll() != 0 for process in helping):  # None while it runs
            wait_for_help()
    finally:
        end(helping)
        helping.clear()


def wait_for_help() -> None:
    """Wait for second processes until they end or the user has enough."""
    note("compiling for the next start; Ctrl-C leaves that out ...", end=" ")
    begin = time.perf_counter()
    try:
        statuses = [process.wait() for process in helping]
    except KeyboardInterrupt:
        note("left out")
        return
    failed = any(statuses)
    note("failed, so that it is as slow" if failed else f"{time.perf_counter() - begin:.1f} s")


def end(processes: Sequence[Process]) -> None:
    """Stop processes that nobody waits for any longer."""
    for process in processes:
        process.kill()
        process.wait()


def can_help(engine: Engine) -> bool:
    """Whether a second process is worth its while."""
    if not engine.compiler.traces or not hasattr(os, "killpg"):
        return False
    modules = [engine.target, engine.drafter.weights]
    weights = {p.data_ptr(): p.nbytes for m in modules if m is not None for p in m.parameters()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fits = sum(weights.values()) <= MOST_BYTES
    return fits and (cores or 1) > 1 and writable_folder() is not None


def helper(call: Sequence[str], part: str) -> Process:
    """This command once more, silently, up to where its part is compiled, and behind this one."""
    nice = shutil.which("nice")
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return Process(
        [*([nice, "-n", str(NICE)] if nice else []), sys.executable, "-m", "fasteagle", *call],
        env={**os.environ, HELPS: part, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,  # a session of its own would make Linux weigh it like this one
    )
