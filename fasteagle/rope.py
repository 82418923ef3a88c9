"""Where is each token? Rotary position embedding and its stretched variants.

B batch  S new tokens  D head dim
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasteagle.config import RopeScaling


class Rotary(NamedTuple):
    cos: Tensor  # [B, S, 1, D / 2]
    sin: Tensor  # [B, S, 1, D / 2]


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


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """Rotate pairs (i, i + D / 2) of x `[B, S, heads, D]`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), -1)


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
