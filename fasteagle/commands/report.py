"""What do commands print besides the answer, and how do they write files?

The answer goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from fasteagle.metrics import Stats
from fasteagle.safewrite import replacing

GREEN, DIM, BOLD, RESET = "\033[32m", "\033[2m", "\033[1m", "\033[0m"


def note(text: str, *, end: str = "\n") -> None:
    """Tell the user something on stderr."""
    print(text, end=end, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Put a piece of the answer on stdout at once."""
    print(text, end="", flush=True)


def has_colour(stream: TextIO) -> bool:
    """Whether colours help on this stream: a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour, where the stream shows colours."""
    return f"{colour}{text}{RESET}" if text and has_colour(stream) else text


def timing(index: int, seconds: float, stats: Stats) -> str:
    """gpt-fast's line about one inference, with what a draft changes."""
    rate = stats.new_tokens / seconds if seconds else 0.0
    return (
        f"Time for inference {index}: {seconds:.2f} sec total, {rate:.2f} tokens/sec "
        f"({stats.new_tokens} tokens, {stats.rounds} rounds, accept_length "
        f"{stats.accept_length:.2f}, ttft {stats.ttft:.3f} sec)"
    )


@contextmanager
def output_file(name: str, flag: str) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is whole; unwritable ones are an error at once."""
    path = Path(name).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{flag} {name} is not a regular file; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{flag} {name}: {path.parent} is no folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{flag} {name}: {path.parent} is not writable; give another folder")
    with replacing(path) as file:
        yield file


def write_json(file: BinaryIO, value: Any) -> None:
    """One JSON value, compact, with a newline."""
    file.write((json.dumps(value, separators=(",", ":")) + "\n").encode())
