"""Is the text the same whoever drafts it, and does a request leave nothing behind?"""

from __future__ import annotations

import itertools
import random

import pytest
from conftest import (
    DRAFTERS,
    EXPERTS,
    VOCAB,
    eagle,
    plain_decode,
    prompt,
    tiny_target,
    tokens_of,
    tree_choices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_drafters import OracleDrafter, RandomDrafter

from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.tree import chain, static_tree

CHUNK = 8
N_NEW = 24
SHAPES: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "gqa_tied": {"tie_embeddings": True},
    "mha_tied": {"n_kv_heads": 4, "tie_embeddings": True},
    "experts": EXPERTS,
}
# Around the prefill chunk: shorter, just under, exact, just over, multiples of it.
BATCHES = {
    "alone": [[11]],
    "chunks": [[1, CHUNK - 1, CHUNK], [CHUNK + 1, 2 * CHUNK, 3 * CHUNK], [3 * CHUNK - 1, 1, 2]],
}


def same_text_as_plain(target: Transformer, make: object, lengths: list[int]) -> Engine:
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    texts = [plain_decode(target, tokens, N_NEW) for tokens in prompts]
    truth = [tokens + text for tokens, text in zip(prompts, texts, strict=True)]
    drafter: Drafter = make(target, truth)  # type: ignore[operator]
    engine = Engine(target, drafter, batch=len(prompts), prefill_chunk=CHUNK)
    results = engine.generate(prompts, max_new_tokens=N_NEW, stop_ids=[])
    assert tokens_of(results) == texts
    return engine


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("batches", BATCHES)
def test_greedy_text_is_the_same_with_any_drafter(shape: str, name: str, batches: str) -> None:
    for lengths in BATCHES[batches]:
        same_text_as_plain(tiny_target(**SHAPES[shape]), DRAFTERS[name], lengths)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_texts_compared_are_various(shape: str) -> None:
    # A target that repeats itself would make every law above hold by accident.
    lengths = [length for batch in BATCHES["chunks"] for length in batch]
    texts = [plain_decode(tiny_target(**SHAPES[shape]), prompt(n), N_NEW) for n in lengths]
    assert len({tuple(text) for text in texts}) == len(set(lengths))
    assert sum(len(set(text)) for text in texts) / len(texts) > 6


@pytest.mark.parametrize("length", range(1, 8))
def test_greedy_text_is_the_same_with_chains(length: int) -> None:
    same_text_as_plain(tiny_target(), lambda target, truth: eagle(target, chain(length)), [9, 30])


@settings(deadline=None, max_examples=25)
@given(choices=tree_choices(), length=st.integers(1, 40), seed=st.integers(0, 3))
def test_greedy_text_is_the_same_with_any_static_tree(
    choices: list[list[int]], length: int, seed: int
) -> None:
    tree = static_tree(choices)
    same_text_as_plain(
        tiny_target(), lambda target, truth: eagle(target, tree, seed=seed), [length]
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), n_path=st.integers(2, 7), n_nodes=st.integers(7, 20))
def test_greedy_text_is_the_same_with_a_new_topology_every_round(
    seed: int, n_path: int, n_nodes: int
) -> None:
    same_text_as_plain(
        tiny_target(), lambda target, truth: RandomDrafter(n_nodes, n_path, VOCAB, seed), [6, 17]
    )


def test_a_head_of_two_layers_with_its_own_embedding_changes_nothing() -> None:
    changes = {"n_layers": 2, "own_embedding": True, "n_kv_heads": 4, "fc_bias": False}
    same_text_as_plain(tiny_target(), lambda target, truth: eagle(target, **changes), [5, 16, 1])


