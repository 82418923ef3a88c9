"""Is a broken quantized file or folder one clear line on stderr and status 2, nothing touched?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from tests.gptfast_files import Mode, write_gptfast
from tests.hf_folders import HEAD, TARGET, head_tensors, target_tensors, write
from tests.quant_files import CONFIG, write_gptq_folder

INT8, INT4 = "model_int8.safetensors", "model_int4.g32.safetensors"


def plain(folder: Path) -> Path:
    return write(folder, TARGET, target_tensors())


def ours(folder: Path, bits: int = 8) -> Path:
    """Our quantized file, of a model whose rows are one group of 32 that is not full."""
    return quantize_checkpoint(plan_quantization(plain(folder), Recipe(bits, pad=True)))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


def edit_file(
    file: Path,
    *,
    header: Callable[[dict[str, Any]], object] | None = None,
    nan: str | None = None,
    drop: str | None = None,
) -> Path:
    """Our file with another header, a NaN in the tensor `nan`, or without `drop`."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    if header is not None:
        held = json.loads(metadata["fasteagle_quantization"])
        header(held)
        metadata["fasteagle_quantization"] = json.dumps(held)
    if nan is not None:
        tensors[nan].view(-1)[1] = torch.nan
    tensors.pop(drop or "", None)
    save_file(tensors, file, metadata=metadata)
    return file


def cut(path: Path) -> Path:
    file = ours(path)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def of_another_shape(path: Path) -> Path:
    file = ours(path)
    edit_json(path / "config.json", lambda held: held.update(num_hidden_layers=2))
    return file


def with_another_record(path: Path) -> Path:
    file = ours(path)
    edit_json(
        path / "config.json", lambda held: held["fasteagle_quantized"][INT8].update(source_sha="0")
    )
    return file


def with_no_records(path: Path) -> Path:
    file = ours(path)
    edit_json(path / "config.json", lambda held: held.update(fasteagle_quantized=[1]))
    return file


def of_a_head(path: Path) -> Path:
    head = write(path.parent / "a_head", HEAD, head_tensors())
    file = quantize_checkpoint(plan_quantization(head, Recipe(8)))
    return Path(shutil.copy(file, plain(path) / INT8))


def damaged_header(path: Path) -> Path:
    return edit_file(ours(path), header=lambda held: held.pop("quantization"))


def three_bits(path: Path) -> Path:
    file = edit_file(ours(path), header=lambda held: held["quantization"].update(bits=3))
    (path / "config.json").write_text(json.dumps(TARGET))
    return file


def group_of_no_size(path: Path) -> Path:
    file = edit_file(ours(path, 4), header=lambda held: held["quantization"].update(group_size=0))
    (path / "config.json").write_text(json.dumps(TARGET))
    return file


def nan_scale(path: Path) -> Path:
    return edit_file(ours(path), nan="layers.1.mlp.down_proj.scales")


def nan_zero(path: Path) -> Path:
    return edit_file(ours(path, 4), nan="layers.0.self_attn.o_proj.zeros")


def missing_scales(path: Path) -> Path:
    return edit_file(ours(path, 4), drop="layers.0.self_attn.o_proj.scales")


def only_quantized(path: Path) -> Path:
    ours(path)
    (path / "model.safetensors").unlink()
    return path


