"""Does a drafter remember exactly what was accepted, and nothing else?

B batch  S new tokens  P longest path, root included  N tree nodes  C model dim
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import (
    BUSHY,
    DRAFTERS,
    MC_SIM,
    VOCAB,
    eagle,
    full_pass,
    plain_decode,
    prompt,
    tiny_head,
    tiny_target,
    tree_choices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.draft.base import Accepted, Room
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.draft.grow import TreeDrafter
from fasteagle.draft.none import NoDrafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer, run_block, take
from fasteagle.tree import DraftTree, StaticTree, causal_mask, chain, static_tree

N_SLOTS = 96


# ---------------------------------------------------------------- the head against a slow twin


def head_rows(drafter: EagleDrafter, features: Tensor, tokens: Sequence[int]) -> Tensor:
    """Head outputs `[S, C]` of a whole sequence in one pass: features `[S, C]`, next tokens."""
    slots = torch.arange(len(tokens))[None]
    kv = drafter.new_memory(1, len(tokens))
    embedded = drafter.embed(torch.tensor([list(tokens)]))
    mask = causal_mask(slots, len(tokens))
    return drafter.head(embedded, features[None], slots, slots, mask, kv, run=run_block)[0]


def draft_by_paths(drafter: EagleDrafter, features: Tensor, tokens: Sequence[int]) -> list[int]:
    """The slow twin of `propose`: every node from a pass over the sequence that its path spells.

    features `[S, C]` of the committed tokens; tokens are those after each, the root last.
    """
    tree = drafter.tree
    made: dict[int, tuple[Tensor, list[int]]] = {}
    guesses = [tokens[-1]]
    for node in range(tree.n_nodes):
        if node:
            states, spelled = made[tree.parents[node]]
            logits = drafter.target.logits(states[-1])
            guesses.append(int(logits.topk(tree.rank[node] + 1).indices[-1]))
            rows = torch.cat((features, states[len(features) - 1 :]))
            made[node] = head_rows(drafter, rows, [*spelled, guesses[-1]]), [*spelled, guesses[-1]]
        else:
            made[0] = head_rows(drafter, features, tokens), list(tokens)
    return guesses


class Feed:
    """Feeds one drafter random sequences, a row each, in chunks of random accepted counts."""

    def __init__(self, drafter: EagleDrafter, seed: int, batch: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.drafter, self.rng = drafter, random.Random(seed)
        self.features = torch.randn(batch, N_SLOTS, drafter.head.config.dim, generator=generator)
        self.tokens = torch.randint(VOCAB, (batch, N_SLOTS), generator=generator)
        self.cache = drafter.new_memory(batch, N_SLOTS)
        self.length = [0] * batch

    def step(self, size: int) -> DraftTree:
        """A chunk of `size`, of which each row accepts a count of its own; the rest is junk."""
        counts = [self.rng.randint(1, size) for _ in self.length]
        features = torch.randn(len(counts), size, self.features.shape[2])
        tokens = torch.randint(VOCAB, (len(counts), size))
        for row, (begin, count) in enumerate(zip(self.length, counts, strict=True)):
            features[row, :count] = self.features[row, begin : begin + count]
            tokens[row, :count] = self.tokens[row, begin : begin + count]
        start, count = torch.tensor(self.length), torch.tensor(counts)
        room, before = Room(self.cache, N_SLOTS, run_block), torch.randint(VOCAB, tokens.shape)
        news = Accepted(features, before, following=tokens, start=start, n_valid=count)
        state = self.drafter.extend(news, room)
        tree = self.drafter.propose(state, take(tokens, news.last), start + count, room)
        self.length = [begin + n for begin, n in zip(self.length, counts, strict=True)]
        return tree

    def scratch(self, row: int) -> tuple[KVCache, list[int]]:
        """The row's cache and tree, computed at once from everything that was accepted."""
        length = self.length[row]
        kv, slots = self.drafter.new_memory(1, length), torch.arange(length)[None]
        embedded = self.drafter.embed(self.tokens[row : row + 1, :length])
        rows, mask = self.features[row : row + 1, :length], causal_mask(slots, length)
        self.drafter.head(embedded, rows, slots, slots, mask, kv, run=run_block)
        tokens = self.tokens[row, :length].tolist()
        return kv, draft_by_paths(self.drafter, self.features[row, :length], tokens)


HEADS: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "two_layers": {"n_layers": 2},
    "mha": {"n_kv_heads": 4},
    "own_embedding_no_bias": {"own_embedding": True, "fc_bias": False},
}
TREES = {"mc_sim": MC_SIM, "bushy": BUSHY, "chain": chain(5), "one": chain(1)}


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@torch.inference_mode()
def test_the_head_after_any_acceptance_equals_starting_over(
    tree: StaticTree, changes: dict[str, Any]
) -> None:
    feed = Feed(eagle(tiny_target(), tree, **changes), seed=len(tree.parents))
    for size in (7, *[tree.n_path] * 4):
        proposed = feed.step(size)
        for row, length in enumerate(feed.length):
            kv, guesses = feed.scratch(row)
            for now, anew in ((feed.cache.k, kv.k), (feed.cache.v, kv.v)):
                close = {"atol": 5e-5, "rtol": 1e-4}
                torch.testing.assert_close(now[:, row, :, :length], anew[:, 0], **close)
            assert proposed.tokens[row].tolist() == guesses
            assert proposed.parents[row].tolist() == list(tree.parents)