@pytest.mark.parametrize("chunk", [1, 5, 16, 40, None])
def test_the_prefill_chunk_does_not_change_the_text(chunk: int | None) -> None:
    target, prompts = tiny_target(), [prompt(length) for length in (1, 16, 40)]
    engine = Engine(target, eagle(target), batch=3, prefill_chunk=chunk)
    results = engine.generate(prompts, max_new_tokens=8, stop_ids=[])
    assert tokens_of(results) == [plain_decode(target, tokens, 8) for tokens in prompts]


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_every_round_accepts_exactly_what_is_right(fails_at: int) -> None:
    # n_path 6, wrong from depth d on: d - 1 drafts accepted each round, d = 6 is never wrong.
    target, tokens = tiny_target(), prompt(10)
    truth = [tokens + plain_decode(target, tokens, 40)]
    drafter = OracleDrafter(truth, width=2, fails=lambda rng: fails_at)
    result = Engine(target, drafter).generate([tokens], max_new_tokens=31, stop_ids=[])[0]
    rounds = -(-30 // fails_at)
    assert result.stats.accepted == [fails_at - 1] * rounds
    assert result.stats.accept_length == fails_at
    assert result.stats.acceptance == [1.0] * (fails_at - 1) + [0.0] * (6 - fails_at)


def test_more_prompts_than_rows_come_back_in_order() -> None:
    target, prompts = tiny_target(), [prompt(length, length) for length in (3, 19, 1, 8, 11)]
    engine = Engine(target, eagle(target), batch=2, prefill_chunk=CHUNK)
    results = engine.generate(prompts, max_new_tokens=9, stop_ids=[])
    assert tokens_of(results) == [plain_decode(target, tokens, 9) for tokens in prompts]
    assert engine.generate([]) == []


def addresses(engine: Engine) -> list[int]:
    caches = [engine.builder.cache, engine.builder.memory]
    tensors = [*engine.state.tensors(), *(side for kv in caches if kv for side in (kv.k, kv.v))]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("batch", [1, 2])
def test_an_engine_that_served_others_equals_a_fresh_one(batch: int) -> None:
    target, rng = tiny_target(), random.Random(0)
    used = Engine(target, eagle(target), batch=batch, prefill_chunk=CHUNK)
    before = addresses(used)
    for _ in range(12):
        prompts = [prompt(rng.randint(1, 60), rng.random()) for _ in range(rng.randint(1, batch))]
        limit = rng.randint(1, 30)
        fresh = Engine(target, eagle(target), batch=batch, prefill_chunk=CHUNK)
        results = [e.generate(prompts, max_new_tokens=limit, stop_ids=[4]) for e in (used, fresh)]
        assert tokens_of(results[0]) == tokens_of(results[1])
        accepted = [[one.stats.accepted for one in result] for result in results]
        assert accepted[0] == accepted[1], "leftovers reached the drafter"
    assert addresses(used) == before


def test_a_request_that_is_left_half_way_does_not_disturb_the_next() -> None:
    target, tokens = tiny_target(), prompt(12)
    engine = Engine(target, eagle(target))
    rounds = engine.decode(engine.rows([engine.request(prompt(40), stop_ids=[])]))
    for _ in range(4):
        next(rounds)
    result = engine.generate([tokens], max_new_tokens=9, stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, 9)


def test_a_row_that_ended_leaves_the_others_alone() -> None:
    # Row 0 ends in its first round and then idles through all rounds of row 1.
    target, prompts = tiny_target(), [prompt(30), prompt(5)]
    engine = Engine(target, eagle(target), batch=2)
    limits = (2, 40)
    requests = [
        engine.request(tokens, max_new_tokens=limit, stop_ids=[])
        for tokens, limit in zip(prompts, limits, strict=True)
    ]
    rows, lengths = engine.rows(requests), set()
    for _ in engine.decode(rows):
        if rows[0].done:
            lengths.add(int(engine.state.length[0]))
    assert len(lengths) == 1, "an ended row must not grow"
    expected = [plain_decode(target, tokens, n) for tokens, n in zip(prompts, limits, strict=True)]
    assert [row.tokens for row in rows] == expected


def test_a_row_that_ended_at_the_context_limit_leaves_the_others_alone() -> None:
    # All logits are equal, so the text is zeros and a chain of zeros is accepted whole. Row 0 has
    # room for one more token when that begins; it then idles behind the limit, accepting chains.
    flat = Transformer(tiny_target().config).eval().requires_grad_(False)
    flat.load_state_dict(tiny_target().state_dict())
    flat.lm_head.weight.zero_()
    max_length, n_path, n_single = 55, 8, 6
    drafts = itertools.count()
    drafter = OracleDrafter(
        [[0] * 200] * 2,
        n_path=n_path,
        fails=lambda rng: 1 if next(drafts) < 2 * n_single else n_path,
    )
    engine = Engine(flat, drafter, batch=2, max_length=max_length, prefill_chunk=CHUNK)
    prompts = [[0] * (max_length - n_path), [0]]
    results = engine.generate(prompts, max_new_tokens=max_length, stop_ids=[])
    assert [len(result.tokens) for result in results] == [n_path, max_length - 1]
    assert results[0].stats.accepted == [0] * n_single + [n_path - 1]
    assert [result.reason for result in results] == ["length"] * 2


def test_caches_grow_only_when_a_request_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasteagle.engine.DEFAULT_ROOM", 32)
    target = tiny_target()
    engine = Engine(target, eagle(target, chain(3)), prefill_chunk=CHUNK)
    n_bytes, address = engine.builder.cache.n_bytes, engine.state.length.data_ptr()
    assert engine.n_slots == 48
    for length in (5, 9):  # 32 tokens at most
        result = engine.generate([prompt(length)], max_new_tokens=23, stop_ids=[])[0]
        assert result.tokens == plain_decode(target, prompt(length), 23)
        assert (engine.builder.cache.n_bytes, engine.state.length.data_ptr()) == (n_bytes, address)
    for length in (10, 3, 80):
        n_new = 23 if length < 80 else 500
        result = engine.generate([prompt(length)], max_new_tokens=n_new, stop_ids=[])[0]
        assert result.tokens == plain_decode(target, prompt(length), min(n_new, 192 - length))
        assert engine.room == (64 if length < 80 else 192)
    assert engine.n_slots == 208


def test_a_stated_max_length_is_reserved_at_once() -> None:
    assert Engine(tiny_target(), max_length=100).n_slots == 112
    assert Engine(tiny_target()).room == 192, "the model's whole context, as it is short"


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"prefill_chunk": 0}, {"batch": -1}])
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give 1 or more"):
        Engine(tiny_target(), **sizes)
