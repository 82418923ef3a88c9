"""How does text stream out of tokens? Bytes become whole characters, and stop strings are cut off.

Every token stands for fixed bytes, so text is one incremental UTF-8 decoding of their join: a push
costs O(new tokens), half a character waits, and invalid bytes become U+FFFD only once proven so.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence


class IncrementalDecoder:
    """Text of one growing token sequence: pushes and flush join to the text of the whole."""

    def __init__(self, piece: Callable[[int], bytes], *, drop_spaces: int = 0) -> None:
        """`piece` gives a token's bytes; `drop_spaces` spaces at the very start are not text."""
        self._piece = piece
        self._drop_spaces = drop_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that no later token can change."""
        return self._trim(self._utf8.decode(b"".join(map(self._piece, ids))))

    def flush(self) -> str:
        """End the sequence: what was half a character is now invalid."""
        return self._trim(self._utf8.decode(b"", True))

    def _trim(self, text: str) -> str:
        if not self._drop_spaces or not text:
            return text
        n_dropped = min(len(text) - len(text.lstrip(" ")), self._drop_spaces)
        text = text[n_dropped:]
        self._drop_spaces = 0 if text else self._drop_spaces - n_dropped
        return text


class StopStrings:
    """Cut streamed text just before the stop string that begins first, however the text was split.

    stops ["###"]: push("a#") -> ("a", False); push("##b") -> ("", True).
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(strings)
        if "" in self._strings:
            raise ValueError("a stop string is empty, it would stop before any text; leave it out")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what surely precedes a stop string, and whether one came."""
        if self.stopped:
            return "", True
        text = self._held + text
        found = self._find(text)
        pending = self._pending(text)
        # A string that may still complete wins over a complete one that begins later.
        if found <= pending and found < len(text):
            self._held, self.stopped = "", True
            return text[:found], True
        self._held = text[pending:]
        return text[:pending], False

    def flush(self) -> str:
        """End the text: return what was held back, still cut before a stop string."""
        text, self._held = self._held, ""
        found = self._find(text)
        self.stopped = self.stopped or found < len(text)
        return text[:found]

    def _find(self, text: str) -> int:
        """Where the earliest whole stop string begins; the text's length when there is none."""
        return min((at for s in self._strings if (at := text.find(s)) >= 0), default=len(text))

    def _pending(self, text: str) -> int:
        """Where the longest suffix begins that could grow into a stop string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        starts = range(max(len(text) - longest, 0), len(text))
        return next((at for at in starts if self._may_begin(text[at:])), len(text))

    def _may_begin(self, suffix: str) -> bool:
        return any(len(suffix) < len(s) and s.startswith(suffix) for s in self._strings)
