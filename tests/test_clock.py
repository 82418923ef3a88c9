"""Is a call timed alone, or after another that is not timed? What follows what in a round?"""

from __future__ import annotations

import pytest
import torch

from fasteagle import clock
from fasteagle.tuning.costs import neighbours

CPU = torch.device("cpu")


class Machine:
    """A clock that only calls move, and what was called."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def call(self, name: str, seconds: float) -> None:
        self.calls += name
        self.now += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clock, "own_timer", lambda device: lambda: machine.now)
    return machine


def test_what_runs_before_is_not_timed(machine: Machine) -> None:
    """b is slower right after a: 3 s, not 2."""
    calls = {
        "a": lambda: machine.call("a", 5.0),
        "b": lambda: machine.call("b", 3.0 if machine.calls[-1] == "a" else 2.0),
    }
    alone = clock.take_turns(calls, CPU, seconds=0)
    assert alone == {"a": 5.0e3, "b": 2.0e3}
    machine.calls = ""
    after = clock.take_turns(calls, CPU, seconds=0, before={"b": calls["a"]})
    assert after == {"a": 5.0e3, "b": 3.0e3}
    assert machine.calls.endswith("abab")


def test_parts_of_a_round_follow_one_another() -> None:
    checks = {n: lambda: None for n in (1, 2, 6)}
    drafts = {"chain 1": lambda: None, "base": lambda: None}
    steps = {f"rows {n}": check for n, check in checks.items()} | drafts
    found = neighbours(steps, checks)
    assert found == {
        "rows 2": steps["chain 1"],
        "rows 6": steps["chain 1"],
        "chain 1": checks[2],
        "base": checks[2],
    }