@settings(deadline=None, max_examples=15)
@given(choices=tree_choices(max_nodes=9), seed=st.integers(0, 99))
def test_any_static_tree_drafts_what_its_paths_spell(choices: list[list[int]], seed: int) -> None:
    feed = Feed(eagle(tiny_target(), static_tree(choices)), seed)
    with torch.inference_mode():
        for size in (5, 3):
            proposed = feed.step(size)
        for row in range(2):
            assert proposed.tokens[row].tolist() == feed.scratch(row)[1]


# Eager attention reads multiples of 64 slots: around 64 a tree must not lose its own slots.
@pytest.mark.parametrize("tree", [MC_SIM, chain(7)], ids=["mc_sim", "chain"])
@torch.inference_mode()
def test_every_round_of_the_engine_drafts_what_the_whole_text_gives(
    tree: StaticTree, golden_pair: tuple[Transformer, Any]
) -> None:
    target, head = golden_pair
    drafter = EagleDrafter(head, target, tree)
    text = b"class Reader:\n    def __init__(self, name):\n        self.name = name\n"
    engine, deepest = Engine(target, drafter, prefill_chunk=16), 0
    for length in (5, *range(48, 66, 3 if tree is MC_SIM else 1)):
        tokens = [byte + 3 for byte in text[:length]]
        rows = engine.rows([engine.request(tokens, max_new_tokens=24, stop_ids=[])])
        for (row,) in engine.decode(rows):
            if row.done or not length < 64 < row.length + 16:
                continue
            so_far = [*tokens, *row.tokens]
            expected = draft_by_paths(drafter, full_pass(target, so_far[:-1])[0], so_far[1:])
            assert engine.state.tree.tokens[0].tolist() == expected, f"after {len(so_far)} tokens"
        deepest = max(deepest, *row.stats.accepted)
    assert deepest == tree.n_path - 1, "no round accepted a whole path"


# ---------------------------------------------------------------- contract, every drafter


def texts(target: Transformer, lengths: list[int], n: int) -> tuple[list[list[int]], list[Any]]:
    prompts = [prompt(length, 7) for length in lengths]
    return prompts, [plain_decode(target, tokens, n) for tokens in prompts]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_keeps_its_promises_in_every_round(name: str) -> None:
    # The root is the newest token, parents come first, paths fit, no model makes a guess twice.
    target = tiny_target()
    prompts, expected = texts(target, [3, 20], 24)
    truth = [p + text for p, text in zip(prompts, expected, strict=True)]
    engine = Engine(target, DRAFTERS[name](target, truth), batch=2, prefill_chunk=8)
    rows = engine.rows(
        [engine.request(tokens, max_new_tokens=24, stop_ids=[]) for tokens in prompts]
    )
    for _ in engine.decode(rows):
        for index, row in enumerate(rows):
            if row.done:
                continue
            tokens, parents = (side[index].tolist() for side in engine.state.tree)
            assert len(tokens) == engine.drafter.n_nodes
            assert tokens[0] == row.tokens[-1]
            assert parents[0] == 0
            depth = [0] * len(parents)
            for node in range(1, len(parents)):
                assert parents[node] < node
                depth[node] = depth[parents[node]] + 1
            assert max(depth) < engine.drafter.n_path
            edges = list(zip(parents[1:], tokens[1:], strict=True))
            if isinstance(engine.drafter, TreeDrafter):  # others may repeat a guess
                assert len(set(edges)) == len(edges)
            assert int(engine.state.length[index]) == row.length
    assert [row.tokens for row in rows] == expected


def test_the_last_row_is_the_last_valid_one() -> None:
    x = torch.arange(12).view(2, 3, 2)
    for counts, rows in (([1, 3], [[[0, 1]], [[10, 11]]]), ([2, 0], [[[2, 3]], [[6, 7]]])):
        start, n_valid = torch.zeros(2, dtype=torch.int64), torch.tensor(counts)
        news = Accepted(x, x[..., 0], x[..., 1], start, n_valid)
        assert NoDrafter().extend(news, Room(None, 8, run_block)).tolist() == rows


def test_a_tree_wider_than_the_vocabulary_is_refused() -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match="vocabulary"):
        EagleDrafter(tiny_head(target), target, static_tree([[VOCAB]]))
    assert EagleDrafter(tiny_head(target), target, static_tree([[VOCAB - 1]])).n_nodes == 2
