"""Where do prompts come from, and how do they become token ids? A flag, stdin, or a file
(prompt_files.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
