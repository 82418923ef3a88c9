"""How fast was it, and how often was the draft right?

Definitions, the same for every drafter and for plain decoding:
new_tokens       tokens returned, a stop token that ended the text included, nothing after it
ttft             seconds from handing the request in to its first token: its prefill and, where more
                 requests than rows were handed in together, its wait for a row; seconds in which
                 steps were compiled count in none of these times
tpot             seconds a token after the first; prefills of others that join meanwhile included
tokens_per_second  new_tokens / total seconds, wait and prefill included
decode_tokens_per_second  1 / tpot
rounds           target forwards after prefill
accept_length    tokens a target forward yields, the bonus included: mean of accepted + 1 over
                 rounds, before a stop or a limit cuts the last round (tau in the EAGLE papers)
acceptance       by depth d: share that accepted depth d among the rounds that accepted depth d - 1
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Stats:
    """Counts and times of one request; the derived numbers are properties."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    ttft: float = 0.0  # seconds
    seconds: float = 0.0  # from handing in to the last token: wait for a row, prefill, rounds
    accepted: list[int] = field(default_factory=list)  # drafted tokens accepted, a round each
    max_depth: int = 0  # drafted tokens on the longest path

    @property
    def rounds(self) -> int:
        return len(self.accepted)

    @property
    def tpot(self) -> float:
        """Seconds a token after the first; 0 if there is no second token."""
        return (self.seconds - self.ttft) / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return 1.0 / self.tpot if self.tpot else 0.0

    @property
    def accept_length(self) -> float:
        return sum(self.accepted) / self.rounds + 1 if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Conditional acceptance by depth, first depth first; 0 where no round got that far."""
        reached = [sum(a >= d for a in self.accepted) for d in range(self.max_depth + 1)]
        return [b / a if a else 0.0 for a, b in pairwise(reached)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, derived numbers included, as plain JSON values."""
        derived = (
            "rounds", "tpot", "tokens_per_second", "decode_tokens_per_second", "accept_length",
            "acceptance",
        )  # fmt: skip
        return asdict(self) | {name: getattr(self, name) for name in derived}


def merge(stats: list[Stats]) -> Stats:
    """One Stats over several requests run one after another: counts and times add up.

    The times of requests that ran together overlap: their common rate needs a clock of its own.
    """
    return Stats(
        prompt_tokens=sum(s.prompt_tokens for s in stats),
        new_tokens=sum(s.new_tokens for s in stats),
        ttft=sum(s.ttft for s in stats) / len(stats) if stats else 0.0,
        seconds=sum(s.seconds for s in stats),
        accepted=[a for s in stats for a in s.accepted],
        max_depth=max((s.max_depth for s in stats), default=0),
    )


def significant(value: float, digits: int = 4) -> float:
    """A number cut to its significant digits, so that JSON stays readable."""
    return float(f"{value:.{digits}g}")
