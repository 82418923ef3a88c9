"""Which token does the target choose after each node?

    B batch  N tree nodes  V vocabulary  T cache slots

Greedy is an argmax. Sampling draws by inverse CDF with one uniform for every *position* of the
sequence, made from the request's seed before decoding starts. Only one path of the tree is ever
followed, so the draws along it are independent, and the same seed gives the same text with any
drafter. Nothing here synchronizes with the host (torch.multinomial would).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TEMPERATURE = 1e30  # far above it float32 ends


@dataclass(frozen=True)
class SamplingParams:
    """How to choose: temperature 0 is greedy; top_k 0 and top_p 1 are off; seed None is random."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}; give 0 (greedy) or a positive number, at most "
                f"{MAX_TEMPERATURE:g}"
            )
        if not 0 <= self.top_k < 2**63:
            raise ValueError(f"top_k is {self.top_k}; give 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0, at most 1 (off)")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; give a whole number of at most 64 bits")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Knobs(NamedTuple):
    """Sampling parameters as device tensors, so that changing them recompiles nothing."""

    temperature: Tensor  # [B] float32
    top_k: Tensor  # [B] int64
    top_p: Tensor  # [B] float32
    uniforms: Tensor  # [B, T] float32 in [0, 1): column p draws the token after position p

    def load(self, row: int, params: SamplingParams) -> None:
        """Set one row from a request's parameters."""
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        if not params.greedy:
            generator = torch.Generator()
            if params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(params.seed)
            self.uniforms[row] = torch.rand(self.uniforms.shape[1], generator=generator)


def new_knobs(batch: int, n_slots: int, device: torch.device) -> Knobs:
    """Greedy knobs for `batch` rows and sequences of up to `n_slots` tokens."""
    return Knobs(
        torch.zeros(batch, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.ones(batch, device=device),
        torch.zeros(batch, n_slots, device=device),
    )


def choose(logits: Tensor, positions: Tensor, knobs: Knobs, *, sampled: bool) -> Tensor:
    """One token after every node: logits `[B, N, V]`, positions `[B, N]` -> `[B, N]` int64.

    With `sampled` false the whole batch is greedy and no distribution is built; with it, rows of
    temperature 0 are still greedy.
    """
    best = logits.argmax(-1)
    if not sampled:
        return best
    probs, ids = distribution(logits, knobs)
    uniforms = knobs.uniforms.gather(1, positions.clamp(max=knobs.uniforms.shape[1] - 1))
    return torch.where(knobs.temperature[:, None] > 0, _inverse_cdf(probs, ids, uniforms), best)


def distribution(logits: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """The processed distribution, most likely token first: probabilities and token ids `[B, N, V]`.

    Temperature, then top-k, then top-p, with Hugging Face's meaning: ties with the k-th value stay,
    and top-p keeps the smallest set of tokens whose mass reaches p, never less than one.
    """
    temperature = knobs.temperature.clamp(min=1e-6)[:, None, None]
    values, ids = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    n_tokens = logits.shape[-1]
    k = torch.where(knobs.top_k > 0, knobs.top_k, n_tokens).clamp(max=n_tokens)
    last = values.gather(-1, (k - 1)[:, None, None].expand(*values.shape[:-1], 1))
    probs = torch.where(values < last, -torch.inf, values).softmax(-1)
    top_p = knobs.top_p[:, None, None]
    kept = (probs.cumsum(-1) - probs < top_p) | (top_p >= 1)
    kept = kept | (torch.arange(n_tokens, device=logits.device) == 0)
    probs = torch.where(kept, probs, 0.0)
    return probs / probs.sum(-1, keepdim=True), ids


def _inverse_cdf(probs: Tensor, ids: Tensor, uniforms: Tensor) -> Tensor:
    cdf = probs.cumsum(-1)
    rank = (cdf <= uniforms[..., None] * cdf[..., -1:]).sum(-1)
    # Rounding may push the target past the last kept token; kept tokens are a prefix.
    rank = torch.minimum(rank, (probs > 0).sum(-1) - 1)
    return ids.gather(-1, rank[..., None])[..., 0]
