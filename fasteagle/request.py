"""What did a user ask for, and how far is it? The host's side of decoding.

A Row lives in one batch row of the engine from its prompt to its last token: it cuts the output at
a stop token, a stop string, `max_new_tokens` or the context limit, whichever comes first, exactly.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fasteagle.detokenize import StopStrings
from fasteagle.metrics import Stats
from fasteagle.sample import SamplingParams

if TYPE_CHECKING:  # the engine runs on ids where no tokenizer library is installed
    from fasteagle.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Request:
    """One prompt and its limits. stop_ids end the text and are kept as its last token (not in
    `text`); stop strings end it before they begin, and the token that completes one is the last.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")


def token_ids(
    prompt: str | Sequence[int], *, tokenizer: Tokenizer | None, n_tokens: int
) -> tuple[int, ...]:
    """A prompt as ids below `n_tokens`: text is encoded with BOS, ids are left alone."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty; give some text")
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; give token ids instead")
        prompt = tokenizer.encode(prompt)
    outside = [token for token in prompt if not 0 <= token < n_tokens]
    if outside:
        raise ValueError(f"prompt holds token {outside[0]}; the vocabulary is {n_tokens}")
    return tuple(prompt)


def check_fits(request: Request, *, limit: int, depth: int, window: int | None) -> None:
    """ValueError unless a request can be decoded: `limit` tokens a row, trees `depth` deep."""
    length = len(request.prompt)
    if window and length + request.max_new_tokens > window:
        raise ValueError(
            f"prompt of {length} and {request.max_new_tokens} new tokens exceed the model's "
            f"sliding window of {window}, which is not implemented; ask for less"
        )
    if length >= limit:
        raise ValueError(
            f"prompt has {length} tokens; at most {limit - 1} fit in a context of {limit} "
            "with one new token; shorten it"
        )
    if depth and length + depth + 1 > limit:
        raise ValueError(
            f"prompt of {length} tokens leaves room for {limit - length} of {limit}, less than "
            f"a tree {depth} deep and its bonus; shorten the prompt, guess less far (--tree, "
            "--lookup, --window) or use --draft none"
        )


def context_limit(most: int, max_length: int | None) -> int:
    """Tokens that a sequence may have; ValueError if more are asked for than the model's `most`."""
    if max_length is None:
        return most
    if not 2 <= max_length <= most:
        raise ValueError(f"max_length is {max_length}; this model takes 2 to {most}")
    return max_length


class LengthWarning(UserWarning):
    """A request is longer than what a draft head was trained on."""


def notice_length(request: Request, *, limit: int, trained: int | None) -> None:
    """Warn, once a program, of a request that goes past a head's trained length.

    Its output is as right as ever: RoPE goes on, only fewer guesses may be accepted.
    """
    asked = min(len(request.prompt) + request.max_new_tokens, limit)
    if trained is not None and asked > trained:
        warnings.warn(  # one text and one place, so that Python says it once
            f"the draft head was trained on {trained} tokens and a request may go past them; its "
            "output stays exact, but fewer guesses may be accepted there",
            LengthWarning,
            stacklevel=1,
        )


class Piece(NamedTuple):
    """A bit of streamed text. `drafted` tells an accepted draft from a token the target added."""

    text: str
    drafted: bool
    result: Generation | None = None  # set on the last piece


@dataclass(frozen=True)
class Generation:
    """What came out: new token ids, their text (if there is a tokenizer), why it ended, how fast.

    reason is "stop" (stop token or stop string) or "length" (max_new_tokens or the context limit).
    """

    tokens: list[int]
    text: str
    reason: str
    stats: Stats


class Row:
    """A request from when it is handed in to its end; its clock runs while it waits for a seat."""

    def __init__(
        self,
        request: Request,
        limit: int,
        tokenizer: Tokenizer | None,
        depth: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.request, self.clock = request, clock
        self.room = min(request.max_new_tokens, limit - len(request.prompt))
        self.tokens: list[int] = []
        self.pieces: list[Piece] = []  # of the latest step
        self.text = ""
        self.reason = ""
        self.stats = Stats(prompt_tokens=len(request.prompt), max_depth=depth)
        self.started = clock()
        self.stops = StopStrings(list(request.stop)) if request.stop else None
        self.decoder = tokenizer.decoder(list(request.prompt)) if tokenizer else None
        if self.stops and not self.decoder:
            raise ValueError("stop strings need a tokenizer; give stop_ids instead")

    @property
    def done(self) -> bool:
        return bool(self.reason)

    @property
    def length(self) -> int:
        """Tokens in the caches: all but the newest, which is the next tree's root."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def take(self, emitted: list[int], *, drafted: int) -> None:
        """Add a round's tokens until one ends the request; the first `drafted` were guesses."""
        self.pieces = []
        for index, token in enumerate(emitted):
            self._add(token, drafted=index < drafted)
            if self.done:
                break
        self.stats.new_tokens = len(self.tokens)
        self.stats.seconds = self.clock() - self.started
        self.stats.ttft = self.stats.ttft or self.stats.seconds

    def _add(self, token: int, *, drafted: bool) -> None:
        self.tokens.append(token)
        stopped = token in self.request.stop_ids
        if stopped:
            self.reason = "stop"
        elif len(self.tokens) >= self.room:
            self.reason = "length"
        if self.decoder:
            self._emit("" if stopped else self.decoder.push([token]), drafted=drafted)

    def _emit(self, text: str, *, drafted: bool) -> None:
        """Pass text on, holding back what may begin a stop string; flush when the request ends."""
        assert self.decoder is not None, "text without a decoder"
        if self.done:
            text += self.decoder.flush()
        if self.stops:
            text, _ = self.stops.push(text)
            # The last tokens may complete a stop string that an earlier one was waiting for.
            text += self.stops.flush() if self.done else ""
            self.reason = "stop" if self.stops.stopped else self.reason
        self.text += text
        if text or self.done:
            self.pieces.append(Piece(text, drafted, self.result() if self.done else None))

    def result(self) -> Generation:
        return Generation(self.tokens, self.text, self.reason, self.stats)
