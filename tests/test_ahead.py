"""Does a round that is launched before the last one is read change nothing but the time?"""

from __future__ import annotations

import random

import pytest
import torch
from conftest import SAMPLED, decode, plain_decode, tokens_of
from tiny_models import eagle, prompt, tiny_target

from fasteagle.ahead import Readback
from fasteagle.engine import Engine
from fasteagle.sample import SamplingParams


def engines(**sizes: int) -> list[Engine]:
    """One engine that reads at once, one that reads late."""
    made = [Engine(tiny_target(), eagle(tiny_target()), **sizes) for _ in range(2)]
    assert not made[0].ahead
    made[1].ahead = True
    return made


def launches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of steps that an engine runs from now on."""
    kinds, run = [], engine._run

    def noted(kind: str, longest: int, sampled: bool) -> None:
        kinds.append(kind)
        run(kind, longest, sampled)

    monkeypatch.setattr(engine, "_run", noted)
    return kinds


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_texts_reasons_and_rounds_are_the_same(batch: int, sampling: SamplingParams) -> None:
    rng, found = random.Random(batch), []
    queue = [(prompt(rng.randint(1, 30), n), rng.randint(1, 25)) for n in range(12)]
    for engine in engines(batch=batch, prefill_chunk=8):
        requests = [
            engine.request(tokens, max_new_tokens=limit, sampling=sampling, stop_ids=[4, 9])
            for tokens, limit in queue
        ]
        results = decode(engine, requests)
        found.append([(r.tokens, r.reason, r.stats.accepted) for r in results])
    assert found[0] == found[1]
    assert {reason for _, reason, _ in found[0]} == {"stop", "length"}


def test_one_round_at_most_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for engine in engines():
        kinds = launches(engine, monkeypatch)
        for limit in range(2, 30):
            kinds.clear()
            [result] = engine.generate([prompt(7, limit)], max_new_tokens=limit, stop_ids=[])
            counts.append(kinds.count("round") - result.stats.rounds)
    at_once, late = counts[:28], counts[28:]
    assert set(at_once) == {0}
    assert set(late) == {0, 1}


def test_the_next_round_is_launched_before_tokens_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, engine = engines()
    events = launches(engine, monkeypatch)
    deliver = Readback.deliver
    monkeypatch.setattr(Readback, "deliver", lambda self: (events.append("read"), deliver(self)))
    engine.generate([prompt(7)], max_new_tokens=12, stop_ids=[])
    assert events[:6] == ["prefill", "read", "round", "round", "read", "round"]


def test_a_text_may_fill_the_context() -> None:
    """Behind the last slots there is no room for a round that nobody asked for."""
    for max_length in range(24, 40):
        found = []
        for engine in engines(batch=2, max_length=max_length, prefill_chunk=8):
            prompts = [prompt(9, 1), prompt(4, 2)]
            results = engine.generate(prompts, max_new_tokens=99, stop_ids=[])
            found.append([(r.tokens, r.reason) for r in results])
        assert found[0] == found[1]
        assert [len(tokens) for tokens, _ in found[0]] == [max_length - 9, max_length - 4]


def test_a_stream_shows_the_same_pieces(engine: Engine) -> None:
    pieces = []
    for ahead in (False, True):
        engine.ahead = ahead
        try:
            made = engine.stream("def mean(values):\n", max_new_tokens=24, stop=["return"])
            pieces.append([(piece.text, piece.drafted) for piece in made])
        finally:
            engine.ahead = False
    assert pieces[0] == pieces[1]


def test_a_call_waits_for_its_own_waste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round launched is read before the call ends, the one thrown away too."""
    _, engine = engines()
    kinds, reads, deliver = launches(engine, monkeypatch), [], Readback.__init__

    def watched(self: Readback, *rest: object) -> None:
        deliver(self, *rest)  # type: ignore[arg-type]
        read = self.read
        self.read = lambda: (reads.append(1), read())[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(Readback, "__init__", watched)
    for limit in range(2, 12):
        engine.generate([prompt(7, limit)], max_new_tokens=limit, stop_ids=[])
        assert len(reads) == len(kinds)


def test_a_request_that_is_left_with_a_round_on_its_way_disturbs_nobody() -> None:
    _, engine = engines()
    rounds = engine.decode(engine.rows([engine.request(prompt(40), stop_ids=[])]))
    for _ in range(4):
        next(rounds)
    rounds.close()
    results = engine.generate([prompt(12)], max_new_tokens=9, stop_ids=[])
    assert tokens_of(results) == [plain_decode(engine.target, prompt(12), 9)]


def test_what_was_read_back_is_not_what_the_next_round_writes() -> None:
    engine, _ = engines()
    [row] = engine.rows([engine.request(prompt(5), max_new_tokens=9, stop_ids=[])])
    engine.state.emitted.copy_(torch.tensor([[5, *[0] * (engine.drafter.n_path - 1), 1]]))
    readback = Readback(engine.state, {0: row})
    engine.state.emitted.zero_()
    readback.deliver()
    assert row.tokens == [5]
