"""Can steps be compiled here, and how long does it take?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch.utils._triton import has_triton

from fasteagle.commands import first_line, ran_out_of_memory
from fasteagle.commands.report import note
from fasteagle.compile import before_tracing
from fasteagle.engine import Engine
from fasteagle.step_files import cache_folder

HELPS = "FASTEAGLE_COMPILE_PROMPTS"  # set in a helper: "greedy" or "sampled"
MOST_BYTES = 2**30  # of weights that are loaded twice for it


class Sizes(TypedDict):
    """What Engine.warm_up prepares for."""

    sampled: bool
    longest: int


def compiler_problem(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, if anything."""
    if device.type == "cuda":
        return None if has_triton() else "Triton, which is not installed"
    program = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    return None if shutil.which(program) else f"a C++ compiler, and {program} is not found"


def require_compiler(device: torch.device) -> None:
    """ValueError if nothing here can compile for `device`."""
    problem = compiler_problem(device)
    if problem:
        raise ValueError(f"--compile needs {problem}; install it, or leave out --compile")


def warm_up(
    engine: Engine,
    *,
    sampled: bool,
    n_tokens: int,
    n_prompt: int | None = None,
    call: Sequence[str] | None = None,
) -> float:
    """Compile every step for sequences of `n_tokens`; returns the seconds.

    n_prompt: how many of them are the prompt's at most, if that is known. call: the words of this
    command, with which a second process may compile the steps of prompts meanwhile.
    """
    note("compiling ...", end=" ")
    started = time.perf_counter()
    reach = engine.drafter.n_path + engine.drafter.n_ahead
    short = n_prompt is not None and n_prompt <= engine.prefill_chunk
    prompts = ["prefill"] if short else ["extend", "prefill"]
    sizes: Sizes = {"sampled": sampled, "longest": n_tokens + reach}
    wanted, mine = os.environ.get(HELPS), "sampled" if sampled else "greedy"
    try:
        if wanted is None:
            with_help(engine, sizes, prompts, call, mine)
        elif wanted == mine:
            engine.warm_up(**sizes, kinds=prompts)
            sys.exit(0)
    except RuntimeError as error:  # Dynamo's and Inductor's errors are
        if ran_out_of_memory(error):
            raise
        raise ValueError(
            f"compiling failed ({first_line(error)}); leave out --compile, and see what "
            "`fasteagle doctor` says of torch.compile"
        ) from error
    seconds = time.perf_counter() - started
    note(f"{seconds:.1f} s")
    return seconds


def with_help(
    engine: Engine, sizes: Sizes, prompts: Sequence[str], call: Sequence[str] | None, choice: str
) -> None:
    """Compile rounds here and what prompts need in a second process, which keeps it for this one.

    It starts only when something is to be compiled, and where it can be kept, there is a core for
    it and memory for a second copy of the model. If it fails, this process does its part.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        if call:
            started.append(helper(call, choice))

    if call and engine.compiler.traces and can_help(engine):
        before_tracing.append(start)
    try:
        engine.warm_up(**sizes, kinds=["round"])
        before_tracing.clear()
        for process in started:
            process.wait()
        engine.warm_up(**sizes, kinds=prompts)
    finally:
        before_tracing.clear()
        for process in started:
            process.kill()
            process.wait()


def can_help(engine: Engine) -> bool:
    """Whether a second process is worth its while."""
    modules = [engine.target, engine.drafter.weights]
    weights = {p.data_ptr(): p.nbytes for m in modules if m is not None for p in m.parameters()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) > 1 and cache_folder() is not None and sum(weights.values()) <= MOST_BYTES


def helper(call: Sequence[str], choice: str) -> subprocess.Popen[bytes]:
    """This command once more, silently, up to where its prompts' steps are compiled."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "fasteagle", *call],
        env={**os.environ, HELPS: choice, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
