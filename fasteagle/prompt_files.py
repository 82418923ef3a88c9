"""What text or prompts does a file hold? Prompts are one a line, or a .jsonl of questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def text_file(
    name: str | Path, *, flag: str, wanted: str = "a text file", newline: str | None = None
) -> Iterator[TextIO]:
    """A UTF-8 file to read; flag is what errors call it, newline is `open`'s.

    FileNotFoundError or ValueError where there is none, or one of another kind.
    """
    path = Path(name)
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{flag} {name} {problem}; give {wanted}")
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {name} is not UTF-8 text ({error.reason})") from error


def read_prompts(name: str | Path, *, flag: str = "--batch") -> list[str]:
    """The prompts of a file: one a line; in a .jsonl file one object a line.

    An object holds "prompt", or "turns", whose first one counts (MT-bench's layout). Blank lines
    are skipped. flag is the option that errors name.
    """
    with text_file(name, flag=flag, wanted="a file of prompts") as file:
        # Not splitlines: it also cuts at characters that a prompt may hold, such as a form feed.
        lines = file.read().split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{flag} {name} is empty; give one prompt a line")
    if Path(name).suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_json_prompt(line, f"{flag} {name}, line {number}") for number, line in numbered]


def _json_prompt(line: str, place: str) -> str:
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    held = value if isinstance(value, dict) else {}
    turns = held.get("turns")
    prompt = held.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{place}: expected {{"prompt": "text"}} or {{"turns": ["text"]}}')
    return prompt
