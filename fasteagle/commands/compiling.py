"""Can steps be compiled here, and how long does it take?"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch.utils._triton import has_triton

from fasteagle.commands import first_line
from fasteagle.commands.compile_help import HELPS, side_by_side
from fasteagle.commands.report import note
from fasteagle.engine import Engine
from fasteagle.errors import ran_out_of_memory


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
    lag: bool = False,
) -> float:
    """Compile every step for sequences of `n_tokens`; returns the seconds.

    n_prompt: how many of them are the prompt's at most, if that is known. call: the words of this
    command, with which a second process may compile rounds meanwhile. lag: not to wait for it.
    """
    note("compiling ...", end=" ")
    started = time.perf_counter()
    reach = engine.drafter.n_path + engine.drafter.n_ahead
    short = n_prompt is not None and n_prompt <= engine.prefill_chunk
    prompts = ["prefill"] if short else ["extend", "prefill"]
    sizes: Sizes = {"sampled": sampled, "longest": n_tokens + reach}
    rounds = [] if n_prompt is not None and n_tokens <= n_prompt + 1 else ["round"]
    try:
        lags = _build(engine, sizes, prompts, rounds, call if rounds else None, lag=lag)
    except RuntimeError as error:  # Dynamo's and Inductor's errors are
        if ran_out_of_memory(error):
            raise
        raise ValueError(
            f"compiling failed ({first_line(error)}); leave out --compile, and see what "
            "`fasteagle doctor` says of torch.compile"
        ) from error
    seconds = time.perf_counter() - started
    note(f"{seconds:.1f} s" + (" for the first token; the rest goes on" if lags else ""))
    return seconds


def _build(
    engine: Engine,
    sizes: Sizes,
    prompts: Sequence[str],
    rounds: Sequence[str],
    call: Sequence[str] | None,
    *,
    lag: bool,
) -> bool:
    """Build the kinds of steps that prompts and rounds need, with the help of a second process;
    whether rounds lag behind. That process builds rounds and ends here.
    """
    helps, part = os.environ.get(HELPS), "sampled" if sizes["sampled"] else "greedy"
    if helps == part:
        engine.warm_up(**sizes, kinds=rounds)
        sys.exit(0)
    if helps is not None:  # what it is asked for comes later
        return False
    return side_by_side(
        lambda: engine.warm_up(**sizes, kinds=prompts),
        lambda: engine.warm_up(**sizes, kinds=rounds),
        engine=engine,
        call=call,
        part=part,
        lag=lag,
    )
