"""What do the files beside a tokenizer say? Special tokens, BOS, chat templates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
AGAIN = "download the checkpoint's tokenizer again"


@dataclass(frozen=True)
class TokenizerSettings:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and the chat templates."""

    named: dict[str, str | None]  # bos_token -> "<s>"; None is a stated absence
    added: dict[int, AddedToken]
    special: frozenset[str]  # every token that is not text
    chat_templates: dict[str, str]  # name -> Jinja source; the main one is "default"
    add_bos: bool | None
    add_prefix_space: bool
    legacy: bool  # sentencepiece writes its leading space after every special token, not just first
    llama: bool  # of a class that adds BOS unless told otherwise


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer that `load_tokenizer` would read."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def find_tokenizer_file(folder: Path) -> Path:
    """The folder's tokenizer.json, else its tokenizer.model."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a checkpoint folder")
    found = sorted(path.name for path in folder.iterdir())
    listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    raise FileNotFoundError(
        f"{folder} has neither {' nor '.join(TOKENIZER_FILES)}, only {listing or 'nothing'}; "
        "copy the target's tokenizer there"
    )


def read_settings(folder: Path) -> TokenizerSettings:
    """Read whatever settings the folder has; every file is optional."""
    config = read_json(folder / "tokenizer_config.json", optional=True)
    mapped = read_json(folder / "special_tokens_map.json", optional=True)
    try:
        return _understand(folder, config, {**mapped, **config})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the settings beside the tokenizer in {folder} are not Hugging Face's: "
            f"{type(error).__name__} {error}; {AGAIN}"
        ) from error


def _understand(folder: Path, config: dict[str, Any], stated: dict[str, Any]) -> TokenizerSettings:
    named = {name: next(iter(_contents(stated[name])), None) for name in NAMED if name in stated}
    special = {content for content in named.values() if content}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        special.update(_contents(stated.get(name)))
    added = _read_added(folder, config.get("added_tokens_decoder") or {}, special)
    special.update(token.content for token in added.values() if token.special)
    return TokenizerSettings(
        named=named,
        added=added,
        special=frozenset(special),
        chat_templates=_read_chat_templates(folder, config.get("chat_template")),
        add_bos=config.get("add_bos_token"),
        add_prefix_space=config.get("add_prefix_space") is not False,
        legacy=config.get("legacy") is not False,
        llama=str(config.get("tokenizer_class")).startswith(("Llama", "CodeLlama")),
    )


def read_content(path: Path) -> bytes:
    """The file's bytes; a stand-in for the real file is refused."""
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty; {AGAIN}")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file; run `git lfs pull` for it")
    if content.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not a tokenizer; {AGAIN}")
    return content


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the file; empty for an optional file that is not there."""
    if optional and not path.is_file():
        return {}
    try:
        values = json.loads(read_content(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object; {AGAIN}")  # noqa: TRY004
    return values


def _read_added(
    folder: Path, decoder: dict[str, dict[str, Any]], special: set[str]
) -> dict[int, AddedToken]:
    older = read_json(folder / "added_tokens.json", optional=True)
    added = {
        token: AddedToken(content, normalized=False, special=content in special)
        for content, token in older.items()
    }
    if not all(type(token) is int for token in added):
        raise TypeError(f"added_tokens.json gives ids {str(list(added))[:40]}, not whole numbers")
    for token, entry in decoder.items():
        flags = {flag: bool(entry[flag]) for flag in FLAGS if flag in entry}
        flags["special"] = flags.get("special", False) or entry["content"] in special
        if not token.isdecimal():
            raise KeyError(f"token id {token}")
        added[int(token)] = AddedToken(entry["content"], **flags)
    return {token: entry for token, entry in added.items() if entry.content}


def _contents(entry: Any) -> list[str]:
    """Token texts of "<s>", {"content": "<s>"}, a list of those, {"name": "<s>"} or null."""
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, dict):
        return _contents([entry["content"]] if "content" in entry else list(entry.values()))
    return [content for one in entry or [] for content in _contents(one)]


def _read_chat_templates(folder: Path, stated: Any) -> dict[str, str]:
    templates: dict[str, str] = {}
    if isinstance(stated, str):
        templates["default"] = stated
    elif isinstance(stated, list):
        templates.update({entry["name"]: entry["template"] for entry in stated})
    main = folder / "chat_template.jinja"
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if main.is_file():
        templates["default"] = main.read_text(encoding="utf-8")
    return templates
