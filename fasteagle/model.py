"""What does the target model compute?

    B batch  S new tokens  T cache slots  V vocabulary
    H query heads  G kv heads  D head dim  C model dim  F feature dim  L layers

A decoder of the LLaMA family described by a ModelConfig: weights only, no state. Parameter names
are Hugging Face's without the `model.` prefix, with q, k, v fused into qkv_proj and gate, up into
gate_up_proj.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle.cache import KVCache, LayerCache
from fasteagle.config import DraftConfig, ModelConfig, RopeScaling


class Rotary(NamedTuple):
    cos: Tensor  # [B, S, 1, D / 2]
    sin: Tensor  # [B, S, 1, D / 2]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RoPE(nn.Module):
    """Rotary position embedding, rotate-half layout (arXiv 2104.09864), with optional scaling."""

    inv_freq: Tensor  # [D / 2] float32
    gain: float

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        # On the CPU whatever the device context: a meta tensor would lose these constants.
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        inv_freq, gain = scale_frequencies(1.0 / theta**exponent, theta, scaling)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.gain = gain

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        assert self.inv_freq.dtype == torch.float32, (
            "cast weights with load(dtype=), not .to(dtype)"
        )
        angle = (positions[:, :, None].float() * self.inv_freq)[:, :, None, :]
        return Rotary((angle.cos() * self.gain).to(dtype), (angle.sin() * self.gain).to(dtype))


def scale_frequencies(
    inv_freq: Tensor, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, float]:
    """Apply a RopeScaling to frequencies `[D / 2]`; return them with the gain on cos and sin."""
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(inv_freq, theta, scaling), _yarn_gain(scaling)
    raise ValueError(
        f"RoPE scaling {scaling.kind!r} is not supported; expected linear, llama3 or yarn"
    )


def _llama3(inv_freq: Tensor, s: RopeScaling) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1 release)."""
    turns = s.original_max_positions * inv_freq / (2 * math.pi)
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / s.factor + blend * inv_freq


def _yarn(inv_freq: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """NTK-by-parts interpolation (arXiv 2309.00071, section 3.2)."""
    n_pairs = inv_freq.numel()

    def pair_of(turns: float) -> float:
        """The pair that makes `turns` rotations within the trained context."""
        wave = s.original_max_positions / (turns * 2 * math.pi)
        return n_pairs * math.log(wave) / math.log(theta)

    low, high = pair_of(s.beta_fast), pair_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * n_pairs - 1)
    ramp = (torch.arange(n_pairs, device="cpu").float() - low) / max(high - low, 1e-3)
    stretched = ramp.clamp(0, 1)
    return inv_freq / s.factor * stretched + inv_freq * (1 - stretched)


def _yarn_gain(s: RopeScaling) -> float:
    """Attention temperature (arXiv 2309.00071, section 3.4), folded into cos and sin."""

    def mscale(weight: float) -> float:
        return 1.0 if s.factor <= 1 else 0.1 * weight * math.log(s.factor) + 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return mscale(s.mscale) / mscale(s.mscale_all_dim)
    return mscale(1.0)


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """Rotate pairs (i, i + D / 2) of x `[B, S, heads, D]`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The one attention seam: q `[B, G, R, D]` (R rows of all query heads of a kv head), k, v
    `[B, G, T, D]`, bias `[B, 1, R, T]` added to the scores; returns `[B, G, R, D]`.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig | DraftConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.qkv_proj = nn.Linear(config.dim, sum(self.sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.dim, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: Rotary, bias: Tensor, slots: Tensor, kv: LayerCache
    ) -> Tensor:
        """x `[B, S, C]`; bias `[B, 1, S * H / G, T]`; slots `[B, S]`; returns `[B, S, C]`."""
        B, S, _ = x.shape
        q, k, v = (t.view(B, S, -1, self.head_dim) for t in self.qkv_proj(x).split(self.sizes, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        kv.write(slots, rotate(k, rope), v)
        keys, values = kv.read(bias.shape[-1])
        # The query heads of a kv head become rows, so grouped queries never copy the cache.
        group = self.n_heads // self.n_kv_heads
        q = rotate(q, rope).view(B, S, self.n_kv_heads, group, self.head_dim).transpose(1, 2)
        y = attend(q.reshape(B, self.n_kv_heads, S * group, self.head_dim), keys, values, bias)
        y = y.view(B, self.n_kv_heads, S, group, self.head_dim).transpose(1, 2)
        return self.o_proj(y.reshape(B, S, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig | DraftConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.dim, 2 * size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig | DraftConfig, *, input_norm: bool = True) -> None:
        super().__init__()
        norm = RMSNorm(config.dim, config.norm_eps) if input_norm else nn.Identity()
        self.input_layernorm = norm
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rope: Rotary, bias: Tensor, slots: Tensor, kv: LayerCache
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, bias, slots, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


RunBlock = Callable[[nn.Module, Tensor, Rotary, Tensor, Tensor, LayerCache], Tensor]


def run_block(
    block: nn.Module, x: Tensor, rope: Rotary, bias: Tensor, slots: Tensor, kv: LayerCache
) -> Tensor:
    """Apply one block; compile.py may put a compiled twin in its place."""
    y: Tensor = block(x, rope, bias, slots, kv)
    return y


def attention_bias(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """mask `[B, S, T]` bool -> `[B, 1, S * group, T]`: 0 where seen, -inf elsewhere."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return bias.repeat_interleave(group, dim=1)[:, None]


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rope = RoPE(config.head_dim, config.rope_theta, config.rope_scaling)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

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
        inputs of `feature_layers` side by side, or the hidden states if there are none.
        """
        x = self.embed_tokens(tokens)
        rope = self.rope(positions, x.dtype)
        bias = attention_bias(mask, self.config.n_heads // self.config.n_kv_heads, x.dtype)
        features = []
        for index, block in enumerate(self.layers):
            if index in feature_layers:
                features.append(x)
            x = run(block, x, rope, bias, slots, cache.layer(index))
        x = self.norm(x)
        return x, (torch.cat(features, -1) if features else x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[..., C]` -> `[..., V]`."""
        tied = self.config.tie_embeddings
        return F.linear(hidden, self.embed_tokens.weight) if tied else self.lm_head(hidden)

    def new_cache(self, batch: int, n_slots: int) -> KVCache:
        c = self.config
        shape = (c.n_layers, batch, c.n_kv_heads, n_slots, c.head_dim)
        return KVCache(shape, dtype=self.dtype, device=self.device)
