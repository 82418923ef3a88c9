"""Which whole numbers may an argument be? Types for argparse; the benches use them too."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, least=1, words="above 0")


def natural(text: str) -> int:
    """A whole number, 0 included."""
    return _whole(text, least=0, words="of 0 or more")


def _whole(text: str, *, least: int, words: str) -> int:
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number {words}, below 10^9")
    return int(text)
