"""What does the target model compute?

    B batch  S new tokens  T cache slots  V vocabulary
    H query heads  G kv heads  D head dim  C model dim  F feature dim  L layers

A decoder of the LLaMA family described by a ModelConfig: weights only, no state. Parameter names
are Hugging Face's without the `model.` prefix, with q, k, v fused into qkv_proj and gate, up into
gate_up_proj.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle import panel, tree_attention
from fasteagle.cache import KVCache, LayerCache
from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.experts import Experts, gated
from fasteagle.rope import RoPE, Rotary, rotate


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer whose weight is `[out, in]` or, on a compiled CPU engine, in panels."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        y = panel.product(x, self.weight)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Embedding):
    """Rows of a `[vocabulary, C]` weight; with tied embeddings it may be in panels too."""

    dtype = torch.float32  # the model's; panels may hold the weight in fewer bits

    def forward(self, tokens: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.embedding(tokens, self.weight)
        return panel.lookup(self.weight, tokens, self.dtype)

    @property
    def table(self) -> Tensor:
        """The weight as `[vocabulary, C]`, however it is stored."""
        return self.weight if self.weight.dim() == 2 else panel.unpack(self.weight).to(self.dtype)

    def scores(self, hidden: Tensor) -> Tensor:
        """The weight as an lm_head: `[..., C]` -> `[..., vocabulary]`."""
        if self.weight.dim() == 2:
            return F.linear(hidden, self.weight)
        return panel.product(hidden, self.weight)


def pack(module: nn.Module | None) -> None:
    """Store a model's dense CPU matrices in panels; what cannot be packed stays."""
    for part in module.modules() if module else ():
        if isinstance(part, Linear) and panel.packable(part.weight):
            part.weight.data = panel.pack(part.weight.data)
        if isinstance(part, Transformer) and part.tied and panel.packable(part.embed_tokens.weight):
            part.embed_tokens.dtype = part.embed_tokens.weight.dtype
            part.embed_tokens.weight.data = panel.pack(part.embed_tokens.weight.data)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slots: Tensor) -> Tensor:
    """The one attention seam: q `[B, G, R, D]` (R rows of all query heads of a kv head), k, v
    `[B, G, T, D]`, bias `[B, 1, R, T]` added to the scores; returns `[B, G, R, D]`.

    slots `[B, S]` ascend and were just written: the bias must hide all slots after the last one.
    """
    if tree_attention.is_ours(q, k, slots.shape[1]):
        return tree_attention.tree_attention(q, k, v, bias, slots[:, -1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, R]` of x `[B, S, ...]`: `[B, R, ...]`."""
    index = rows.view(*rows.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


class Rows(NamedTuple):
    """Where the S rows of a pass are, what they see, and which R of them go on (default: all)."""

    rope: Rotary
    slots: Tensor  # [B, S]
    bias: Tensor  # [B, 1, R * H / G, T]
    only: Tensor | None = None  # [B, R]; the others just write their keys and values

    def wanted(self, x: Tensor) -> Tensor:
        """The rows of x `[B, S, ...]` that go on: `[B, R, ...]`."""
        return x if self.only is None else take(x, self.only)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig | DraftConfig, *, in_dim: int | None = None) -> None:
        """in_dim: how wide the input is, where it is not the model dim."""
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.qkv_proj = Linear(in_dim or config.dim, sum(self.sizes), bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.dim, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rows: Rows, kv: LayerCache) -> Tensor:
        """x `[B, S, C]` -> `[B, R, C]`; all S rows write their keys and values."""
        B = x.shape[0]
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x).split(self.sizes, -1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        kv.write(rows.slots, rotate(k, rows.rope), v)
        keys, values = kv.read(rows.bias.shape[-1])
        # The query heads of a kv head become rows, so grouped queries never copy the cache.
        group = self.n_heads // self.n_kv_heads
        q = rows.wanted(rotate(q, rows.rope))
        R = q.shape[1]
        q = q.view(B, R, self.n_kv_heads, group, self.head_dim).transpose(1, 2)
        q = q.reshape(B, self.n_kv_heads, R * group, self.head_dim)
        y = attend(q, keys, values, rows.bias, rows.slots)
        y = y.view(B, self.n_kv_heads, R, group, self.head_dim).transpose(1, 2)
        return self.o_proj(y.reshape(B, R, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig | DraftConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(config.dim, 2 * size, bias=config.mlp_bias)
        self.down_proj = Linear(size, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig | DraftConfig, *, input_norm: bool = True) -> None:
        super().__init__()
        norm = RMSNorm(config.dim, config.norm_eps) if input_norm else nn.Identity()
        self.input_layernorm = norm
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp: Experts | FeedForward
        if isinstance(config, ModelConfig) and config.n_experts:
            self.mlp = Experts(config)
        else:
            self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rows: Rows, kv: LayerCache) -> Tensor:
        """x `[B, S, C]` -> `[B, R, C]`."""
        x = rows.wanted(x) + self.self_attn(self.input_layernorm(x), rows, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


RunBlock = Callable[[nn.Module, Tensor, Rows, LayerCache], Tensor]


def run_block(block: nn.Module, x: Tensor, rows: Rows, kv: LayerCache) -> Tensor:
    """Apply one block; compile.py may put a compiled twin in its place."""
    y: Tensor = block(x, rows, kv)
    return y


def attention_bias(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """mask `[B, S, T]` bool -> `[B, 1, S * group, T]`: 0 where seen, -inf elsewhere."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return bias.repeat_interleave(group, dim=1)[:, None]


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rope = RoPE(config.head_dim, config.rope_theta, config.rope_scaling)
        # Tied embeddings have one too if it was quantized: the embedding never is.
        self.lm_head: nn.Module | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.dim, config.vocab_size, bias=False)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the lm_head, too."""
        return self.lm_head is None

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        cache: KVCache,
        *,
        feature_layers: tuple[int, ...] = (),
        run: RunBlock = run_block,
    ) -> tuple[Tensor, Tensor]:
        """Run tokens, positions, slots `[B, S]` under mask `[B, S, T]` bool; write their keys.

        Returns the normed hidden states `[B, S, C]` and the features `[B, S, F]` for a drafter: the
        inputs of `feature_layers` side by side (one past the last is the last layer's output), or
        the hidden states if there are none.
        """
        x = self.embed_tokens(tokens)
        group = self.config.n_heads // self.config.n_kv_heads
        rows = Rows(self.rope(positions, x.dtype), slots, attention_bias(mask, group, x.dtype))
        inputs: dict[int, Tensor] = {}  # only what is asked for, so that the rest can be freed
        for index, block in enumerate(self.layers):
            if index in feature_layers:
                inputs[index] = x
            x = run(block, x, rows, cache.layers[index])
        inputs[len(self.layers)] = x
        x = self.norm(x)
        features = [inputs[layer] for layer in feature_layers]
        return x, (torch.cat(features, -1) if features else x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[..., C]` -> `[..., V]`."""
        if self.lm_head is None:
            return self.embed_tokens.scores(hidden)
        scores: Tensor = self.lm_head(hidden)
        return scores

    def new_cache(self, batch: int, n_slots: int) -> KVCache:
        c = self.config
        shape = (c.n_layers, batch, c.n_kv_heads, n_slots, c.head_dim)
        return KVCache(shape, dtype=self.dtype, device=self.device)
