"""Is a checkpoint read whole and strictly from every layout, and converted all or not at all?"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasteagle import hub
from fasteagle.checkpoint import (
    convert,
    load_head,
    load_target,
    read_head,
    read_target,
    weight_bytes,
)
from fasteagle.commands import convert as command
from fasteagle.commands import run
from fasteagle.config import DraftConfig

ROOT = Path(__file__).parents[1]
C, V, L, Q, KV, INNER = 16, 24, 3, 16, 8, 20
TARGET: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": C,
    "intermediate_size": INNER,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
HEAD = TARGET | {"num_hidden_layers": 1, "bias": True}
LAYOUTS = ("one.safetensors", "shards.safetensors", "one.bin", "shards.bin", "legacy.bin")
Tensors = dict[str, Tensor]


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}self_attn.q_proj.weight": (Q, C),
        f"{prefix}self_attn.k_proj.weight": (KV, C),
        f"{prefix}self_attn.v_proj.weight": (KV, C),
        f"{prefix}self_attn.o_proj.weight": (C, Q),
        f"{prefix}mlp.gate_proj.weight": (INNER, C),
        f"{prefix}mlp.up_proj.weight": (INNER, C),
        f"{prefix}mlp.down_proj.weight": (C, INNER),
        f"{prefix}post_attention_layernorm.weight": (C,),
    }


def target_tensors(*, tied: bool = False) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
    for index in range(L):
        shapes |= layer_shapes(f"model.layers.{index}.")
        shapes[f"model.layers.{index}.input_layernorm.weight"] = (C,)
    shapes["model.norm.weight"] = (C,)
    return random_tensors(shapes if tied else shapes | {"lm_head.weight": (V, C)})


def head_tensors() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (C, 2 * C), "fc.bias": (C,)}
    return random_tensors(shapes | layer_shapes("layers.0."), seed=1)


def fused(tensors: Tensors, layers: list[str], prefix: str = "") -> Tensors:
    """The slow twin: our parameters, by plain concatenation."""
    ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for layer in layers:
        parts = [ours.pop(f"{layer}self_attn.{n}_proj.weight") for n in "qkv"]
        ours[f"{layer}self_attn.qkv_proj.weight"] = torch.cat(parts)
        parts = [ours.pop(f"{layer}mlp.{n}_proj.weight") for n in ("gate", "up")]
        ours[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(parts)
    return ours


def fused_target(tensors: Tensors) -> Tensors:
    return fused(tensors, [f"layers.{index}." for index in range(L)], prefix="model.")


def write(folder: Path, config: dict[str, Any], tensors: Tensors, layout: str = LAYOUTS[0]) -> Path:
    """Write a Hugging Face folder in one of LAYOUTS; shards split every layer somewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, suffix = layout.split(".")
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def save(part: Tensors, name: str) -> None:
        if suffix == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            zipped = kind != "legacy"
            torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)

    if kind != "shards":
        save(tensors, f"{stem}.{suffix}")
        return folder
    names = list(tensors)
    shards = [f"{stem}-{index + 1:05}-of-00003.{suffix}" for index in range(3)]
    weight_map = {name: shards[index % 3] for index, name in enumerate(names)}
    for shard in shards:
        save({name: tensors[name] for name in names if weight_map[name] == shard}, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- reading and converting


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts_to_what_is_read_directly(
    tmp_path: Path, layout: str, tied: bool
) -> None:
    tensors = target_tensors(tied=tied)
    folder = write(tmp_path / "hf", TARGET | {"tie_word_embeddings": tied}, tensors, layout)
    wanted = fused_target(tensors)
    config, direct = read_target(folder)
    assert_equal(dict(direct), wanted)
    out = convert(folder, tmp_path / "ours")
    assert_equal(load_file(out / "model.safetensors"), wanted)
    again, converted = read_target(out)
    assert again == config
    assert_equal(dict(converted), wanted)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_converts_to_what_is_read_directly(tmp_path: Path, layout: str, prefix: str) -> None:
    tensors = head_tensors()
    held = {prefix + name: tensor for name, tensor in tensors.items()}
    folder = write(tmp_path / "hf", HEAD, held, layout)
    out = convert(folder, tmp_path / "ours")
    assert json.loads((out / "config.json").read_text())["kind"] == "eagle"
    for source in (folder, out):
        config, read = read_head(source)
        assert_equal(dict(read), fused(tensors, ["layers.0."]))
        assert config.fc_bias


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


def test_tokenizer_files_are_copied_and_others_are_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    for name in ("tokenizer.model", "chat_template.jinja", "notes.txt"):
        (folder / name).write_text(name)
    out = convert(folder)
    assert out == tmp_path / "hf-fasteagle"
    held = {file.name for file in out.iterdir()}
    assert held == {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"}


def test_converting_again_replaces_the_earlier_conversion(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    out = convert(folder)
    (out / "notes.txt").write_text("mine")
    assert convert(folder, dtype=torch.float16) == out
    assert read_target(out)[0].dtype == "float16"
    assert (out / "notes.txt").read_text() == "mine"


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
    with pytest.raises(ValueError, match="is an EAGLE head"):
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
    with pytest.raises(ValueError, match="model.norm.weight overflows float16"):
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
    with pytest.raises(ValueError, match="twice, in model-00001-of-00003.safetensors"):
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


# ---- failures while converting


class FullDisk(io.FileIO):
    room = 2000

    def write(self, block: Any) -> int:
        if self.tell() + len(block) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    folder, out = write(tmp_path / "hf", TARGET, target_tensors()), tmp_path / "new" / "ours"
    if existing:
        convert(folder, out)
    before = everything(tmp_path)
    opened = Path.open

    def open_full(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        return FullDisk(path, "w") if "w" in mode else opened(path, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(OSError, match="No space left") as raised:
            convert(folder, out, dtype=torch.float16)
    assert raised.value.errno == errno.ENOSPC
    assert everything(tmp_path) == before
    assert (tmp_path / "new").exists() == existing


def test_what_fasteagle_did_not_write_is_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_text("precious")
    before = everything(tmp_path)
    for out in (folder, tmp_path / "other"):
        with pytest.raises(ValueError, match="already holds"):
            convert(folder, out)
    with pytest.raises(OSError, match="cannot write"):
        convert(folder, folder / "config.json" / "ours")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_converting_takes_the_memory_of_a_shard_not_of_the_model(
    tmp_path: Path, layout: str
) -> None:
    n_shards, dim, inner = 8, 512, 4608
    config = TARGET | {"hidden_size": dim, "intermediate_size": inner, "vocab_size": 64}
    config |= {"num_hidden_layers": n_shards, "num_key_value_heads": 4, "torch_dtype": "float16"}
    rows = {
        "mlp.gate_proj": (inner, dim),
        "mlp.up_proj": (inner, dim),
        "mlp.down_proj": (dim, inner),
    }
    rows |= {f"self_attn.{name}_proj": (dim, dim) for name in "qkvo"}
    shared = {"model.embed_tokens.weight": (64, dim), "lm_head.weight": (64, dim)}
    shared |= {"model.norm.weight": (dim,)}
    weight_map = {}
    for index in range(n_shards):
        prefix = f"model.layers.{index}."
        shapes = {f"{prefix}{name}.weight": shape for name, shape in rows.items()}
        for norm in ("input", "post_attention"):
            shapes[f"{prefix}{norm}_layernorm.weight"] = (dim,)
        shapes |= shared if index == 0 else {}
        shard = {n: torch.zeros(shape, dtype=torch.float16) for n, shape in shapes.items()}
        name = f"part-{index}.{layout}"
        save = save_file if layout == "safetensors" else torch.save
        save(shard, tmp_path / name)
        weight_map |= dict.fromkeys(shapes, name)
    index_name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[layout]
    (tmp_path / f"{index_name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    shard_bytes = (tmp_path / f"part-1.{layout}").stat().st_size
    small = write(tmp_path / "small", TARGET, target_tensors(), f"one.{layout}")
    grown = peak_growth(tmp_path, warm_up=small)
    assert grown < 3 * shard_bytes, f"{grown} bytes for shards of {shard_bytes}"


def peak_growth(folder: Path, *, warm_up: Path) -> int:
    """By how many bytes converting `folder` raises the peak memory of a fresh process."""
    code = (
        "import resource, sys\n"
        "from fasteagle.checkpoint import convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(sys.argv[1], sys.argv[1] + '-out')\n"
        "before = peak()\n"
        "convert(sys.argv[2], sys.argv[2] + '-out')\n"
        "print((peak() - before) * 1024)\n"
    )
    command_line = [sys.executable, "-c", code, str(warm_up), str(folder)]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


# ---- hub ids and the command line


def test_a_hub_id_is_downloaded_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "snapshot", TARGET, target_tensors(), "one.bin")
    calls = []

    def download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((hub_id, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert convert("owner/name", revision="v2") == Path("checkpoints/owner/name")
    assert [call[:2] for call in calls] == [("owner/name", "v2")] * 2
    # Both kinds of weights are only asked for when the first is not there.
    assert [hub.SAFETENSORS[0] in calls[0][2], hub.BIN[0] in calls[0][2]] == [True, False]
    assert hub.BIN[0] in calls[1][2]
    assert read_target("checkpoints/owner/name")[0].dim == C
    assert len(calls) == 2


class Gated(GatedRepoError):
    def __init__(self) -> None:
        pass


class Unknown(RepositoryNotFoundError):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("offline"),
            "owner/name is not a path here and cannot be downloaded",
        ),
        (Unknown(), "owner/name is neither a path here nor a model you can see"),
        (Gated(), "owner/name is gated"),
    ],
)
def test_a_download_that_fails_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_target("owner/name")


@pytest.mark.parametrize("source", ["missing", "./owner/name", "a/b/c", "/no/such/folder"])
def test_a_path_that_is_not_there_is_never_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_target(source)


def test_the_command_converts_and_prints_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    out = tmp_path / "ours"
    assert (
        run(command, ["--checkpoint_dir", str(folder), "--out", str(out), "--dtype", "bfloat16"])
        == 0
    )
    assert capsys.readouterr().out == f"{out}\n"
    assert read_target(out)[0].dtype == "bfloat16"


def test_a_command_that_is_interrupted_returns_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert", interrupt)
    assert run(command, ["--checkpoint_dir", "x"]) == 130


@pytest.mark.parametrize("script", ["convert_hf_checkpoint", "convert_hf_checkpoint_EAGLE"])
def test_a_script_reports_one_line_and_status_2(tmp_path: Path, script: str) -> None:
    """Run from elsewhere and without the package on the path."""
    file = str(ROOT / "convert" / f"{script}.py")
    command_line = [sys.executable, file, "--checkpoint_dir", str(tmp_path)]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {tmp_path} has no config.json; expected a Hugging Face or a fasteagle folder"
    ]
