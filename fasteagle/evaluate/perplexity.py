"""How well does a model predict a text? Nats, bits and perplexity.

n tokens of a text  V vocabulary
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fasteagle.evaluate.passes import (
    check_tokens,
    scored_logits,
    window_sizes,
    windows,
)
from fasteagle.model import Transformer


class Perplexity(NamedTuple):
    """What a text costs a model."""

    nats: float  # of all scored tokens together
    n_tokens: int  # that were scored
    n_bytes: int  # of the UTF-8 text that they stand for

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return float(torch.tensor(self.nats_per_token, dtype=torch.float64).exp())

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the figures a token."""
        return self.nats / math.log(2) / self.n_bytes


def token_losses(
    target: Transformer, tokens: Tensor, *, window: int | None = None, stride: int | None = None
) -> Tensor:
    """Nats of tokens 1 .. n - 1 of `[n]`, each after its window's context: `[n - 1]` float32, CPU.

    The softmax is float32 whatever the weights are. None as in `window_sizes`. ValueError for sizes
    that do not fit the model, fewer than 2 tokens, tokens outside of its vocabulary, and logits
    that are not finite.
    """
    check_tokens(tokens, target.config)
    window, stride = window_sizes(target.config.attention_span, window, stride)
    spans = windows(len(tokens), window, stride)
    losses = []
    # disable=None: only on a terminal. tqdm writes to stderr.
    with tqdm(total=len(tokens) - 1, unit="tok", desc="scoring", disable=None) as bar:
        for scored, logits in scored_logits(target, tokens, spans):
            chosen = logits.log_softmax(-1).gather(-1, scored[:, None])[:, 0]
            losses.append(-chosen.cpu())
            bar.update(len(scored))
    found = torch.cat(losses)
    if not found.isfinite().all():
        raise ValueError(f"the logits are not finite in {target.dtype}; try --dtype float32")
    return found


def perplexity(losses: Tensor, n_bytes: int) -> Perplexity:
    """The figures of losses `[n - 1]` in nats, of tokens that stand for `n_bytes` bytes of text."""
    return Perplexity(float(losses.double().sum()), losses.numel(), n_bytes)
