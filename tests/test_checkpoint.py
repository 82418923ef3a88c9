"""Is a checkpoint read whole and strictly, from every layout?"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import (
    HEAD,
    LAYOUTS,
    TARGET,
    C,
    V,
    assert_equal,
    fused_target,
    head_tensors,
    target_tensors,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasteagle.checkpoint import (
    convert,
    load_head,
    load_target,
    read_head,
    read_target,
    weight_bytes,
)
from fasteagle.config import DraftConfig


def test_a_loaded_model_holds_the_weights_of_either_folder(tmp_path: Path) -> None:
    tensors = target_tensors()
    folder = write(tmp_path / "hf", TARGET, tensors)
    direct = load_target(folder)
    converted = load_target(convert(folder, tmp_path / "ours"))
    assert_equal(direct.state_dict(), fused_target(tensors))
    assert_equal(converted.state_dict(), direct.state_dict())
    assert converted.config == direct.config
    assert not any(p.requires_grad or p.is_meta for p in converted.parameters())


def test_a_weight_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    _, tensors = read_target(folder / "other.safetensors")
    assert_equal(dict(tensors), fused_target(target_tensors()))


def test_dtype_is_the_configs_unless_told_or_unstated(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TARGET | {"torch_dtype": "float16"}, target_tensors())
    assert read_target(folder)[0].dtype == "float16"
    assert read_target(folder, dtype=torch.bfloat16)[0].dtype == "bfloat16"
    out = convert(folder, tmp_path / "ours", dtype=torch.bfloat16)
    config, tensors = read_target(out)
    assert config.dtype == "bfloat16"
    assert {tensor.dtype for _, tensor in tensors} == {torch.bfloat16}
    silent = {key: value for key, value in TARGET.items() if key != "torch_dtype"}
    halves = {name: tensor.half() for name, tensor in target_tensors().items()}
    assert read_target(write(tmp_path / "b", silent, halves))[0].dtype == "float16"


def test_end_ids_of_generation_config_come_first_and_survive(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert read_target(folder)[0].eos_ids == (9, 2)
    assert read_target(convert(folder, tmp_path / "ours"))[0].eos_ids == (9, 2)


def test_rotary_buffers_and_a_tied_copy_of_lm_head_are_dropped(tmp_path: Path) -> None:
    tensors = target_tensors(tied=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    folder = write(tmp_path / "a", TARGET | {"tie_word_embeddings": True}, tensors | extra)
    assert_equal(dict(read_target(folder)[1]), fused_target(tensors))
    extra["lm_head.weight"] += 1
    folder = write(tmp_path / "b", TARGET | {"tie_word_embeddings": True}, tensors | extra)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_target(folder)


def test_weight_bytes_come_from_headers_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    sizes = weight_bytes(folder)
    held = sum(tensor.nbytes for tensor in target_tensors().values())
    assert sizes["total"] == held
    assert sizes["embed_tokens"] == sizes["lm_head"] == V * C * 4
    assert weight_bytes(folder, dtype=torch.float16)["total"] == held // 2


# ---- a head and its target


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write(tmp_path / "target", TARGET, target_tensors())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_head_keeps_an_embedding_only_if_it_differs(
    tmp_path: Path, target: Path, shift: float
) -> None:
    embedding = target_tensors()["model.embed_tokens.weight"] + shift
    tensors = head_tensors() | {"embed_tokens.weight": embedding}
    folder = write(tmp_path / "head", HEAD | {"torch_dtype": "float16"}, tensors)
    model = load_target(target)
    head = load_head(folder, model)
    assert head.config.own_embedding == bool(shift)
    assert ("embed_tokens.weight" in head.state_dict()) == bool(shift)
    assert head.fc.weight.dtype == model.dtype == torch.float32


@pytest.mark.parametrize("change", [{"vocab_size": 99}, {"hidden_size": 8}])
def test_a_head_of_another_model_is_refused(
    tmp_path: Path, target: Path, change: dict[str, int]
) -> None:
    folder = write(tmp_path / "head", HEAD, head_tensors())
    model = load_target(target)
    config = {"vocab_size": "vocab_size", "hidden_size": "dim"}
    model.config = replace(model.config, **{config[k]: v for k, v in change.items()})
    with pytest.raises(
        ValueError, match=f"dim {C} and vocabulary {V}.* {next(iter(change.values()))}"
    ):
        load_head(folder, model)


def test_a_head_is_not_taken_for_a_target_nor_a_target_for_a_head(
    tmp_path: Path, target: Path
) -> None:
    head = write(tmp_path / "head", HEAD, head_tensors())
    with pytest.raises(ValueError, match="is an EAGLE-1 head"):
        read_target(head)
    with pytest.raises(ValueError, match="is a target model"):
        read_head(target)
    with pytest.raises(ValueError, match="another --out"):
        convert(head, convert(target))


def test_a_head_with_fewer_kv_heads_than_its_target_keeps_them(tmp_path: Path) -> None:
    tensors = head_tensors()
    for name in ("k", "v"):
        tensors[f"layers.0.self_attn.{name}_proj.weight"] = torch.zeros(4, C)
    folder = write(tmp_path / "head", HEAD | {"num_key_value_heads": 1}, tensors)
    config = read_head(folder)[0]
    assert isinstance(config, DraftConfig)
    assert config.n_kv_heads == 1


# ---- strictness


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": torch.ones(1)}, "unknown extra.weight"),
        ({"model.layers.7.mlp.up_proj.weight": torch.ones(1)}, r"unknown model\.layers\.7"),
        ({"model.norm.weight": None}, "missing model.norm.weight"),
        ({"lm_head.weight": None, "b": torch.ones(1)}, "missing lm_head.weight; unknown b"),
        ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight has shape \[3\].*\[16\]"),
        ({"model.norm.weight": torch.ones(C, dtype=torch.int8)}, "model.norm.weight is int8"),
        ({"model.norm.weight": torch.full((C,), torch.nan)}, "model.norm.weight holds NaN"),
        ({"lm_head.weight": torch.full((V, C), -torch.inf)}, "lm_head.weight holds NaN or inf"),
    ],
)
@pytest.mark.parametrize("layout", ["shards.safetensors", "one.bin"])
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, layout: str, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {**target_tensors(), **change}
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    folder = write(tmp_path / "hf", TARGET, held, layout)
    with pytest.raises(ValueError, match=message):
        load_target(folder)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_overflow_of_a_narrower_dtype_is_told_from_bad_weights(tmp_path: Path) -> None:
    tensors = target_tensors() | {"model.norm.weight": torch.full((C,), 1e5)}
    folder = write(tmp_path / "hf", TARGET, tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight overflows float16"):
        load_target(folder, dtype=torch.float16)
    assert load_target(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_short_is_named(tmp_path: Path, layout: str, keep: float) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors(), layout)
    file = max(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{file.name} is cut short"):
        load_target(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors(), "shards.bin")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names pytorch_model-00002-of-00003"):
        load_target(folder)


def test_a_tensor_held_twice_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors(), "shards.safetensors")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match="twice, in model-00001-of-00003"):
        load_target(folder)


class Intruder:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("held", [Intruder(), {"a": Intruder()}, [torch.ones(1)], {"a": 1}])
def test_a_bin_file_that_holds_more_than_tensors_is_refused(tmp_path: Path, held: object) -> None:
    folder = write(tmp_path / "hf", TARGET, {})
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="tensors"):
        load_target(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "expected a JSON object"),
        ("config.json", json.dumps(TARGET | {"hidden_size": None}), "hidden_size is missing"),
        ("config.json", json.dumps(TARGET | {"architectures": ["Bert"]}), "Bert is not supported"),
        ("config.json", json.dumps({"format": "fasteagle", "version": 9}), "version 9"),
        ("model.safetensors", None, "has no weights; expected one of model.safetensors"),
    ],
)
def test_a_folder_that_is_not_a_checkpoint_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_target(folder)
