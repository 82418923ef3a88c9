"""Does any drafter draft the same again: after others, and from the whole text at once?"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from conftest import DRAFTERS, SCRIPTED, eagle, prompt, tiny_drafter, tiny_target, tokens_of

from fasteagle.engine import Engine
from fasteagle.request import LengthWarning

OURS = [name for name in DRAFTERS if name not in SCRIPTED]


def trees(engine: Engine, tokens: list[int], n_tokens: int) -> list[Any]:
    """What is emitted and drafted in every round."""
    rows = engine.rows([engine.request(tokens, max_new_tokens=n_tokens, stop_ids=[])])
    return [
        (list(rows[0].tokens), *(side[0].tolist() for side in engine.state.tree))
        for _ in engine.decode(rows)
    ]


@pytest.mark.parametrize("name", OURS)
def test_a_request_replays_round_by_round_whatever_came_between(name: str) -> None:
    target = tiny_target()
    used, fresh = (Engine(target, DRAFTERS[name](target, []), prefill_chunk=8) for _ in "ab")
    first = trees(used, prompt(19), 24)
    for length in (3, 60):
        trees(used, prompt(length, 5), 12)
    assert trees(used, prompt(19), 24) == first == trees(fresh, prompt(19), 24)


@pytest.mark.parametrize("name", OURS)
def test_rounds_draft_what_the_whole_text_as_a_prompt_drafts(name: str) -> None:
    # A drafter whose memory depends on how the text came about (volatile) may draft otherwise.
    target = tiny_target()
    engine = Engine(target, DRAFTERS[name](target, []), prefill_chunk=16)
    anew = Engine(target, engine.drafter, prefill_chunk=64)
    if engine.drafter.volatile(engine.builder.memory):
        pytest.skip("it remembers more than the text")
    for emitted, *tree in trees(engine, prompt(11), 16)[:-1:3]:
        (_, *expected), *_ = trees(anew, [*prompt(11), *emitted[:-1]], 1)
        assert tree == expected


def test_a_request_longer_than_the_head_was_trained_is_said_once_and_exact() -> None:
    target = tiny_target()
    short = eagle(target, max_positions=16)
    engine, plain = Engine(target, short), Engine(target)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        results = [engine.generate([prompt(9)], max_new_tokens=n, stop_ids=[]) for n in (5, 20, 30)]
        list(engine.stream(prompt(9), max_new_tokens=30, stop_ids=[]))
    assert [w.category for w in said] == [LengthWarning]
    assert "trained on 16 tokens" in str(said[0].message)
    wanted = plain.generate([prompt(9)], max_new_tokens=30, stop_ids=[])
    assert tokens_of(results[-1]) == tokens_of(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(target, tiny_drafter("lookup", target)).generate([prompt(9)], max_new_tokens=40)
