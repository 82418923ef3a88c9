"""What came out of peers.py? Ratios of neighbours, whose tokens are plain's, and the table."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import significant, spread
from bench.peer_link import Worker

RATIOS = (
    ("eagle", "plain"),
    ("eagle", "eagle_llm"),
    ("eagle", "transformers"),
    ("eagle", "transformers_compiled"),
    ("eagle", "gpt_fast"),
    ("plain", "eagle_llm_plain"),
    ("plain", "transformers_compiled"),
    ("plain", "gpt_fast"),
    ("eagle_llm", "eagle_llm_plain"),
)

Answers = list[dict[str, Any]]


def total(answers: Answers) -> float:
    """Seconds of all prompts of a repeat."""
    return sum(answer["seconds"] for answer in answers)


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """How many times faster: the median over repeats of the ratio of neighbours, or None."""
    found: dict[str, float | None] = {}
    for one, other in RATIOS:
        name = f"{one}_over_{other}"
        found[name] = None
        if one in seconds and other in seconds:
            pairs = zip(seconds[one], seconds[other], strict=True)
            found[name] = significant(statistics.median(theirs / ours for ours, theirs in pairs))
    return found


def compare_tokens(answers: Answers, reference: Answers | None) -> dict[str, Any]:
    """Whether an engine made plain's tokens, how many prompts differ, and where the first does."""
    if reference is None:
        return {"same_tokens": None, "prompts_that_differ": None, "first_difference": None}
    differences = [
        {"prompt": number, "token": token, "plain": right, "found": wrong}
        for number, (answer, wanted) in enumerate(zip(answers, reference, strict=True))
        for token, wrong, right in first_difference(answer["tokens"], wanted["tokens"])
    ]
    return {
        "same_tokens": not differences,
        "prompts_that_differ": len(differences),
        "first_difference": differences[0] if differences else None,
    }


def first_difference(found: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, int, int]]:
    """Where two texts part, as [(place, found, wanted)], or nothing."""
    pairs = enumerate(zip(found, wanted, strict=True))
    return [(n, one, other) for n, (one, other) in pairs if one != other][:1]


def accept_length(answers: Answers) -> float | None:
    """Tokens that a round yields, the bonus included; None where nothing is drafted."""
    rounds = sum(answer.get("rounds", 0) for answer in answers)
    return significant(sum(a["advanced"] for a in answers) / rounds) if rounds else None


def summarize(
    found: Mapping[str, list[Answers]], workers: Mapping[str, Worker], new_tokens: int
) -> dict[str, Any]:
    """What each engine did, by name."""
    plain = found["plain"][-1] if "plain" in found else None
    return {
        name: {
            "tokens_per_s": spread([new_tokens * len(one) / total(one) for one in answers]),
            "accept_length": accept_length(answers[-1]),
            **compare_tokens(answers[-1], plain),
            "versions": workers[name].versions,
        }
        for name, answers in found.items()
    }


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    line = "{:>22} {:>9} {:>9} {:>9} {:>7}  {}"
    print(line.format("", "tokens/s", "min", "max", "accept", "plain's tokens"))
    for name, row in result["engines"].items():
        speeds = (row["tokens_per_s"][key] for key in ("median", "min", "max"))
        same = {True: "yes", False: f"no: {row['first_difference']}", None: "-"}[row["same_tokens"]]
        print(line.format(name, *speeds, row["accept_length"] or "-", same))
    for name, ratio in result["ratios"].items():
        print(f"{name.replace('_over_', ' over '):>40} {ratio or 'not measured'}")
