"""Does a waiting request take a finished one's row at once, and does nobody else notice?

B batch  S tokens of a prefill chunk
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import (
    DRAFTERS,
    SAMPLED,
    decode,
    eagle,
    plain_decode,
    prompt,
    short_engine,
    tiny_target,
    tokens_of,
)
from hypothesis import given
from hypothesis import strategies as st
from test_compile import nothing_is_compiled, regional, traced  # noqa: F401
from test_stops import Letters
from told_engine import LIMIT, ToldEngine, many_requests, texts_of

from fasteagle import request as host
from fasteagle.cache import KVCache
from fasteagle.engine import Engine
from fasteagle.request import Request, Row
from fasteagle.sample import SamplingParams
from fasteagle.seats import Seats, aligned_chunks


def told(name: str, queue: list[Request], batch: int) -> ToldEngine:
    return ToldEngine(tiny_target(), name, texts_of(queue), batch=batch, max_length=LIMIT)


@pytest.mark.parametrize("name", DRAFTERS)
def test_64_prompts_on_four_rows_give_what_each_gives_alone(name: str) -> None:
    target, queue = tiny_target(), many_requests(64, n_new=8)
    texts = {request: plain_decode(target, request.prompt, 8) for request in queue}
    engine = ToldEngine(target, name, texts, batch=4, max_length=LIMIT)
    wanted = [texts[request][: request.max_new_tokens] for request in queue]
    assert tokens_of(decode(engine, queue)) == wanted


def test_a_seeded_text_does_not_depend_on_the_row_or_the_turn_that_it_gets() -> None:
    sampling = [SamplingParams(0.8, top_k=5, seed=seed) for seed in range(3)]
    queue = [
        Request(tuple(prompt(3 + 2 * n)), 9, sampling[n % 3] if n % 2 else SamplingParams())
        for n in range(8)
    ]
    texts = texts_of(queue)
    for batch, order in ((3, queue), (2, queue[::-1])):
        results = decode(told("eagle", queue, batch), order)
        assert tokens_of(results) == [texts[request][:9] for request in order]


def test_a_free_seat_is_taken_in_the_next_step() -> None:
    queue = many_requests(12)
    engine = told("eagle", queue, 3)
    rows = engine.rows(queue)
    assert not engine.seat_of
    free = True  # a seat, when the last step had ended
    for _ in engine.decode(rows):
        started = [row for row in rows if row.tokens]
        assert started == rows[: len(started)], "out of the order of the queue"
        assert engine.log[-1] == ("prefill" if free else "round")
        free = len(started) < len(rows) and sum(not row.done for row in started) < 3
    seats = [engine.seat_of[row] for row in rows]
    assert seats[:3] == [0, 1, 2]
    assert set(seats) == {0, 1, 2}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_prefill_leaves_the_rows_that_go_on_as_they_are(name: str) -> None:
    # Row 0 is in the middle of its text while row 1 takes one prompt after another.
    queue = [Request(tuple(prompt(9)), 20), *many_requests(6, n_new=3)]
    engine = told(name, queue, 2)
    rows = engine.rows(queue)
    n_prefills = 0
    kept: list[torch.Tensor] = []
    for _ in engine.decode(rows):
        state, length = engine.state, int(engine.state.length[0])
        held = [state.tree.tokens[0], state.tree.parents[0], state.length[0], state.emitted[0]]
        for kv in (engine.builder.cache, engine.builder.memory):
            held += (
                [side[:, 0, :, :length] for side in (kv.k, kv.v)] if isinstance(kv, KVCache) else []
            )
        if engine.log[-1] == "prefill" and kept and not rows[0].done:
            n_prefills += 1
            assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
        kept = [tensor.clone() for tensor in held]
    assert n_prefills >= 3


def test_pieces_of_a_queue_join_to_the_texts() -> None:
    target, letters = tiny_target(), Letters()
    engine = Engine(target, eagle(target), tokenizer=letters, batch=2, prefill_chunk=8)
    queue = [
        engine.request(prompt(n), max_new_tokens=1 + 3 * n % 10, stop_ids=[]) for n in range(1, 8)
    ]
    rows = engine.rows(queue)
    texts, ends = [""] * len(rows), [0] * len(rows)
    for _ in engine.decode(rows):
        for index, row in enumerate(rows):
            texts[index] += "".join(piece.text for piece in row.pieces)
            ends[index] += sum(piece.result is not None for piece in row.pieces)
    assert texts == [row.text for row in rows]
    assert texts == [letters.push(plain_decode(target, q.prompt, q.max_new_tokens)) for q in queue]
    assert ends == [1] * len(rows)


def test_caches_are_made_for_the_longest_of_the_queue_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fasteagle.engine.DEFAULT_ROOM", 32)
    target, lengths = tiny_target(), [5, 9, 3, 80, 4]
    engine = Engine(target, eagle(target), batch=2, prefill_chunk=8)
    rows = engine.rows([engine.request(prompt(n), max_new_tokens=10, stop_ids=[]) for n in lengths])
    places = {engine.state.length.data_ptr() for _ in engine.decode(rows)}
    assert len(places) == 1
    assert engine.room == 128
    assert [row.tokens for row in rows] == [plain_decode(target, prompt(n), 10) for n in lengths]


def test_one_bad_prompt_far_behind_refuses_the_queue_before_a_step() -> None:
    engine = ToldEngine(tiny_target(), "eagle", {}, batch=2, max_length=LIMIT)
    with pytest.raises(ValueError, match="at most 39"):
        engine.generate([*([3] for _ in range(9)), prompt(50)])
    assert engine.log == []


def test_clocks_run_from_when_a_request_is_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(host.time, "perf_counter", lambda: float(next(ticks)))
    target = tiny_target()
    results = Engine(target).generate([prompt(3), prompt(4)], max_new_tokens=5, stop_ids=[])
    # Two readings when they are handed in, then one a step: five steps each.
    assert [one.stats.seconds for one in results] == [6.0, 10.0]
    assert [one.stats.ttft for one in results] == [2.0, 6.0]
    assert [one.stats.tpot for one in results] == [1.0, 1.0]
    assert [one.stats.rounds for one in results] == [4, 4]


# ---------------------------------------------------------------- compiled steps


# Without and with a drafter, in the CPU's form and in CUDA's, a mixed queue and a greedy one.
@pytest.mark.parametrize(
    ("kind", "form", "sampling"),
    [("none", "traced", SAMPLED), ("eagle", "regional", SamplingParams())],
    ids=["mixed", "greedy"],
)
def test_refill_builds_nothing_after_warm_up(
    kind: str, form: str, sampling: SamplingParams, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(form)
    engine, eager = (short_engine(kind, compiled=on, batch=3, n_layers=1) for on in (True, False))
    engine.warm_up(sampled=not sampling.greedy, longest=32)
    built = set(engine.steps)
    assert len(built) == 3
    queue = [
        Request(tuple(prompt(1 + 5 * n % 13)), 1 + 4 * n % 7, (sampling, SamplingParams())[n % 2])
        for n in range(11)
    ]
    with nothing_is_compiled():
        results = decode(engine, queue)
    assert set(engine.steps) == built
    assert tokens_of(results) == tokens_of(decode(eager, queue))


# ---------------------------------------------------------------- the queue alone


@given(
    lengths=st.dictionaries(st.integers(0, 15), st.integers(1, 50), min_size=1),
    size=st.integers(1, 20),
)
def test_chunks_hold_every_prompt_in_order_and_end_together(
    lengths: dict[int, int], size: int
) -> None:
    chunks = aligned_chunks(lengths, size)
    assert len(chunks) == -(-max(lengths.values()) // size)
    assert set(chunks[-1]) == set(lengths)
    for seat, length in lengths.items():
        parts = [chunk[seat] for chunk in chunks if seat in chunk]
        assert list(itertools.chain(*parts)) == list(range(length))
        assert all(0 < len(part) <= size for part in parts)
        assert all(len(part) == size for part in parts[:-1])
        assert [seat in chunk for chunk in chunks] == sorted(seat in chunk for chunk in chunks)


def test_seats_are_filled_in_the_order_of_the_queue() -> None:
    rows = [Row(Request((1,), 1), 10, None, 0) for _ in range(5)]
    seats = Seats(rows, 2)
    assert not seats.over
    assert seats.fill() == seats.busy() == {0: rows[0], 1: rows[1]}
    assert seats.fill() == {}
    rows[1].take([7], drafted=0)
    assert seats.busy() == {0: rows[0]}
    assert seats.fill() == {1: rows[2]}
    for row in (rows[0], rows[2]):
        row.take([7], drafted=0)
    assert seats.fill() == {0: rows[3], 1: rows[4]}
    rows[3].take([7], drafted=0)
    assert seats.fill() == {}
    assert not seats.over
    rows[4].take([7], drafted=0)
    assert seats.over
