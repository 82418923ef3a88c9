"""What does an EAGLE-3 head guess? (arXiv 2503.01840, section 3; EAGLE-3.1, arXiv 2605.09992)

    B batch  S new tokens  T cache slots  C head dim  F feature dim  V draft vocabulary

Features are inputs of three target layers, low, mid and high, side by side; fc makes a state of
them. Row i pairs that of token i with the embedding of token i + 1, both normed, at position i. The
head's own output takes the place of features that the target has not computed yet, without fc.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasteagle.cache import LayerCache
from fasteagle.config import Eagle3Config
from fasteagle.draft.eagle import EagleDrafter, Head
from fasteagle.model import (
    Attention,
    Block,
    Linear,
    RMSNorm,
    Rows,
    Transformer,
)
from fasteagle.tree import Tree


class FirstBlock(Block):
    """A decoder layer over [embedding ; state], 2 C wide; what is added to is the state."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        self.self_attn = Attention(config, in_dim=2 * config.dim)
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def forward(self, x: Tensor, rows: Rows, kv: LayerCache) -> Tensor:
        """x `[B, S, 2 C]` -> `[B, R, C]`."""
        embedded, state = x.chunk(2, -1)
        normed = self.hidden_norm(state)
        residual = rows.wanted(normed if self.norm_before_residual else state)
        both = torch.cat((self.input_layernorm(embedded), normed), -1)
        y = residual + self.self_attn(both, rows, kv)
        return y + self.mlp(self.post_attention_layernorm(y))


class Eagle3Head(Head):
    """fc over target features, one wide decoder layer (then ordinary ones), norm and lm_head."""

    config: Eagle3Config
    d2t: Tensor  # [V] int64, what to add to a draft id to have the target's

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        dim, wide, eps = config.dim, config.n_features * config.target_dim, config.norm_eps
        self.input_norm = RMSNorm(wide, eps) if config.norm_before_fc else nn.Identity()
        self.fc_norm = nn.ModuleList(
            RMSNorm(config.target_dim, eps) for _ in range(config.fc_norm * config.n_features)
        )
        self.fc = Linear(wide, dim, bias=config.fc_bias)
        plain = (Block(config) for _ in range(config.n_layers - 1))
        self.layers = nn.ModuleList([FirstBlock(config), *plain])
        self.norm = RMSNorm(dim, eps)
        self.lm_head: nn.Module | None = None
        if config.own_lm_head:
            self.lm_head = Linear(dim, config.draft_vocab_size, bias=False)
        if config.maps_vocab:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    def project(self, features: Tensor) -> Tensor:
        features = self.input_norm(features)
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), -1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, -1)
        return self.fc(features)

    def joined(self, embedded: Tensor, states: Tensor) -> Tensor:
        return torch.cat((embedded, states), -1)

    def finished(self, y: Tensor) -> Tensor:
        return self.norm(y) if self.config.norm_output else y

    def scored(self, state: Tensor) -> Tensor:
        """What an lm_head takes, of states `[B, S, C]`."""
        return state if self.config.norm_output else self.norm(state)


class Eagle3Drafter(EagleDrafter):
    """An EAGLE-3 head on a tree; embedding and, where it has none, lm_head are the target's."""

    name = "eagle3"
    title = "EAGLE-3 head"
    head: Eagle3Head

    def __init__(
        self, head: Eagle3Head, target: Transformer, tree: Tree, vocab: Tensor | None = None
    ) -> None:
        config = head.config
        if vocab is not None and config.own_lm_head:
            raise ValueError(
                "an EAGLE-3 head with an lm_head of its own has its own draft vocabulary; drop "
                "--draft_vocab"
            )
        super().__init__(head, target, tree, vocab)
        if config.own_lm_head and tree.width > config.draft_vocab_size:
            raise ValueError(
                f"the tree asks for guess number {tree.width - 1} of a draft vocabulary of "
                f"{config.draft_vocab_size}; use a narrower --tree"
            )
        self.feature_layers = feature_layers(config, target.config.n_layers)
        self.ids: Tensor | None = None
        if config.maps_vocab:
            self.ids = head.d2t + torch.arange(len(head.d2t), device=head.d2t.device)
            _check_ids(self.ids, target.config.vocab_size)

    def logits(self, state: Tensor) -> Tensor:
        state = self.head.scored(state)
        if self.head.lm_head is not None:
            scores: Tensor = self.head.lm_head(state)
            return scores
        if self.head.config.tie_embeddings:
            own = self.head.config.own_embedding
            return (self.head if own else self.target).embed_tokens.scores(state)
        return super().logits(state)

    def tokens(self, guesses: Tensor) -> Tensor:
        return super().tokens(guesses) if self.ids is None else self.ids[guesses]


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    """ValueError unless a draft vocabulary's tokens `[V]` are distinct ones of the target's."""
    if ids.is_meta:
        return
    found, counts = ids.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"the head's d2t leads to token {int(found[counts > 1][0])} more than once; download "
            "it, or make it, again"
        )
    beyond = found[(found < 0) | (found >= vocab_size)].tolist()
    if beyond:
        raise ValueError(
            f"the head's d2t leads to token {beyond[0]}, but the target has {vocab_size}; give the "
            "head of this target"
        )


def feature_layers(config: Eagle3Config, n_layers: int) -> tuple[int, ...]:
    """The target layers whose inputs a head wants: its own, or those that EAGLE-3 trains on.

    n_layers is the target's; its number stands for the output of the last layer.
    """
    layers = config.feature_layers or (2, n_layers // 2, n_layers - 3)
    if not all(0 <= layer <= n_layers for layer in layers):
        raise ValueError(
            f"the head wants the inputs of layers {', '.join(map(str, layers))}, but the target "
            f"has {n_layers} layers; give the head of this target"
        )
    return layers
