"""How do drafters that follow a script keep up when requests change seats? They are told.

B batch
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from conftest import DRAFTERS, plain_decode, prompt, tiny_target

from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Request, Row
from fasteagle.sample import SamplingParams

# How often these are right depends on a random number, which all rows draw from one source.
RANDOM = {"random", "wrong_once", "decoys"}
LIMIT = 40  # tokens of context in the tests of batches


class ToldEngine(Engine):
    """An engine on which a drafter knows whose text each row holds; notes who took which seat."""

    def __init__(
        self,
        target: Transformer,
        name: str,
        texts: Mapping[Request, list[int]],
        *,
        batch: int = 1,
        **sizes: Any,
    ) -> None:
        self.texts = texts
        self.truth: list[list[int]] = [[] for _ in range(batch)]
        self.seat_of: dict[Row, int] = {}
        self.log: list[str] = []
        drafter = DRAFTERS[name](target, self.truth)
        super().__init__(target, drafter, batch=batch, prefill_chunk=8, **sizes)

    def _admit(self, seat: int, row: Row) -> None:
        self.seat_of[row] = seat
        self.truth[seat] = [*row.request.prompt, *self.texts[row.request]]
        super()._admit(seat, row)

    def _run(self, kind: str, longest: int, sampled: bool) -> None:
        self.log.append(kind)
        super()._run(kind, longest, sampled)


@cache
def whole_text(tokens: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    """What a request alone would give without a stop: the slow twin's, or one seed's at batch 1."""
    target = tiny_target()
    room = LIMIT - len(tokens)
    if sampling.greedy:
        return plain_decode(target, tokens, room)
    return (
        _plain_engine()
        .generate([tokens], sampling=sampling, max_new_tokens=room, stop_ids=[])[0]
        .tokens
    )


@cache
def _plain_engine() -> Engine:
    return Engine(tiny_target(), max_length=LIMIT)


def texts_of(requests: list[Request]) -> dict[Request, list[int]]:
    return {request: whole_text(request.prompt, request.sampling) for request in requests}


def many_requests(count: int, n_new: int = 12) -> list[Request]:
    """Greedy requests of many lengths and limits, none like another."""
    return [
        Request(tuple(prompt(1 + 7 * index % 20, index)), 1 + 5 * index % n_new)
        for index in range(count)
    ]
