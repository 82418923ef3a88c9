"""What does a model predict along a text? Windows over its tokens, and the logits they score.

    R rows of a chunk  V vocabulary  n tokens of a text

Windows slide as in Hugging Face's recipe for perplexity: every token but the first is scored once,
after at least `window - stride` tokens of context where there are that many. Positions start at 0
in every window, so keys of the window before are of no use and each window is computed anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.config import ModelConfig
from fasteagle.model import Transformer
from fasteagle.tokenizer import Tokenizer
from fasteagle.tree import causal_mask

MAX_WINDOW = 2048  # of the default; a longer one has to be asked for
ROWS = 256  # of one pass: bounds the mask and the logits


class Span(NamedTuple):
    """A window: tokens `begin .. end - 1`, of which those from `first_scored` on are scored."""

    begin: int
    end: int
    first_scored: int


class Text(NamedTuple):
    """A text as a model reads it."""

    tokens: Tensor  # [n] int64; the first one is not scored: BOS, or a token without context
    n_bytes: int  # of the UTF-8 text that the scored tokens stand for


def window_sizes(context: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride in tokens; None is min(context, 2048), and half the window.

    ValueError unless 2 <= window <= context and 1 <= stride <= window.
    """
    window = min(context, MAX_WINDOW) if window is None else window
    if window < 2:
        raise ValueError(f"window is {window}; give 2 tokens or more")
    if window > context:
        raise ValueError(f"window is {window}; the context is {context} tokens, give that at most")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; a window of {window} takes 1 to {window}")
    return window, stride


def windows(n_tokens: int, window: int, stride: int) -> list[Span]:
    """The windows over a text: together they score tokens 1 .. n_tokens - 1, each once.

    n_tokens 7, window 4, stride 2 -> (0, 4, 1), (2, 6, 4), (4, 7, 6). A window's last token is
    scored but not fed, so with stride == window each begins one token early: (0, 4, 1), (3, 7, 4)
    feeds tokens 3 .. 5. ValueError for fewer than 2 tokens or sizes that cannot be.
    """
    if n_tokens < 2:
        raise ValueError(f"the text holds {n_tokens} tokens; scoring takes 2 or more")
    window, stride = window_sizes(window, window, stride)
    spans = [Span(0, min(window, n_tokens), 1)]
    while (done := spans[-1].end) < n_tokens:
        begin = min(len(spans) * stride, done - 1)
        spans.append(Span(begin, min(len(spans) * stride + window, n_tokens), done))
    return spans


def encode_text(tokenizer: Tokenizer, text: str, *, max_tokens: int | None = None) -> Text:
    """A text's tokens after BOS, where the model is used to one; the first `max_tokens` of them.

    ValueError for an empty text and one of fewer than 2 tokens.
    """
    if not text:
        raise ValueError("the text is empty; give some")
    ids = tokenizer.encode(text, bos=False)
    kept = ids[:max_tokens]
    if len(kept) < 2:
        raise ValueError(f"the text holds {len(kept)} token; scoring takes 2 or more")
    whole = len(kept) == len(ids)
    n_bytes = len(text.encode()) if whole else _n_bytes(tokenizer, kept)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        return Text(torch.tensor([tokenizer.bos_id, *kept]), n_bytes)
    return Text(torch.tensor(kept), n_bytes - _n_bytes(tokenizer, kept[:1]))


def _n_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Bytes of the characters that end within these tokens."""
    return len(tokenizer.decoder().push(ids).encode())


def check_tokens(tokens: Tensor, config: ModelConfig) -> None:
    """ValueError if one of tokens `[n]` is outside of the model's vocabulary."""
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if outside.numel():
        raise ValueError(
            f"the text holds token {int(outside[0])}; the vocabulary is {config.vocab_size}, "
            "so this tokenizer is not the model's"
        )


@torch.inference_mode()
def scored_logits(
    target: Transformer, tokens: Tensor, spans: list[Span]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of scored tokens `[R]` of tokens `[n]`, each with its logits `[R, V]` float32.

    In the order of the spans, on the target's device; at most 256 rows a chunk.
    """
    tokens = tokens.to(target.device)
    cache = target.new_cache(1, max(span.end - span.begin for span in spans) - 1)
    for begin, end, first_scored in spans:
        n_fed = end - 1 - begin
        for start in range(0, n_fed, ROWS):
            stop = min(start + ROWS, n_fed)
            slots = torch.arange(start, stop, device=target.device)[None]
            fed = tokens[None, begin + start : begin + stop]
            hidden, _ = target(fed, slots, slots, causal_mask(slots, stop), cache)
            # The row of token t predicts t + 1.
            skip = max(first_scored - 1 - (begin + start), 0)
            if skip < stop - start:
                scored = tokens[begin + start + skip + 1 : begin + stop + 1]
                yield scored, target.logits(hidden[0, skip:]).float()
