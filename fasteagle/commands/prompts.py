"""Where do prompts come from, and how do they become token ids? A flag, stdin, or a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasteagle.chat import ChatTemplate
from fasteagle.engine import Engine

STDIN = "-"


def read_prompt(text: str) -> str:
    """The text itself, or all of stdin (without its last newline) for "-"."""
    prompt = sys.stdin.read().removesuffix("\n") if text == STDIN else text
    if not prompt:
        raise ValueError("the prompt is empty; give some text")
    return prompt


def read_prompts(name: str, flag: str = "--batch") -> list[str]:
    """The prompts of a file: one a line; in a .jsonl file one object a line.

    An object holds "prompt", or "turns", whose first one counts (MT-bench's layout). Blank lines
    are skipped. `flag` is what errors call the file.
    """
    path = Path(name)
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{flag} {name} {problem}; give a file of prompts")
    try:
        # Not splitlines: it also cuts at characters that a prompt may hold, such as a form feed.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {name} is not UTF-8 text ({error.reason})") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{flag} {name} is empty; give one prompt a line")
    if path.suffix != ".jsonl":
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


def typed_lines(mark: str) -> Iterator[str]:
    """The lines that a user types until the end of input, those that are not blank.

    `mark` asks for one on a terminal.
    """
    while True:
        if sys.stdin.isatty():
            print(mark, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def check_prompts(engine: Engine, prompts: list[list[int]], **limits: Any) -> None:
    """ValueError if one of the prompts cannot be decoded, before the first one is."""
    for number, prompt in enumerate(prompts, 1):
        try:
            engine.rows([engine.request(prompt, **limits)])
        except ValueError as error:
            place = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise ValueError(f"{place}{error}") from error


def encode(engine: Engine, text: str, template: ChatTemplate | None) -> list[int]:
    """Token ids of a prompt: plain text after BOS, or one user message in a chat format."""
    assert engine.tokenizer is not None, "load_engine asks for a tokenizer"
    if template is None:
        return engine.tokenizer.encode(text)
    return engine.tokenizer.encode_chat([{"role": "user", "content": text}], template)
