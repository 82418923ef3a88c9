"""Does every row of a batch give what its request gives alone, whoever sits beside it?

B batch  T cache slots
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import (
    BUSHY,
    DRAFTERS,
    VOCAB,
    decode,
    eagle,
    plain_decode,
    prompt,
    tiny_target,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stops import Letters, cut
from told_engine import LIMIT, RANDOM, ToldEngine, many_requests, texts_of

from fasteagle.cache import KVCache
from fasteagle.compat import EagleModel
from fasteagle.engine import Engine
from fasteagle.request import Generation, Request
from fasteagle.sample import SamplingParams
from fasteagle.tree import chain

JUNK = 1e30  # not NaN: zero times it is zero, as it is behind every mask


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Short and long prompts, some sampled; a limit of 1000 leaves the end to the context."""
    tokens = prompt(draw(st.integers(1, 20)), draw(st.integers(0, 1)))
    seed = draw(st.sampled_from([None, None, 1, 2]))
    return Request(
        tuple(tokens),
        max_new_tokens=draw(st.sampled_from([1, 2, 5, 9, 14, 1000])),
        sampling=SamplingParams(0.0 if seed is None else 0.9, seed=seed),
        stop_ids=frozenset(draw(st.sets(st.integers(0, VOCAB - 1), max_size=2))),
    )


def ending(request: Request, text: list[int]) -> tuple[list[int], str]:
    """Where a request that is alone ends, and why."""
    room = min(request.max_new_tokens, LIMIT - len(request.prompt))
    return cut(text, stop_ids=sorted(request.stop_ids), room=room)


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(sorted(DRAFTERS)),
    batch=st.integers(1, 16),
    queue=st.lists(requests(), min_size=1, max_size=20),
)
def test_every_row_ends_with_the_text_that_it_has_alone(
    name: str, batch: int, queue: list[Request]
) -> None:
    texts = texts_of(queue)
    engine = ToldEngine(tiny_target(), name, texts, batch=batch, max_length=LIMIT)
    results = decode(engine, queue)
    found = [(result.tokens, result.reason) for result in results]
    assert found == [ending(request, texts[request]) for request in queue]
    assert all(len(result.tokens) == result.stats.new_tokens for result in results)


@cache
def alone(name: str, request: Request) -> Generation:
    """The same request on an engine of one row."""
    engine = ToldEngine(tiny_target(), name, texts_of([request]), max_length=LIMIT)
    return decode(engine, [request])[0]


@pytest.mark.parametrize("name", sorted(set(DRAFTERS) - RANDOM))
def test_a_drafter_is_right_as_often_as_it_is_alone(name: str) -> None:
    # Exactly: nothing of a neighbour or of who sat there before reaches what it drafts from.
    queue = many_requests(10)
    for batch in (3, 16):
        engine = ToldEngine(tiny_target(), name, texts_of(queue), batch=batch, max_length=LIMIT)
        accepted = [result.stats.accepted for result in decode(engine, queue)]
        assert accepted == [alone(name, request).stats.accepted for request in queue]


def test_stop_strings_end_each_row_by_its_own() -> None:
    target, letters = tiny_target(), Letters()
    whole = {n: letters.push(plain_decode(target, prompt(n), 20)) for n in range(1, 9)}
    engine = Engine(target, eagle(target), tokenizer=letters, batch=3, prefill_chunk=8)
    queue = [
        engine.request(prompt(n), max_new_tokens=20, stop=[text[n : n + 2], "#"], stop_ids=[])
        for n, text in whole.items()
    ]
    found = [(result.text, result.reason) for result in decode(engine, queue)]
    wanted = [text[: text.index(text[n : n + 2])] for n, text in whole.items()]
    assert found == [(text, "stop") for text in wanted]


