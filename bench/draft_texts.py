"""Which kinds of text do drafters meet? Windows of 64 tokens for the embedded base.

code      a third of the way into modules of the standard library
prose     the beginning of their longest docstrings
repeated  code that begins again after 40 tokens, as an edit or a quotation does
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.demo_pair import MODULES, PROMPT_TOKENS, windows
from bench.environment import refuse
from fasteagle.engine import Engine

AGAIN = 40  # tokens after which a repeated window begins again


def code(engine: Engine, count: int) -> list[list[int]]:
    return windows(engine.tokenizer, count)


def prose(engine: Engine, count: int) -> list[list[int]]:
    assert engine.tokenizer is not None, "the embedded pair has a tokenizer"
    prompts = []
    for name in MODULES[:count]:
        bos, *tokens = engine.tokenizer.encode(longest_docstring(name))
        prompts.append([bos, *tokens[: PROMPT_TOKENS - 1]])
    return prompts


def repeated(engine: Engine, count: int) -> list[list[int]]:
    found = []
    for bos, *tokens in windows(engine.tokenizer, count):
        once = tokens[:AGAIN]
        found.append([bos, *once, *once[: PROMPT_TOKENS - 1 - AGAIN]])
    return found


def longest_docstring(module: str) -> str:
    """With its quotes, from a module's source."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no source of {module} in this Python; use a full installation")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return f'"""{max(texts, key=len)}\n"""\n'


TEXTS: dict[str, Callable[[Engine, int], list[list[int]]]] = {
    "code": code,
    "prose": prose,
    "repeated": repeated,
}


def texts(engine: Engine, count: int, kinds: Sequence[str]) -> dict[str, list[list[int]]]:
    """`count` prompts of each kind; as many as there are modules at most."""
    if count > len(MODULES):
        refuse(f"--prompts {count}; there are {len(MODULES)} of each kind of text")
    return {kind: TEXTS[kind](engine, count) for kind in kinds}
