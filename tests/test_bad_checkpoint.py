"""Is a broken checkpoint one clear line on stderr and status 2, with nothing written?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, Refused
from hf_folders import HEAD, TARGET, head_tensors, target_tensors, write

from fasteagle import demo, weights
from fasteagle.weights import Weights

GOLDEN_HEAD = str(GOLDEN / "byte_pair" / "eagle1")


@pytest.fixture
def trace_flags(tmp_path: Path) -> list[str]:
    """What `trace` needs besides a model."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[1, 3, 5]]")
    out = tmp_path / "trace.json"
    return ["--prompt_ids", str(prompts), "--max_new_tokens", "4", "--out", str(out)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncated_safetensors(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors())
    cut(base / "model.safetensors")
    return base


def truncated_bin(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors(), "one.bin")
    cut(base / "pytorch_model.bin")
    return base


def wrong_shape(folder: Path) -> Path:
    return write(folder, TARGET, target_tensors() | {"model.norm.weight": torch.ones(3)})


def missing_tensor(folder: Path) -> Path:
    tensors = target_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return write(folder, TARGET, tensors)


def unknown_tensor(folder: Path) -> Path:
    return write(folder, TARGET, target_tensors() | {"model.adapter.weight": torch.ones(3)})


def not_a_number(folder: Path) -> Path:
    tensors = target_tensors()
    tensors["model.norm.weight"][2] = torch.nan
    return write(folder, TARGET, tensors)


def field_missing(folder: Path) -> Path:
    config = {name: value for name, value in TARGET.items() if name != "hidden_size"}
    return write(folder, config, target_tensors())


def unknown_architecture(folder: Path) -> Path:
    return write(folder, TARGET | {"architectures": ["GPT2LMHeadModel"]}, target_tensors())


def no_config(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors())
    (base / "config.json").unlink()
    return base


def broken_config(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors())
    (base / "config.json").write_text("{")
    return base


def a_head(folder: Path) -> Path:
    return write(folder, HEAD, head_tensors())


def nowhere(folder: Path) -> Path:
    return folder / "nowhere"


BROKEN: list[tuple[Callable[[Path], Path], str]] = [
    (nowhere, "does not exist"),
    (truncated_safetensors, "cut short"),
    (truncated_bin, "cut short"),
    (wrong_shape, "model.norm.weight has shape [3]; config.json asks for [16]"),
    (missing_tensor, "missing model.layers.1.mlp.up_proj.weight"),
    (unknown_tensor, "unknown model.adapter.weight"),
    (not_a_number, "model.norm.weight holds NaN or infinity"),
    (field_missing, "hidden_size"),
    (unknown_architecture, "GPT2LMHeadModel"),
    (no_config, "no config.json"),
    (broken_config, "not valid JSON"),
    (a_head, "EAGLE-1 head"),
]


@pytest.mark.parametrize(("make", "words"), BROKEN, ids=[make.__name__ for make, _ in BROKEN])
def test_a_broken_checkpoint(
    tmp_path: Path,
    refused: Refused,
    trace_flags: list[str],
    make: Callable[[Path], Path],
    words: str,
) -> None:
    base = make(tmp_path / "base")
    refused("trace", "--checkpoint_path", base, *trace_flags, words=words)
    if make is not not_a_number:  # doctor reads headers only
        refused("doctor", "--checkpoint_path", base, words=words)


@pytest.mark.parametrize("command", ["trace", "doctor"])
def test_the_head_of_another_model(refused: Refused, trace_flags: list[str], command: str) -> None:
    flags = trace_flags if command == "trace" else []
    words = "head for a model of dim 96 and vocabulary 260"
    refused(command, "--draft_checkpoint_path", GOLDEN_HEAD, *flags, words=words)


def test_a_model_given_where_a_head_must_be(refused: Refused, trace_flags: list[str]) -> None:
    # Without --draft eagle it would be a draft model.
    flags = ("--draft", "eagle", "--draft_checkpoint_path", demo.BASE, *trace_flags)
    refused("trace", *flags, words="is a target model; expected an EAGLE head")


def test_a_wrong_tokenizer_file(tmp_path: Path, refused: Refused) -> None:
    base = tmp_path / "base"
    shutil.copytree(demo.BASE, base)
    (base / "tokenizer.model").write_bytes(b"no tokenizer")
    refused("generate", "--checkpoint_path", base, words="tokenizer.model")


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, refused: Refused) -> None:
    base = write(tmp_path / "base", TARGET, target_tensors())
    refused("generate", "--checkpoint_path", base, words="has no tokenizer")
    refused("chat", "--checkpoint_path", base, words="has no tokenizer")


def test_a_file_larger_than_memory_is_known_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("unable to mmap: Cannot allocate memory")

    wanted = Weights(demo.BASE).entries
    monkeypatch.setattr(weights, "safe_open", refuse)
    opened = Weights(demo.BASE)
    assert opened.entries == wanted
    with pytest.raises(ValueError, match=r"cannot be mapped .* split it into shards"):
        opened.read(next(iter(wanted)))
    content = (demo.BASE / "model.safetensors").read_bytes()
    for cut, words in ((len(content) - 1, "cut short"), (100, "not a safetensors"), (0, "not a")):
        (tmp_path / "model.safetensors").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=words):
            Weights(tmp_path)