def gptq_with(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        write_gptq_folder(path, CONFIG, zero_bias=True)
        tensors = load_file(path / "model.safetensors")
        tensors[name].view(-1)[1] = torch.inf
        save_file(tensors, path / "model.safetensors")
        return path

    return make


def gptq_three_bits(path: Path) -> Path:
    write_gptq_folder(path, CONFIG)
    edit_json(path / "config.json", lambda held: held["quantization_config"].update(bits=3))
    return path


def gptfast_with_nan(path: Path) -> Path:
    file, _ = write_gptfast(path, Mode(8))
    held = torch.load(file)
    held["layers.1.attention.wqkv.scales"][0] = torch.nan
    torch.save(held, file)
    return file


def doubled(path: Path) -> Path:
    """Two shards hold the norm."""
    folder = write(path, TARGET, target_tensors(), "shards.safetensors")
    shards = sorted(folder.glob("model-*"))
    for shard in shards[:2]:
        held = load_file(shard) | {"model.norm.weight": torch.ones(16)}
        save_file(held, shard, metadata={"format": "pt"})
    return folder


def cut_shard(path: Path) -> Path:
    folder = write(path, TARGET, target_tensors(), "shards.safetensors")
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    return folder


def unquantized_pth(path: Path) -> Path:
    return write_gptfast(path, Mode(16))[0]


BY_HEADERS: list[tuple[Callable[[Path], Path], str]] = [
    (cut, f"{INT8} is cut short"),
    (of_another_shape, "config.json beside it belongs to another model"),
    (with_another_record, "config.json beside it belongs to another model"),
    (with_no_records, "fasteagle_quantized is [1]; expected an object"),
    (of_a_head, "config.json beside it belongs to another model"),
    (damaged_header, "its header is damaged ('quantization'); quantize the checkpoint again"),
    (three_bits, "weights of 3 bits are not supported; expected 4 or 8"),
    (group_of_no_size, "its header states group size 0; expected 32, 64, 128, 256"),
    (missing_scales, "missing layers.0.self_attn.o_proj.scales"),
    (only_quantized, f"or give one of its files: {INT8}"),
    (gptq_three_bits, "GPTQ in 3 bits is not supported; expected 4"),
    (doubled, "holds model.norm.weight twice, in model-00001-of-00003.safetensors and"),
    (cut_shard, "model-00002-of-00003.safetensors is cut short"),
    (unquantized_pth, "give the folder of the Hugging Face checkpoint instead"),
]
BY_VALUES: list[tuple[Callable[[Path], Path], str]] = [
    (nan_scale, f"{INT8}: layers.1.mlp.down_proj.scales holds NaN or infinity"),
    (nan_zero, f"{INT4}: layers.0.self_attn.o_proj.zeros holds NaN or infinity"),
    (gptq_with("model.layers.0.mlp.up_proj.scales"), "up_proj.scales holds NaN or infinity"),
    (gptq_with("model.layers.1.self_attn.q_proj.bias"), "q_proj.bias is not 0"),
    (gptfast_with_nan, "model_int8.pth: layers.1.attention.wqkv.scales holds NaN"),
]


def trace_of(path: Path) -> list[str | Path]:
    prompts = path.parent / "prompts.json"
    prompts.write_text("[[1, 3, 5]]")
    flags = ["--max_new_tokens", "4", "--out", path.parent / "trace.json"]
    return ["trace", "--checkpoint_path", path, "--prompt_ids", prompts, *flags]


@pytest.mark.parametrize(("make", "words"), BY_HEADERS, ids=[m.__name__ for m, _ in BY_HEADERS])
def test_headers_that_are_wrong(
    make: Callable[[Path], Path], words: str, tmp_path: Path, refused: Refused
) -> None:
    path = make(tmp_path / "base")
    for command in ("doctor", "quantize"):
        refused(command, "--checkpoint_path", path, words=words)


@pytest.mark.parametrize(("make", "words"), BY_VALUES, ids=[w[:30] for _, w in BY_VALUES])
def test_values_that_are_wrong(
    make: Callable[[Path], Path], words: str, tmp_path: Path, refused: Refused
) -> None:
    flags = ("--dtype", "bfloat16", "--device", "cpu")
    refused(*trace_of(make(tmp_path / "base")), *flags, words=words)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dtype_without_a_kernel(bits: int, tmp_path: Path, refused: Refused) -> None:
    trace = trace_of(ours(tmp_path / "base", bits))
    words = f"int{bits} weights have no fast CPU kernel in float16; use --dtype bfloat16"
    refused(*trace, "--dtype", "float16", "--device", "cpu", words=words)
