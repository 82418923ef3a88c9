"""What is tuned, and how is it measured?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fasteagle.draft.base import Drafter
from fasteagle.model import Transformer
from fasteagle.sample import SamplingParams
from fasteagle.tree import Tree

ROWS, DEPTH = 64, 8  # largest tree


@dataclass(frozen=True)
class Pair:
    """A target and a way to give its draft a tree.

    deepest: levels that the draft can guess; n_guesses: tokens that it guesses among; usual: the
    tree that it has when nobody says, which races too.
    """

    target: Transformer
    make: Callable[[Tree], Drafter]
    usual: Tree
    n_guesses: int
    deepest: int = DEPTH


@dataclass(frozen=True)
class Settings:
    """How to measure. max_new_tokens a prompt; repeats of the race; seconds to time the parts, and
    whole rounds as long; racers: trees in the race beside the usual one.
    """

    compiled: bool = True
    max_new_tokens: int = 128
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: Sequence[int] | None = None
    repeats: int = 5
    seconds: float = 10.0
    racers: int = 4
    rows: int = ROWS

    @property
    def limits(self) -> dict[str, Any]:
        """For Engine.generate."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "sampling": self.sampling,
            "stop_ids": self.stop_ids,
        }
