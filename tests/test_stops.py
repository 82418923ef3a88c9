"""Does every text end exactly where it should, and is a request that cannot be met refused?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import (
    BUSHY,
    DRAFTERS,
    VOCAB,
    eagle,
    plain_decode,
    prompt,
    tiny_target,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_drafters import OracleDrafter, RandomDrafter

from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Generation, Request
from fasteagle.sample import SamplingParams
from fasteagle.tree import MAX_NODES, chain

N_LONG = 60


def cut(text: Sequence[int], *, stop_ids: Sequence[int], room: int) -> tuple[list[int], str]:
    """The slow twin: where plain text ends, and why. A stop on the last free place is a stop."""
    for index, token in enumerate(text[:room]):
        if token in stop_ids:
            return list(text[: index + 1]), "stop"
    return list(text[:room]), "length"


def ending(result: Generation) -> tuple[list[int], str]:
    assert result.stats.new_tokens == len(result.tokens)
    return result.tokens, result.reason


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(DRAFTERS)),
    length=st.integers(1, 20),
    stop_ids=st.sets(st.integers(0, VOCAB - 1), max_size=3),
    max_new_tokens=st.integers(1, N_LONG),
)
def test_text_ends_at_the_first_stop_or_at_the_limit(
    name: str, length: int, stop_ids: set[int], max_new_tokens: int
) -> None:
    target, tokens = tiny_target(), prompt(length)
    text = plain_decode(target, tokens, N_LONG)
    engine = Engine(target, DRAFTERS[name](target, [tokens + text]), prefill_chunk=8)
    result = engine.generate([tokens], max_new_tokens=max_new_tokens, stop_ids=sorted(stop_ids))[0]
    assert ending(result) == cut(text, stop_ids=sorted(stop_ids), room=max_new_tokens)


def distinct_text(n_tokens: int) -> tuple[Transformer, list[int], list[int]]:
    """A prompt whose plain text starts with distinct tokens, so that each can be the stop."""
    target = tiny_target(vocab_size=300)
    for seed in range(50):
        tokens = prompt(6, seed, 300)
        text = plain_decode(target, tokens, n_tokens)
        if len(set(text)) == n_tokens:
            return target, tokens, text
    raise AssertionError("no prompt has such a text")


@pytest.mark.parametrize("offset", range(1, 13))
def test_a_stop_at_any_place_of_a_round_ends_the_text_there(offset: int) -> None:
    # The oracle emits rounds of 6 after the first token: offset 1 begins one, 6 is its bonus.
    target, tokens, text = distinct_text(14)
    drafter = OracleDrafter([tokens + text], vocab=300)
    result = Engine(target, drafter).generate([tokens], stop_ids=[text[offset]])[0]
    assert ending(result) == (text[: offset + 1], "stop")
    assert result.stats.accepted == [5] * -(-offset // 6)


@pytest.mark.parametrize("limit", range(1, 15))
def test_a_limit_at_any_place_of_a_round_is_exact(limit: int) -> None:
    target, tokens, text = distinct_text(14)
    drafter = OracleDrafter([tokens + text], vocab=300)
    result = Engine(target, drafter).generate([tokens], max_new_tokens=limit, stop_ids=[])[0]
    assert ending(result) == (text[:limit], "length")


def test_a_stop_on_the_last_free_place_is_a_stop() -> None:
    target, tokens, text = distinct_text(14)
    engine = Engine(target, OracleDrafter([tokens + text], vocab=300))
    result = engine.generate([tokens], max_new_tokens=5, stop_ids=[text[4]])[0]
    assert ending(result) == (text[:5], "stop")


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("max_length", [30, 47, 48, 49])
def test_the_context_limit_ends_a_text_at_exactly_its_length(name: str, max_length: int) -> None:
    # 48 fills whole blocks of cache slots for some drafters, the others end inside one.
    target = tiny_target()
    for length in (1, max_length // 2, max_length - 7):
        tokens = prompt(length)
        text = plain_decode(target, tokens, max_length - length)
        drafter = DRAFTERS[name](target, [tokens + text])
        engine = Engine(target, drafter, max_length=max_length, prefill_chunk=8)
        result = engine.generate([tokens], max_new_tokens=1000, stop_ids=[])[0]
        assert ending(result) == (text, "length")
        assert length + len(result.tokens) == max_length


def test_the_models_context_is_the_default_limit() -> None:
    target = tiny_target(max_positions=40)
    for drafter in (None, eagle(target)):
        result = Engine(target, drafter).generate([prompt(3)], stop_ids=[])[0]
        assert (len(result.tokens), result.reason) == (37, "length")


def test_stop_ids_default_to_the_checkpoints() -> None:
    tokens = prompt(6)
    text = plain_decode(tiny_target(), tokens, 20)
    engine = Engine(tiny_target(eos_ids=(text[3], text[7])))
    expected = cut(text, stop_ids=[text[3], text[7]], room=20)
    assert ending(engine.generate([tokens], max_new_tokens=20)[0]) == expected
    assert len(engine.generate([tokens], max_new_tokens=20, stop_ids=[])[0].tokens) == 20


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), stop=st.integers(0, VOCAB - 1))
def test_sampled_texts_end_like_plain_ones(seed: int, stop: int) -> None:
    target, tokens = tiny_target(), prompt(9)
    limits = {"max_new_tokens": 40, "stop_ids": [stop]}
    sampling = SamplingParams(temperature=1.0, seed=seed)
    engines = [
        Engine(target),
        Engine(target, eagle(target)),
        Engine(target, RandomDrafter(9, 4, 20)),
    ]
    ends = [ending(e.generate([tokens], sampling=sampling, **limits)[0]) for e in engines]
    assert ends[0] == ends[1] == ends[2]


# ---------------------------------------------------------------- text and stop strings


class Letters:
    """A tokenizer whose token n is the n-th letter; token 19 is half a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decoder(self, prompt_ids: Sequence[int]) -> Letters:
        return Letters()

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize("name", DRAFTERS)
def test_streamed_pieces_join_to_the_text_and_tell_drafts_apart(name: str) -> None:
    target, letters = tiny_target(), Letters()
    tokens = letters.encode("fasteagle"[:5])
    text = plain_decode(target, tokens, 30)
    drafter = DRAFTERS[name](target, [tokens + text])
    engine = Engine(target, drafter, tokenizer=letters, prefill_chunk=8)
    pieces = list(engine.stream("faste", max_new_tokens=30, stop_ids=[]))
    result = pieces[-1].result
    assert result is not None
    assert all(piece.result is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == result.text == letters.push(text)
    n_drafted = sum(len(piece.text) for piece in pieces if piece.drafted)
    whole, last = sum(result.stats.accepted[:-1]), result.stats.accepted[-1]
    assert whole <= n_drafted <= whole + last
    assert (n_drafted > 0) == (result.stats.accept_length > 1)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("at", range(1, 14))
def test_a_stop_string_ends_the_text_before_it_begins(name: str, at: int) -> None:
    target, letters = tiny_target(), Letters()
    tokens = letters.encode("faste")
    text = plain_decode(target, tokens, 30)
    whole = letters.push(text)
    stop = whole[at : at + 3]
    begin = whole.index(stop)
    engine = Engine(target, DRAFTERS[name](target, [tokens + text]), tokenizer=letters)
    pieces = list(engine.stream("faste", max_new_tokens=30, stop_ids=[], stop=["#", stop]))
    result = pieces[-1].result
    assert result is not None
    assert result.text == "".join(piece.text for piece in pieces) == whole[:begin]
    assert (result.tokens, result.reason) == (text[: begin + 3], "stop")


def test_a_stop_token_is_in_the_tokens_but_not_in_the_text() -> None:
    target, letters = tiny_target(), Letters()
    text = plain_decode(target, letters.encode("faste"), 30)
    engine = Engine(target, eagle(target), tokenizer=letters)
    result = engine.generate(["faste"], stop_ids=[text[9]])[0]
    tokens, _ = cut(text, stop_ids=[text[9]], room=30)
    assert (result.tokens, result.text) == (tokens, letters.push(tokens[:-1]))


def test_without_a_tokenizer_a_stream_is_its_result() -> None:
    target, tokens = tiny_target(), prompt(5)
    pieces = list(Engine(target, eagle(target)).stream(tokens, max_new_tokens=7, stop_ids=[]))
    assert [piece.text for piece in pieces] == [""]
    assert pieces[0].result.tokens == plain_decode(target, tokens, 7)


# ---------------------------------------------------------------- refusals


def refuse(engine: Engine, tokens: object, message: str, **limits: object) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        engine.generate([tokens], **limits)
    assert len(str(raised.value).splitlines()) == 1


def test_prompts_that_cannot_be_decoded_are_refused() -> None:
    target = tiny_target()
    for engine in (Engine(target, max_length=40), Engine(target, eagle(target), max_length=40)):
        refuse(engine, [], "empty")
        refuse(engine, [3, VOCAB], f"token {VOCAB}")
        refuse(engine, [-1], "token -1")
        refuse(engine, prompt(40), "at most 39")
        refuse(engine, prompt(100), "at most 39")
        refuse(engine, [3], "max_new_tokens", max_new_tokens=0)
        refuse(engine, "text", "tokenizer")
        refuse(engine, [3], "tokenizer", stop=["x"])
        result = engine.generate([[3]], max_new_tokens=4, stop_ids=[])[0]
        assert result.tokens == plain_decode(target, [3], 4)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_tree_deeper_than_the_room_left_is_refused(depth: int) -> None:
    target, limit = tiny_target(), 40
    engine = Engine(target, eagle(target, chain(depth)), max_length=limit)
    fits = limit - depth - 1
    refuse(engine, prompt(fits + 1), "--tree")
    tokens = prompt(fits)
    result = engine.generate([tokens], stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, depth + 1)


def test_one_bad_prompt_refuses_the_batch_before_it_starts() -> None:
    engine = Engine(tiny_target(), eagle(tiny_target(), BUSHY), batch=2, max_length=40)
    with pytest.raises(ValueError, match="at most 39"):
        engine.generate([[3], prompt(50)])
    with pytest.raises(ValueError, match="empty"):
        engine.generate([[3], [4], []])
    assert len(engine.generate([[3]], max_new_tokens=2, stop_ids=[])[0].tokens) == 2


def test_a_sliding_window_is_refused_where_it_would_matter() -> None:
    plain, target = tiny_target(), tiny_target(sliding_window=24)
    for drafter in (None, eagle(target)):
        engine = Engine(target, drafter)
        refuse(engine, prompt(15), "sliding window of 24", max_new_tokens=10)
        result = engine.generate([prompt(14)], max_new_tokens=10, stop_ids=[])[0]
        assert result.tokens == plain_decode(plain, prompt(14), 10)


@pytest.mark.parametrize("max_length", [-1, 0, 1, 193])
def test_a_max_length_that_the_model_cannot_have_is_refused(max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length is {max_length}; this model takes 2 to 192"):
        Engine(tiny_target(), max_length=max_length)


def test_a_request_checks_itself() -> None:
    with pytest.raises(ValueError, match="empty"):
        Request(prompt=())
    with pytest.raises(ValueError, match="max_new_tokens is -3"):
        Request(prompt=(1,), max_new_tokens=-3)


def test_the_largest_tree_decodes() -> None:
    target, tokens = tiny_target(), prompt(4)
    engine = Engine(target, RandomDrafter(MAX_NODES, 6, VOCAB))
    result = engine.generate([tokens], max_new_tokens=12, stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, 12)
