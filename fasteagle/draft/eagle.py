"""What does an EAGLE-1 head guess? (arXiv 2401.15077, section 4; EAGLE-2 is the same head)

    B batch  S new tokens  T cache slots  C model dim  F feature dim  V vocabulary  K kept ids
    w nodes of one level

Row i of the head pairs the target's feature of token i (its last hidden state after the final norm)
with the embedding of token i + 1, at position i, and predicts the feature of token i + 1. The
target's own lm_head, or some of its rows, turns that into guesses at token i + 2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fasteagle.cache import KVCache
from fasteagle.config import DraftConfig
from fasteagle.draft.base import Accepted, Room
from fasteagle.draft.grow import Place, TreeDrafter, cache_of
from fasteagle.draft.vocabulary import check_ids, head_rows
from fasteagle.model import (
    Block,
    Embedding,
    Linear,
    Rows,
    RunBlock,
    Transformer,
    attention_bias,
    take,
)
from fasteagle.rope import RoPE
from fasteagle.tree import DraftTree, Tree, causal_mask, tree_mask


class Head(nn.Module):
    """What EAGLE heads share: decoder layers over an input, RoPE, an embedding, a cache."""

    layers: nn.ModuleList
    embed_tokens: Embedding

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = RoPE(config.head_dim, config.rope_theta, config.rope_scaling)
        if config.own_embedding:
            self.embed_tokens = Embedding(config.vocab_size, config.dim)

    def project(self, features: Tensor) -> Tensor:
        """The target's features `[B, S, F]` as states `[B, S, C]`."""
        return features

    def joined(self, embedded: Tensor, states: Tensor) -> Tensor:
        """The first layer's input `[B, S, ...]`, of a token's embedding and the state before it."""
        raise NotImplementedError

    def finished(self, y: Tensor) -> Tensor:
        """The state that the last layer's output is."""
        return y

    def forward(
        self,
        embedded: Tensor,
        states: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        cache: KVCache,
        *,
        run: RunBlock,
        only: Tensor | None = None,
    ) -> Tensor:
        """embedded, states `[B, S, C]`; positions, slots `[B, S]`; mask `[B, S, T]`.

        Returns all rows `[B, S, C]`, or those `[B, R]` that `only` names.
        """
        x = self.joined(embedded, states)
        rope = self.rope(positions, x.dtype)
        group = self.config.n_heads // self.config.n_kv_heads

        def rows(only: Tensor | None) -> Rows:
            seen = mask if only is None else take(mask, only)
            return Rows(rope, slots, attention_bias(seen, group, x.dtype), only)

        *inner, last = self.layers
        if inner:
            whole = rows(None)
            for block, kv in zip(inner, cache.layers, strict=False):
                x = run(block, x, whole, kv)
        return self.finished(run(last, x, rows(only), cache.layers[-1]))

    def new_cache(self, batch: int, n_slots: int) -> KVCache:
        c, weight = self.config, self.get_parameter("layers.0.post_attention_layernorm.weight")
        shape = (c.n_layers, batch, c.n_kv_heads, n_slots, c.head_dim)
        return KVCache(shape, dtype=weight.dtype, device=weight.device)

    def borrow_embedding(self) -> None:
        """Use the target's embedding: the head's own is the same."""
        self.config = replace(self.config, own_embedding=False)
        del self.embed_tokens


class EagleHead(Head):
    """fc over [embedding ; feature], then decoder layers; no first input norm, no final norm."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.fc = Linear(2 * config.dim, config.dim, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            Block(config, input_norm=index > 0) for index in range(config.n_layers)
        )

    def joined(self, embedded: Tensor, states: Tensor) -> Tensor:
        return self.fc(torch.cat((embedded, states), -1))


class EagleDrafter(TreeDrafter):
    """An EAGLE-1 head on a tree; it borrows the target's embedding and lm_head.

    vocab `[K]` int64, ascending: guess these tokens only, with a copy of their rows of the lm_head.
    ValueError for a tree that asks for more guesses than there are tokens, or ids that do not fit.
    """

    name = "eagle"
    title = "EAGLE head"

    def __init__(
        self,
        head: Head,
        target: Transformer,
        tree: Tree,
        vocab: Tensor | None = None,
    ) -> None:
        size = target.config.vocab_size
        kept = None if vocab is None else check_ids(vocab.tolist(), size, "draft vocabulary")
        n_guesses, pruned = size if kept is None else len(kept), kept is not None
        super().__init__(tree, n_guesses=n_guesses, device=target.device, pruned=pruned)
        self.head, self.target = head, target
        self.trained_length = head.config.max_positions
        self.weights = head
        self.vocab, self.draft_lm_head = kept, None
        if kept is not None:
            self.vocab = kept.to(target.device)
            self.draft_lm_head = head_rows(target, self.vocab)
            # Beside the head, not in it: its state_dict stays what its file holds.
            self.weights = nn.ModuleList([head, self.draft_lm_head])

    @property
    def words(self) -> str:
        if self.vocab is None:
            return super().words
        kept = f"draft vocabulary {len(self.vocab)} of {self.target.config.vocab_size}"
        return f"{super().words}, {kept}"

    def new_memory(self, batch: int, n_slots: int) -> KVCache:
        return self.head.new_cache(batch, n_slots)

    def embed(self, tokens: Tensor) -> Tensor:
        own = self.head.config.own_embedding
        return (self.head if own else self.target).embed_tokens(tokens)

    def logits(self, state: Tensor) -> Tensor:
        if self.draft_lm_head is None:
            return self.target.logits(state)
        return self.draft_lm_head(state)

    def tokens(self, guesses: Tensor) -> Tensor:
        return guesses if self.vocab is None else self.vocab[guesses]

    def extend(self, news: Accepted, room: Room) -> Tensor:
        cache = cache_of(room)
        slots = cache.slots(news.start, news.following.shape[1])
        mask = causal_mask(slots, room.n_slots)
        embedded, states = self.embed(news.following), self.head.project(news.features)
        return self.head(embedded, states, slots, slots, mask, cache, run=room.run, only=news.last)

    def step(self, tokens: Tensor, state: Tensor, place: Place, room: Room) -> Tensor:
        cache = cache_of(room)
        positions = (place.length + place.depth - 1)[:, None].expand(tokens.shape)
        slots = cache.slots(place.length + place.offset, tokens.shape[1])
        mask = tree_mask(place.length, place.above, room.n_slots)
        embedded = self.embed(tokens)
        return self.head(embedded, state, positions, slots, mask, cache, run=room.run)

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        return self.grow(state, root, length, room)
