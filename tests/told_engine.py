"""What do the tests of batches share? Drafters that are told whose text a row holds, slow twins.

An oracle drafter goes by the number of the row, where refill puts one request after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from conftest import CPU, DRAFTERS, full_pass, plain_decode, prompt, tiny_target

from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Request, Row
from fasteagle.sample import SamplingParams, choose, new_knobs

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
    """The slow twin: what a request gives until the context ends, computed anew for every token."""
    target, sequence = tiny_target(), list(tokens)
    if sampling.greedy:
        return plain_decode(target, tokens, LIMIT - len(tokens))
    knobs = new_knobs(1, LIMIT, CPU)
    knobs.load(0, sampling)
    while len(sequence) < LIMIT:
        logits = target.logits(full_pass(target, sequence)[:, -1:])
        position = torch.tensor([[len(sequence) - 1]])
        sequence.append(int(choose(logits, position, knobs, sampled=True)))
    return sequence[len(tokens) :]


def texts_of(requests: list[Request]) -> dict[Request, list[int]]:
    return {request: whole_text(request.prompt, request.sampling) for request in requests}


def many_requests(count: int, n_new: int = 12) -> list[Request]:
    """Greedy requests of many lengths and limits, none like another."""
    return [
        Request(tuple(prompt(1 + 7 * index % 20, index)), 1 + 5 * index % n_new)
        for index in range(count)
    ]
