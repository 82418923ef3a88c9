"""Can steps be compiled here, and how long does it take?"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TypedDict

import torch
from torch.utils._triton import has_triton

from fasteagle.commands.compile_help import HELPS, can_help, help_later, is_kept, side_by_side
from fasteagle.commands.report import note
from fasteagle.engine import Engine
from fasteagle.parts import eager_prompts


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
    at_once: bool = False,
) -> float:
    """Compile every step for sequences of `n_tokens`; returns the seconds.

    n_prompt: how many of them are the prompt's at most, if that is known. call: the words of this
    command, with which a second process may compile some meanwhile. at_once: in float32, with
    such a process, compile nothing before the first token: where what prompts need is not kept they
    are fed eagerly while that process compiles it, within `waiting_for_help`; rounds that are not
    kept are compiled when they first run.
    """
    note("compiling ...", end=" ")
    started = time.perf_counter()
    reach = engine.drafter.n_path + engine.drafter.n_ahead
    short = n_prompt is not None and n_prompt <= engine.prefill_chunk
    prompts = ["prefill"] if short else ["extend", "prefill"]
    sizes: Sizes = {"sampled": sampled, "longest": n_tokens + reach}
    rounds = [] if n_prompt is not None and n_tokens <= n_prompt + 1 else ["round"]
    behind = _build(engine, sizes, prompts, rounds, call, at_once=at_once)
    seconds = time.perf_counter() - started
    note("goes on behind the first token" if behind else f"{seconds:.1f} s")
    return seconds


def _build(
    engine: Engine,
    sizes: Sizes,
    prompts: Sequence[str],
    rounds: Sequence[str],
    call: Sequence[str] | None,
    *,
    at_once: bool,
) -> bool:
    """Build the kinds of steps that prompts and rounds need, with the help of a second process;
    whether they come behind the first token. That process builds its part and ends here.
    """
    part = "sampled" if sizes["sampled"] else "greedy"
    feed, draft = (partial(engine.warm_up, **sizes, kinds=kinds) for kinds in (prompts, rounds))
    parts = {part: draft, f"{part} prompts": feed}
    helps = os.environ.get(HELPS)
    if helps in parts:
        parts[helps]()
        sys.exit(0)
    if helps is not None:  # what it is asked for comes later
        return False
    # In float32 eager steps say the same, so that a first start writes what the next ones do.
    if at_once and call and can_help(engine) and engine.target.dtype == torch.float32:
        fed = is_kept(feed)
        if not fed:
            help_later(call, f"{part} prompts")
            eager_prompts(engine, sampled=sizes["sampled"])
        return not (is_kept(draft) and fed)
    side_by_side(feed, draft, engine=engine, call=call if rounds else None, part=part)
    return False
