"""Does a draft model guess what it would write itself, and remember exactly what was accepted?

B batch  S tokens  C model dim  V vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    BUSHY,
    MC_SIM,
    decode,
    full_pass,
    plain_decode,
    prompt,
    randomize,
    tiny_target,
    tree_choices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_drafters import VOCAB
from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.draft.base import Accepted, Room
from fasteagle.draft.standalone import StandaloneDrafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer, run_block, take
from fasteagle.tree import DraftTree, StaticTree, Tree, causal_mask, chain, static_tree

N_SLOTS = 96
TREES = {"mc_sim": MC_SIM, "bushy": BUSHY, "chain": chain(5), "one": chain(1)}


def draft_model(**changes: Any) -> Transformer:
    return tiny_target(**{"seed": 5, "n_layers": 1, "n_kv_heads": 4, **changes})


def draft_by_paths(model: Transformer, tree: StaticTree, tokens: list[int]) -> list[int]:
    """The slow twin of `propose`: every node from a pass over the text that its path spells.

    tokens are those of the sequence, the root last.
    """
    spelled = {0: tokens}
    for node in range(1, tree.n_nodes):
        above = spelled[tree.parents[node]]
        logits = model.logits(full_pass(model, above)[0, -1])
        spelled[node] = [*above, int(logits.argsort(descending=True)[tree.rank[node]])]
    return [spelled[node][-1] for node in range(tree.n_nodes)]


class Feed:
    """Feeds one drafter random texts, a row each, in chunks of random accepted counts."""

    def __init__(self, drafter: StandaloneDrafter, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.drafter, self.generator, self.length = drafter, generator, [0, 0]
        self.tokens = torch.randint(VOCAB, (2, N_SLOTS), generator=generator)
        self.cache = drafter.new_memory(2, N_SLOTS)

    def step(self, size: int) -> DraftTree:
        """A chunk of `size`, of which each row accepts a count of its own; the rest is junk."""
        counts = torch.randint(1, size + 1, (2,), generator=self.generator).tolist()
        tokens, following = torch.randint(VOCAB, (2, 2, size), generator=self.generator)
        for row, (begin, count) in enumerate(zip(self.length, counts, strict=True)):
            tokens[row, :count] = self.tokens[row, begin : begin + count]
            following[row, :count] = self.tokens[row, begin + 1 : begin + count + 1]
        start, count = torch.tensor(self.length), torch.tensor(counts)
        news = Accepted(torch.full((2, size, 1), torch.nan), tokens, following, start, count)
        room = Room(self.cache, N_SLOTS, run_block)
        state = self.drafter.extend(news, room)
        tree = self.drafter.propose(state, take(following, news.last), start + count, room)
        self.length = (start + count).tolist()
        return tree

    def scratch(self, row: int) -> tuple[KVCache, list[int]]:
        """The row's cache, root included, and its text, the root last."""
        tokens = self.tokens[row : row + 1, : self.length[row] + 1]
        kv, slots = self.drafter.new_memory(1, tokens.shape[1]), torch.arange(tokens.shape[1])[None]
        self.drafter.model(tokens, slots, slots, causal_mask(slots, tokens.shape[1]), kv)
        return kv, tokens[0].tolist()


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@torch.inference_mode()
def test_the_model_after_any_acceptance_equals_starting_over(tree: StaticTree) -> None:
    feed = Feed(StandaloneDrafter(draft_model(n_layers=2), tiny_target(), tree), tree.n_nodes)
    for size in (7, *[tree.n_path] * 3):
        proposed = feed.step(size)
        for row, length in enumerate(feed.length):
            kv, text = feed.scratch(row)
            for now, anew in ((feed.cache.k, kv.k), (feed.cache.v, kv.v)):
                close = {"atol": 5e-5, "rtol": 1e-4}
                torch.testing.assert_close(now[:, row, :, : length + 1], anew[:, 0], **close)
            assert proposed.tokens[row].tolist() == draft_by_paths(feed.drafter.model, tree, text)
            assert proposed.parents[row].tolist() == list(tree.parents)


@settings(deadline=None, max_examples=8)
@given(choices=tree_choices(max_nodes=7), seed=st.integers(0, 99))
def test_any_static_tree_drafts_what_its_paths_spell(choices: list[list[int]], seed: int) -> None:
    tree = static_tree(choices)
    feed = Feed(StandaloneDrafter(draft_model(), tiny_target(), tree), seed)
    with torch.inference_mode():
        for size in (5, 3):
            proposed = feed.step(size)
        for row in range(2):
            text = feed.scratch(row)[1]
            assert proposed.tokens[row].tolist() == draft_by_paths(feed.drafter.model, tree, text)


