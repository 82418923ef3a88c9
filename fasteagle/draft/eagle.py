"""What does an EAGLE-1 head guess? (arXiv 2401.15077, section 4; static trees)

    B batch  S new tokens  P longest path, root included  N tree nodes  T cache slots
    C model dim  V vocabulary  K kept ids  M internal nodes  w nodes of one level

Row i of the head pairs the target's feature of token i (its last hidden state after the final norm)
with the embedding of token i + 1, at position i, and predicts the feature of token i + 1. The
target's own lm_head, or some of its rows, turns that into guesses at token i + 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasteagle.cache import KVCache
from fasteagle.config import DraftConfig
from fasteagle.draft.base import last_of
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
from fasteagle.tree import DraftTree, StaticTree, ancestors, causal_mask, tree_mask


class EagleHead(nn.Module):
    """fc over [embedding ; feature], then decoder layers; no first input norm, no final norm."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = Linear(2 * config.dim, config.dim, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            Block(config, input_norm=index > 0) for index in range(config.n_layers)
        )
        self.rope = RoPE(config.head_dim, config.rope_theta, config.rope_scaling)
        if config.own_embedding:
            self.embed_tokens = Embedding(config.vocab_size, config.dim)

    def forward(
        self,
        embedded: Tensor,
        features: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        cache: KVCache,
        *,
        run: RunBlock,
        only: Tensor | None = None,
    ) -> Tensor:
        """embedded, features `[B, S, C]`; positions, slots `[B, S]`; mask `[B, S, T]`.

        Returns all rows, or those `[B, R]` that `only` names.
        """
        x = self.fc(torch.cat((embedded, features), -1))
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
        return run(last, x, rows(only), cache.layers[-1])

    def new_cache(self, batch: int, n_slots: int) -> KVCache:
        c, weight = self.config, self.get_parameter("layers.0.post_attention_layernorm.weight")
        shape = (c.n_layers, batch, c.n_kv_heads, n_slots, c.head_dim)
        return KVCache(shape, dtype=weight.dtype, device=weight.device)

    def borrow_embedding(self) -> None:
        """Use the target's embedding: the head's own is the same."""
        self.config = replace(self.config, own_embedding=False)
        del self.embed_tokens


class Level(NamedTuple):
    """One step down a static tree: the nodes of a depth that have children, and those children."""

    pick: Tensor  # [w] which nodes of this depth have children
    source: Tensor  # [w] row of each one's parent in the previous level
    above: Tensor  # [w, M] ancestors among all internal nodes, itself included
    offset: int  # how many internal nodes come before them
    owner: Tensor  # [c] for each child: row of its parent in this level
    rank: Tensor  # [c] for each child: which guess it is
    width: int  # guesses needed a row: highest rank + 1


def plan_levels(tree: StaticTree, device: torch.device) -> list[Level]:
    """The head's steps for a static tree. Level 0 is the root, which `extend` has already run."""
    above = ancestors(torch.tensor([tree.parents]), tree.n_path)[0]
    at = [[n for n in range(tree.n_nodes) if tree.depth[n] == d] for d in range(tree.n_path)]
    inner = [n for depth in range(1, tree.n_path) for n in tree.internal(depth)]
    levels, previous = [], [0]

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    for depth in range(tree.n_path - 1):
        nodes, children = tree.internal(depth), at[depth + 1]
        ranks = [tree.rank[n] for n in children]
        levels.append(
            Level(
                pick=index([at[depth].index(n) for n in nodes]),
                source=index([previous.index(tree.parents[n]) for n in nodes]),
                above=above[nodes][:, inner].to(device),
                offset=inner.index(nodes[0]) if depth else 0,
                owner=index([nodes.index(tree.parents[n]) for n in children]),
                rank=index(ranks),
                width=max(ranks) + 1,
            )
        )
        previous = nodes
    return levels


