"""Are the settings files beside a tokenizer obeyed, and does a wrong file say what is wrong?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import DEMO

from fasteagle.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def configured(tmp_path: Path, folders: dict[str, Path]) -> Callable[..., Tokenizer]:
    """The tokenizer of `kind` with the tokenizer_config.json given."""

    def build(kind: str, **config: Any) -> Tokenizer:
        folder = folders[kind]
        for name in ("tokenizer.model", "tokenizer.json"):
            if (folder / name).is_file():
                (tmp_path / name).write_bytes((folder / name).read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return build


@pytest.mark.parametrize("kind", ["demo", "byte_level"])
def test_add_bos_token_decides(configured: Callable[..., Tokenizer], kind: str) -> None:
    silent = configured(kind, add_bos_token=False)
    assert silent.encode("a") == silent.encode("a", bos=False)
    assert configured(kind, add_bos_token=True).encode("a")[0] == silent.bos_id


@pytest.mark.parametrize(("kind", "opens"), [("LlamaTokenizer", True), ("GPT2Tokenizer", False)])
def test_llama_classes_add_bos_unasked(
    tmp_path: Path, folders: dict[str, Path], kind: str, opens: bool
) -> None:
    content = json.loads((folders["llama_json"] / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": kind, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (load_tokenizer(tmp_path).encode("the")[0] == 1) == opens


@pytest.mark.parametrize("kind", ["prefixed", "llama_json"])
def test_added_tokens_have_their_ids(configured: Callable[..., Tokenizer], kind: str) -> None:
    added = {
        "310": {"content": "<pad>", "special": True},
        "311": {"content": "<tool>", "special": False, "rstrip": True, "normalized": False},
    }
    tokenizer = configured(kind, added_tokens_decoder=added)
    assert tokenizer.vocab_size == 312
    the = tokenizer.encode("the", bos=False)
    assert tokenizer.encode("<pad><tool>  the", bos=False, special=True) == [310, 311, *the]
    assert tokenizer.encode("<tool>the", bos=False) == [311, *the]
    assert tokenizer.decode([310, 311]) == "<tool>"


def test_leading_space_after_special_tokens_is_legacy(
    configured: Callable[..., Tokenizer],
) -> None:
    old = configured("prefixed").encode("</s>the", special=True)
    new = configured("prefixed", legacy=False).encode("</s>the", special=True)
    pieces = configured("prefixed")
    assert pieces.decoder([5]).push(old) == " the"
    assert pieces.decoder([5]).push(new) == "the"


# Wrong files


def test_missing_tokenizer_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json nor tokenizer\.model.*config"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n<!DOCTYPE html><html></html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "plain words",
        "[1]",
        "\x00\x01\x02\x03" * 20,
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    if name == "tokenizer_config.json":
        (tmp_path / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "Novel"}},
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    ],
)
def test_unknown_tokenizer_json_is_refused(
    tmp_path: Path, folders: dict[str, Path], change: dict[str, Any]
) -> None:
    content = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_two_checkpoints_are_refused(configured: Callable[..., Tokenizer]) -> None:
    with pytest.raises(ValueError, match="one checkpoint"):
        configured("byte_level", added_tokens_decoder={"7": {"content": "<|bos|>"}})


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"1": {}}},
        {"added_tokens_decoder": {"one": {"content": "<s>"}}},
        {"bos_token": 1},
        {"chat_template": [{"name": "a"}]},
    ],
)
def test_unreadable_settings_are_refused(
    configured: Callable[..., Tokenizer], config: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="the settings beside"):
        configured("demo", **config)