def spoil_idle_rows(engine: Engine, busy: int, junk: float) -> None:
    """Nonsense wherever a row behind the first `busy` ones keeps anything, junk in its caches."""
    state, idle = engine.state, slice(busy, None)
    count = engine.batch - busy
    for tensor in state.tensors():
        if tensor.dtype == torch.int64:
            tensor[idle] = torch.randint(0, 2, tensor[idle].shape)
    state.tree.tokens[idle] = torch.randint(0, VOCAB, state.tree.tokens[idle].shape)
    state.tree.parents[idle, :2] = 0  # parents come first, in junk as well
    state.length[idle] = torch.randint(0, 2 * engine.n_slots, (count,))
    state.knobs.temperature[idle], state.knobs.uniforms[idle] = 3.0, 0.999
    for kv in (engine.builder.cache, engine.builder.memory):
        for side in (kv.k, kv.v) if isinstance(kv, KVCache) else ():
            side[:, idle] = junk


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [None, chain(3), BUSHY], ids=["none", "chain", "bushy"])
def test_what_an_idle_row_holds_is_never_read(tree: object, sampled: bool) -> None:
    target, busy = tiny_target(), 2
    engine = Engine(target, tree and eagle(target, tree), batch=5, prefill_chunk=8)
    sampling = SamplingParams(0.9 if sampled else 0.0, seed=4)
    queue = [
        engine.request(prompt(n), max_new_tokens=25, sampling=sampling, stop_ids=[])
        for n in (19, 4)
    ]
    # A draw from a distribution of NaN is an error of its own.
    expected, junk = decode(engine, queue), 1e4 if sampled else torch.nan
    spoil_idle_rows(engine, busy, junk)
    rows = engine.rows(queue)
    for _ in engine.decode(rows):
        assert not engine.state.active[busy:].any()
        spoil_idle_rows(engine, busy, junk)
    assert [row.tokens for row in rows] == tokens_of(expected)
    assert [row.stats.accepted for row in rows] == [one.stats.accepted for one in expected]


@pytest.mark.parametrize("name", ["none", "eagle", "eagle_chain"])
def test_a_seat_that_held_junk_is_as_good_as_new(name: str) -> None:
    queue = many_requests(9)
    engine = ToldEngine(tiny_target(), name, texts_of(queue), batch=2, max_length=LIMIT)
    wanted = decode(engine, queue)
    rows = engine.rows(queue)
    for _ in engine.decode(rows):
        for row in rows:
            if row.done and row in engine.seat_of:
                seat = engine.seat_of.pop(row)
                for kv in (engine.builder.cache, engine.builder.memory):
                    for side in (kv.k, kv.v) if isinstance(kv, KVCache) else ():
                        side[:, seat] = JUNK
    assert [row.tokens for row in rows] == tokens_of(wanted)
    assert [row.stats.accepted for row in rows] == [one.stats.accepted for one in wanted]


# ---------------------------------------------------------------- the calls of EAGLE's users


@settings(deadline=None, max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=16),
    offset=st.integers(0, 9),
    plain=st.booleans(),
)
def test_left_padded_prompts_give_their_own_texts_and_padding(
    lengths: list[int], offset: int, plain: bool
) -> None:
    # The end token is one of the first row's, so that rows end at different places.
    n_new, width = 12, max(lengths)
    prompts = [prompt(length, index) for index, length in enumerate(lengths)]
    end = plain_decode(tiny_target(), prompts[0], n_new)[offset]
    target = tiny_target(eos_ids=(end,))
    model = EagleModel(target, eagle(target, BUSHY))
    ids = torch.tensor([[end] * (width - len(tokens)) + tokens for tokens in prompts])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    generate = model.naivegenerate if plain else model.eagenerate
    output = generate(ids, mask, max_new_tokens=n_new)
    wanted = [
        cut(plain_decode(tiny_target(), tokens, n_new), stop_ids=[end], room=n_new)[0]
        for tokens in prompts
    ]
    longest = max(map(len, wanted))
    padded = [text + [end] * (longest - len(text)) for text in wanted]
    assert torch.equal(output, torch.cat((ids, torch.tensor(padded)), 1))