def best(logits: Tensor, width: int) -> Tensor:
    """The `width` most likely tokens of logits `[..., V]`, best first: `[..., width]`."""
    if width == 1:  # an argmax fuses, a topk is a kernel of its own
        return logits.argmax(-1, keepdim=True)
    return logits.topk(width, -1).indices


def _check_width(tree: StaticTree, n_tokens: int, *, pruned: bool) -> None:
    if max(tree.rank) >= n_tokens:
        where, cure = ("draft vocabulary", " or a larger one") if pruned else ("vocabulary", "")
        raise ValueError(
            f"the tree asks for guess number {max(tree.rank)} of a {where} of {n_tokens}; use a "
            f"narrower --tree{cure}"
        )


class EagleDrafter:
    """An EAGLE-1 head on a static tree; it borrows the target's embedding and lm_head.

    vocab `[K]` int64, ascending: guess these tokens only, with a copy of their rows of the lm_head.
    ValueError for a tree that asks for more guesses than there are tokens, or ids that do not fit.
    """

    name = "eagle"
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self,
        head: EagleHead,
        target: Transformer,
        tree: StaticTree,
        vocab: Tensor | None = None,
    ) -> None:
        size = target.config.vocab_size
        kept = None if vocab is None else check_ids(vocab.tolist(), size, "draft vocabulary")
        _check_width(tree, size if kept is None else len(kept), pruned=kept is not None)
        self.head, self.target, self.tree = head, target, tree
        self.n_nodes, self.n_path, self.is_chain = tree.n_nodes, tree.n_path, tree.is_chain
        device = target.device
        self.weights: nn.Module | None = head
        self.vocab, self.draft_lm_head = kept, None
        if kept is not None:
            self.vocab = kept.to(device)
            self.draft_lm_head = head_rows(target, self.vocab)
            # Beside the head, not in it: its state_dict stays what its file holds.
            self.weights = nn.ModuleList([head, self.draft_lm_head])
        self.parents = torch.tensor([tree.parents], device=device)
        self.levels = plan_levels(tree, device)

    def new_cache(self, batch: int, n_slots: int) -> KVCache:
        return self.head.new_cache(batch, n_slots)

    def embed(self, tokens: Tensor) -> Tensor:
        own = self.head.config.own_embedding
        return (self.head if own else self.target).embed_tokens(tokens)

    def guess(self, hidden: Tensor, width: int) -> Tensor:
        """The `width` likeliest tokens after each row, best first: `[B, S, C]` -> `[B, S, w]`."""
        if self.vocab is None or self.draft_lm_head is None:
            return best(self.target.logits(hidden), width)
        return self.vocab[best(self.draft_lm_head(hidden), width)]

    def extend(
        self,
        features: Tensor,
        tokens: Tensor,
        start: Tensor,
        count: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> Tensor:
        assert cache is not None, "an EAGLE head needs its cache"
        slots = cache.slots(start, tokens.shape[1])
        mask, embedded = causal_mask(slots, n_slots), self.embed(tokens)
        return self.head(
            embedded, features, slots, slots, mask, cache, run=run, only=last_of(count)
        )

    def propose(
        self,
        state: Tensor,
        root: Tensor,
        length: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> DraftTree:
        assert cache is not None, "an EAGLE head needs its cache"
        hidden, guesses = state, [root]
        for depth, level in enumerate(self.levels):
            if depth:
                guessed = guesses[-1]
                if not self.is_chain:  # else there is one of each
                    guessed, hidden = guessed[:, level.pick], hidden[:, level.source]
                inputs = self.embed(guessed), hidden
                positions = (length + depth - 1)[:, None].expand(inputs[0].shape[:2])
                slots = cache.slots(length + level.offset, level.pick.shape[0])
                mask = tree_mask(length, level.above, n_slots)
                hidden = self.head(*inputs, positions, slots, mask, cache, run=run)
            ranked = self.guess(hidden, level.width)
            guesses.append(ranked[..., -1] if self.is_chain else ranked[:, level.owner, level.rank])
        return DraftTree(torch.cat(guesses, 1), self.parents.expand(root.shape[0], -1))
