"""Does any drafter read what lies behind a sequence: padding, leftovers, other slots?

B batch  S new tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import (
    DRAFTERS,
    SCRIPTED,
    VOCAB,
    decode,
    plain_decode,
    prompt,
    tiny_target,
    tokens_of,
)

from fasteagle.cache import KVCache
from fasteagle.draft.history import History
from fasteagle.draft.hybrid import Both
from fasteagle.draft.lookahead import Trajectories
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Request

HUGE = 1e4  # times a weight of exactly 0 it is 0; a NaN would stay one, whatever the mask says


def texts(target: Transformer, lengths: list[int], n: int) -> tuple[list[list[int]], list[Any]]:
    prompts = [prompt(length, 7) for length in lengths]
    return prompts, [plain_decode(target, tokens, n) for tokens in prompts]


def caches_of(memory: object) -> list[KVCache]:
    """The caches in a drafter's memory."""
    inner = memory.model if isinstance(memory, Both) else memory
    return [inner] if isinstance(inner, KVCache) else []


def histories_of(memory: object) -> list[History]:
    """The texts in a drafter's memory."""
    inner = memory.history if isinstance(memory, Both | Trajectories) else memory
    return [inner] if isinstance(inner, History) else []


class Soiled(Engine):
    """Whatever must not be read holds huge values or random tokens, from the start and always."""

    def soil(self, lengths: Sequence[int]) -> None:
        memory = self.builder.memory
        for row, length in enumerate(lengths):
            for kv in (self.builder.cache, *caches_of(memory)):
                kv.k[:, row, :, length:] = HUGE
                kv.v[:, row, :, length:] = -HUGE
            for history in histories_of(memory):
                rest = history.tokens[row, length + 1 :]  # the root is at `length`
                rest.copy_(torch.randint(VOCAB, rest.shape))
        if isinstance(memory, Trajectories):  # where the pool puts what it does not want
            last = memory.pool.grams[:, -1]
            last.copy_(torch.randint(VOCAB, last.shape))

    def _run(self, kind: str, longest: int, sampled: bool) -> None:
        chunk = self.state.chunk
        for row, count in enumerate(chunk.n_valid.tolist() if kind != "round" else ()):
            known = count - (kind == "prefill")  # of the followers; the root is the last one
            for side, end in ((chunk.tokens, count), (chunk.following, max(known, 0))):
                side[row, end:] = torch.randint(VOCAB, side[row, end:].shape)
        super()._run(kind, longest, sampled)

    def run_soiled(self, requests: Sequence[Request]) -> tuple[list[list[int]], list[list[int]]]:
        """Texts and accepted counts."""
        self.soil([0] * self.batch)
        rows = self.rows(requests)
        for _ in self.decode(rows):
            self.soil(self.state.length.tolist())
        return [row.tokens for row in rows], [row.stats.accepted for row in rows]


@pytest.mark.parametrize("name", DRAFTERS)
def test_padding_and_leftovers_are_never_read(name: str) -> None:
    target = tiny_target()
    prompts, expected = texts(target, [1, 9, 20], 24)
    truth = [p + text for p, text in zip(prompts, expected, strict=True)]
    soiled, clean = (
        kind(target, DRAFTERS[name](target, truth), batch=3, prefill_chunk=8)
        for kind in (Soiled, Engine)
    )
    requests = [clean.request(tokens, max_new_tokens=24, stop_ids=[]) for tokens in prompts]
    results = decode(clean, requests)
    found, accepted = soiled.run_soiled(requests)
    assert found == tokens_of(results) == expected
    assert accepted == [result.stats.accepted for result in results]


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name not in SCRIPTED])
def test_slots_outside_the_bucket_are_not_touched(name: str) -> None:
    # NaN is fit for these: attention is not given the slots at all.
    target, tokens = tiny_target(), prompt(9)
    engine = Engine(target, DRAFTERS[name](target, []))
    reach = len(tokens) + 20 + engine.drafter.n_path + engine.drafter.n_ahead
    first = next(size for size in engine.buckets if size >= reach)
    caches = [engine.builder.cache, *caches_of(engine.builder.memory)]
    for kv in caches:
        kv.k[..., first:, :], kv.v[..., first:, :] = torch.nan, torch.nan
    result = engine.generate([tokens], max_new_tokens=20, stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, 20)
    outside = [side[..., first:, :] for kv in caches for side in (kv.k, kv.v)]
    assert all(side.numel() and side.isnan().all() for side in outside)
