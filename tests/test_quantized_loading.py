"""Do whole quantized checkpoints become models of exactly the weights that their codes stand for?

O outputs  I inputs  C model dim  V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, full_pass, prompt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fasteagle.checkpoint import convert, load_head, load_target
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.quant.layout import dequantize
from fasteagle.quant.linear import QuantLinear, Stacked
from fasteagle.quant.rounding import quantize
from tests.gptfast_files import Mode, write_gptfast, write_gptfast_head
from tests.hf_folders import LAYOUTS, Tensors, assert_equal, fused, write
from tests.quant_files import (
    CONFIG,
    HEAD,
    hf_shapes,
    random_plain,
    write_awq_folder,
    write_compressed_folder,
    write_gptq_folder,
)

LAYERS = [f"layers.{index}." for index in range(CONFIG["num_hidden_layers"])]
C = CONFIG["hidden_size"]
Written = tuple[Path, Tensors]  # a source, and the weights it stands for by Hugging Face's names


def folder(path: Path, *, writer: Callable[..., Tensors], **options: Any) -> Written:
    return path, writer(path, **options)


def mixed(path: Path) -> Written:
    """compressed-tensors whose k_proj were left alone, as `ignore` allows."""
    weights = write_compressed_folder(path)
    held = load_file(path / "model.safetensors")
    for name in [name for name in weights if "k_proj" in name]:
        matrix = name.removesuffix("weight")
        held = {n: tensor for n, tensor in held.items() if not n.startswith(matrix)}
        held[name] = weights[name].contiguous()
    save_file(held, path / "model.safetensors")
    return path, weights


FOREIGN: dict[str, Callable[[Path], Written]] = {
    "gptq": partial(folder, writer=write_gptq_folder),
    "gptq v2": partial(folder, writer=write_gptq_folder, version=2),
    "gptq one group": partial(folder, writer=write_gptq_folder, group_size=-1),
    "gptq act-order": partial(folder, writer=write_gptq_folder, act_order=True),
    "gptq own orders": partial(folder, writer=write_gptq_folder, act_order=True, own_order=True),
    "gptq zero bias": partial(folder, writer=write_gptq_folder, zero_bias=True),
    "awq": partial(folder, writer=write_awq_folder),
    "compressed-tensors": partial(folder, writer=write_compressed_folder),
    "compressed-tensors mixed": mixed,
    "gpt-fast int8": partial(write_gptfast, mode=Mode(8)),
    "gpt-fast int4": partial(write_gptfast, mode=Mode(4)),
}


def logits(target: Transformer) -> Tensor:
    """`[S, V]` float32 of a fixed prompt."""
    tokens = prompt(24, vocab=target.config.vocab_size)
    return target.logits(full_pass(target, tokens)[0]).float()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


# ------------------------------------------------------------------------ other people's files


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_target_has_exactly_its_weights(kind: str, tmp_path: Path) -> None:
    source, weights = FOREIGN[kind](tmp_path)
    target = load_target(source, dtype=torch.float32)
    assert_equal(target.state_dict(), fused(weights, LAYERS, "model."))


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_target_decodes_in_16_bits(kind: str, tmp_path: Path) -> None:
    source, _ = FOREIGN[kind](tmp_path)
    exact = load_target(source, dtype=torch.float32)
    target = load_target(source, dtype=torch.bfloat16)
    assert_close(logits(target), logits(exact))
    qkv = target.layers[1].self_attn.qkv_proj
    # Three column orders, or two precisions, are no one layer.
    apart = kind in ("gptq own orders", "compressed-tensors mixed")
    assert isinstance(qkv, Stacked if apart else QuantLinear)
    assert isinstance(target.lm_head, QuantLinear if "gpt-fast" in kind else nn.Linear)
    results = Engine(target).generate([prompt(9, vocab=40)], max_new_tokens=12, stop_ids=[])
    assert len(results[0].tokens) == 12


@pytest.mark.parametrize("bits", [4, 8])
def test_an_eaglefast_head_has_exactly_its_weights(bits: int, tmp_path: Path) -> None:
    source, _ = write_gptfast(tmp_path / "base", Mode(bits))
    target = load_target(source, dtype=torch.float32)
    path, weights = write_gptfast_head(tmp_path / "head", Mode(bits))
    head = load_head(path, target)
    assert_equal(head.state_dict(), fused(weights, ["layers.0."]))
    narrow = load_head(path, target, dtype=torch.bfloat16)
    assert isinstance(narrow.layers[0].mlp.gate_up_proj, QuantLinear | Stacked)


# ------------------------------------------------------------------------ our quantizer's files


def target_tensors(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Tensors:
    """600 tokens, so that the lm_head is quantized in more than one piece."""
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(CONFIG | {"vocab_size": 600})
    if tied:
        del shapes["lm_head.weight"]
    return {name: random_plain(shape, generator, dtype) for name, shape in shapes.items()}


def head_tensors() -> Tensors:
    shapes = {"fc.weight": (C, 2 * C), "fc.bias": (C,), "embed_tokens.weight": (40, C)}
    for name, shape in hf_shapes(CONFIG).items():
        if "layers.0." in name and "input_layernorm" not in name:
            shapes[name.removeprefix("model.")] = shape
    generator = torch.Generator().manual_seed(1)
    return {name: random_plain(shape, generator, torch.float32) for name, shape in shapes.items()}


def write_target(path: Path, tensors: Tensors, layout: str = LAYOUTS[0]) -> Path:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    stated = {"vocab_size": 600, "torch_dtype": dtype}
    tied = {"tie_word_embeddings": "lm_head.weight" not in tensors}
    return write(path, CONFIG | stated | tied, tensors, layout)


def rounded(
    tensors: Tensors,
    *,
    bits: int,
    lm_head: int = 8,
    group_size: int = 32,
    clip: str = "mse",
    kept: tuple[str, ...] = (),
) -> Tensors:
    """The slow twin: every matrix, before q, k and v are one, quantized by itself."""
    result = {}
    for name, tensor in tensors.items():
        n = lm_head if name == "lm_head.weight" else bits
        stays = tensor.dim() == 1 or "embed" in name or n == 16
        if stays or any(part in name for part in kept):
            result[name] = tensor.float()
        else:
            result[name] = dequantize(quantize(tensor, bits=n, group_size=group_size, clip=clip))
    return result


def quantized(run: Run, folder: Path, *flags: str) -> Path:
    out, _ = run("quantize", "--checkpoint_path", folder, *flags)
    return Path(out.strip())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--mode int8", {"bits": 8}),
        ("--mode int8 --clip minmax", {"bits": 8, "clip": "minmax"}),
        ("--mode int8 --lm_head 4 --groupsize 64", {"bits": 8, "lm_head": 4, "group_size": 64}),
        ("--mode int8 --lm_head 16", {"bits": 8, "lm_head": 16}),
        ("--mode int4", {"bits": 4}),
        ("--mode int4 --groupsize 64 --pad", {"bits": 4, "group_size": 64}),
        ("--mode int4 --groupsize 128 --pad", {"bits": 4, "group_size": 128}),
        ("--mode int4 --groupsize 256 --pad", {"bits": 4, "group_size": 256}),
        ("--mode int4 --lm_head 4", {"bits": 4, "lm_head": 4}),
        ("--mode int4 --lm_head 16", {"bits": 4, "lm_head": 16}),
        ("--mode int4 --keep layers.0.*", {"bits": 4, "kept": ("layers.0.",)}),
        (
            "--mode int4 --keep *.down_proj --keep lm_head",
            {"bits": 4, "kept": ("down_proj", "lm_head")},
        ),
        ("--keep layers.*", {"bits": 16}),
    ],
)
def test_our_file_has_exactly_the_rounded_weights(
    flags: str, expected: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    tensors = target_tensors()
    file = quantized(run, write_target(tmp_path, tensors), *flags.split())
    target = load_target(file, dtype=torch.float32)
    assert_equal(target.state_dict(), fused(rounded(tensors, **expected), LAYERS, "model."))
    assert_close(logits(load_target(file, dtype=torch.bfloat16)), logits(target))


@pytest.mark.parametrize("lm_head", [4, 8, 16])
def test_a_tied_lm_head_has_codes_of_its_own(lm_head: int, tmp_path: Path, run: Run) -> None:
    tensors = target_tensors(tied=True)
    folder = write_target(tmp_path, tensors)
    file = quantized(run, folder, "--mode", "int4", "--lm_head", str(lm_head))
    wanted = rounded(tensors, bits=4)
    if lm_head < 16:
        copy = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        wanted |= rounded(copy, bits=4, lm_head=lm_head)
    target = load_target(file, dtype=torch.float32)
    assert_equal(target.state_dict(), fused(wanted, LAYERS, "model."))
    narrow = load_target(file, dtype=torch.bfloat16)
    assert isinstance(narrow.lm_head, QuantLinear) == (lm_head < 16)
    assert_close(logits(narrow), logits(target))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_our_file_of_a_head_has_exactly_the_rounded_weights(
    mode: str, tmp_path: Path, run: Run
) -> None:
    tensors = head_tensors()
    folder = write(tmp_path / "head", HEAD | {"torch_dtype": "float32"}, tensors)
    file = quantized(run, folder, "--mode", mode)
    base, _ = write_gptfast(tmp_path / "base", Mode(8))
    target = load_target(base, dtype=torch.float32)
    head = load_head(file, target)
    assert head.config.fc_bias
    assert head.config.own_embedding
    assert_equal(head.state_dict(), fused(rounded(tensors, bits=int(mode[3])), ["layers.0."]))


# ------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("converted", [False, True], ids=["as it is", "converted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_the_same_file(
    layout: str, converted: bool, tmp_path: Path, run: Run
) -> None:
    tensors = target_tensors(torch.float16)
    folder = write_target(tmp_path / "hf", tensors, layout)
    if converted:
        folder = convert(folder, tmp_path / "ours")
    file = quantized(run, folder, "--mode", "int4")
    assert file == folder / "model_int4.g32.safetensors"
    target = load_target(file, dtype=torch.float32)
    assert_equal(target.state_dict(), fused(rounded(tensors, bits=4), LAYERS, "model."))


def test_a_weight_file_is_quantized_like_its_folder(tmp_path: Path, run: Run) -> None:
    folder = write_target(tmp_path, target_tensors())
    wanted = quantized(run, folder).read_bytes()
    assert quantized(run, folder / "model.safetensors").read_bytes() == wanted


def test_quantizing_again_replaces_file_and_record(tmp_path: Path, run: Run) -> None:
    tensors = target_tensors()
    folder = write_target(tmp_path, tensors)
    quantized(run, folder, "--mode", "int8")
    quantized(run, folder, "--mode", "int4")
    file = quantized(run, folder, "--mode", "int4", "--lm_head", "16", "--clip", "minmax")
    records = json.loads((folder / "config.json").read_text())["fasteagle_quantized"]
    assert list(records) == ["model_int8.safetensors", file.name]
    assert (records[file.name]["lm_head_bits"], records[file.name]["method"]) == (16, "minmax")
    wanted = rounded(tensors, bits=4, lm_head=16, clip="minmax")
    target = load_target(file, dtype=torch.float32)
    assert_equal(target.state_dict(), fused(wanted, LAYERS, "model."))


def test_converting_again_removes_quantized_files_of_the_old_weights(
    tmp_path: Path, run: Run
) -> None:
    folder = write_target(tmp_path / "hf", target_tensors())
    out = convert(folder, tmp_path / "ours")
    fresh = {file.name: file.read_bytes() for file in out.iterdir()}
    for mode in ("int8", "int4"):
        quantized(run, out, "--mode", mode)
    convert(folder, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == fresh