@torch.inference_mode()
def test_every_round_of_a_batch_drafts_what_the_whole_text_gives() -> None:
    # Prompts that begin in different chunks: a late row has no news in the first ones.
    target, model, prompts = tiny_target(), draft_model(), [prompt(n) for n in (1, 9, 20)]
    engine = Engine(target, StandaloneDrafter(model, target, BUSHY), batch=3, prefill_chunk=8)
    rows = engine.rows([engine.request(p, max_new_tokens=9, stop_ids=[]) for p in prompts])
    for _ in engine.decode(rows):
        for index, row in enumerate(rows):
            if not row.done:
                text = [*prompts[index], *row.tokens]
                found = engine.state.tree.tokens[index].tolist()
                assert found == draft_by_paths(model, BUSHY, text)
    assert [row.tokens for row in rows] == [plain_decode(target, p, 9) for p in prompts]


@pytest.mark.parametrize("tree", [chain(1), chain(5), BUSHY], ids=["one", "chain", "bushy"])
@pytest.mark.parametrize("length", [1, 17])
def test_the_target_itself_as_the_draft_is_always_right(tree: Tree, length: int) -> None:
    # To the very end of the caches: no row may lose sight of itself, and the last slot, where
    # padding lands, is never read.
    target = tiny_target(max_positions=57)
    engine = Engine(target, StandaloneDrafter(target, target, tree), batch=2, prefill_chunk=16)
    tokens, short = prompt(length), prompt(3)
    limits = {"max_new_tokens": 99, "stop_ids": []}
    results = decode(engine, [engine.request(t, **limits) for t in (tokens, short)])
    for each, begin in zip(results, (tokens, short), strict=True):
        assert each.tokens == plain_decode(target, begin, 57 - len(begin))
        assert set(each.stats.accepted) == {tree.n_path - 1}
        assert each.stats.accept_length == tree.n_path


def test_the_trained_length_is_what_the_model_can_read() -> None:
    target = tiny_target()
    for changes, length in (({"max_positions": 64}, 64), ({"sliding_window": 16}, 16)):
        assert StandaloneDrafter(draft_model(**changes), target).trained_length == length


# ---------------------------------------------------------------------------------- vocabularies


def padded(vocab: int) -> Transformer:
    return tiny_target(vocab_size=vocab)


class Stubborn(Transformer):
    """A model that finds one token likeliest, whatever came before."""

    favourite: int

    def logits(self, hidden: Tensor) -> Tensor:
        scores = super().logits(hidden)
        scores[..., self.favourite] = 1e6
        return scores


@pytest.mark.parametrize("favourite", [200, 201])
@torch.inference_mode()
def test_rows_that_only_pad_the_draft_are_never_guessed(favourite: int) -> None:
    target, model = padded(200), randomize(Stubborn(padded(202).config), 1)
    model.favourite, tokens = favourite, prompt(9, vocab=200)
    engine = Engine(target, StandaloneDrafter(model, target, BUSHY))
    rows = engine.rows([engine.request(tokens, max_new_tokens=12, stop_ids=[])])
    for _ in engine.decode(rows):
        assert int(engine.state.tree.tokens.max()) < 200
    assert rows[0].tokens == plain_decode(target, tokens, 12)


def test_tokens_that_the_draft_does_not_know_are_verified_all_the_same() -> None:
    target, model = padded(202), padded(200)
    tokens = [201, *prompt(9, vocab=200), 200]
    engine = Engine(target, StandaloneDrafter(model, target, BUSHY))
    result = engine.generate([tokens], max_new_tokens=12, stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, 12)


@pytest.mark.parametrize(("draft", "fits"), [(198, False), (200, True), (203, True), (204, False)])
def test_vocabularies_may_differ_by_a_hundredth(draft: int, fits: bool) -> None:
    target = tiny_target(vocab_size=201)
    if fits:
        assert StandaloneDrafter(padded(draft), target).n_nodes == 6
    else:
        with pytest.raises(ValueError, match=f"vocabulary of {draft} and the target one of 201"):
            StandaloneDrafter(padded(draft), target)


def test_a_tree_wider_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 20"):
        StandaloneDrafter(draft_model(), tiny_target(), static_tree([[VOCAB]]))
