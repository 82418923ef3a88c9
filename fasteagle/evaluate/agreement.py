"""How close is a model to its reference, say a quantized one to the original?

    n tokens of a text  R rows of a chunk  V vocabulary

Both models read the same tokens and are compared on what they expect next: so a difference does
not change what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fasteagle.config import ModelConfig
from fasteagle.engine import Engine
from fasteagle.evaluate.passes import (
    Span,
    check_tokens,
    scored_logits,
    window_sizes,
    windows,
)
from fasteagle.model import Transformer


class Agreement(NamedTuple):
    """Next tokens of a model beside those of its reference."""

    n_tokens: int  # that were compared
    n_equal: int  # where both find the same token likeliest
    nats: float  # KL(reference || model) of all next-token distributions together

    @property
    def share(self) -> float:
        """Share of positions with the same likeliest token, 0 to 1."""
        return self.n_equal / self.n_tokens

    @property
    def kl(self) -> float:
        """Mean KL(reference || model) in nats."""
        return self.nats / self.n_tokens


def check_pair(model: ModelConfig, reference: ModelConfig) -> int:
    """The context that both have; ValueError unless their vocabularies are of one size."""
    if model.vocab_size != reference.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {model.vocab_size} and the reference one of "
            f"{reference.vocab_size}; give the model's original as --reference_path"
        )
    return min(model.attention_span, reference.attention_span)


def text_agreement(
    target: Transformer,
    reference: Transformer,
    tokens: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Agreement:
    """Compare two models on every token but the first of tokens `[n]`, in windows.

    None as in `window_sizes`; ValueError as in `token_losses` and `check_pair`.
    """
    context = check_pair(target.config, reference.config)
    window, stride = window_sizes(context, window, stride)
    # disable=None: only on a terminal. tqdm writes to stderr.
    with tqdm(total=len(tokens) - 1, unit="tok", desc="comparing", disable=None) as bar:
        return compare(target, reference, tokens, windows(len(tokens), window, stride), bar=bar)


def prompt_agreement(
    target: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
) -> Agreement:
    """Compare two models along what the reference writes greedily after prompts (token ids).

    A text ends early at the reference's stop tokens. ValueError for a prompt that with
    `max_new_tokens` exceeds the context of either model.
    """
    context = check_pair(target.config, reference.config)
    check_lengths(prompts, max_new_tokens, context)
    longest = max(map(len, prompts)) + max_new_tokens
    engine = Engine(reference, max_length=longest)
    found = []
    for prompt in tqdm(prompts, unit="prompt", desc="comparing", disable=None):
        written = engine.generate([prompt], max_new_tokens=max_new_tokens)[0].tokens
        tokens = torch.tensor([*prompt, *written])
        found.append(compare(target, reference, tokens, [Span(0, len(tokens), len(prompt))]))
    return merge(found)


def merge(parts: Sequence[Agreement]) -> Agreement:
    """One Agreement over several texts: counts and nats add up."""
    n_tokens, n_equal, nats = zip(*parts, strict=True)
    return Agreement(sum(n_tokens), sum(n_equal), sum(nats))


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    """ValueError for no prompt, an empty one, or one too long for `context` tokens."""
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty, or there is none; give at least one token")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt, {longest} tokens, and {max_new_tokens} new ones exceed the "
            f"context of {context}; ask for less"
        )


def compare(
    target: Transformer,
    reference: Transformer,
    tokens: Tensor,
    spans: list[Span],
    *,
    bar: tqdm | None = None,
) -> Agreement:
    """Compare two models on the scored tokens of `spans` over tokens `[n]`."""
    for model in (target, reference):
        check_tokens(tokens, model.config)
    n_tokens, n_equal, nats = 0, 0, 0.0
    chunks = (scored_logits(model, tokens, spans) for model in (target, reference))
    for (scored, logits), (_, wanted) in zip(*chunks, strict=True):
        wanted = wanted.to(logits.device)
        n_tokens += len(scored)
        n_equal += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
        nats += float(divergence(wanted, logits).double().sum())
        if bar is not None:
            bar.update(len(scored))
    if not torch.tensor(nats).isfinite():
        raise ValueError(f"the logits are not finite in {target.dtype}; try --dtype float32")
    return Agreement(n_tokens, n_equal, nats)


def divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) in nats from logits `[R, V]` float32 of each: `[R]`."""
    p, q = reference.log_softmax(-1), model.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)  # rounding alone makes it negative
