"""Do quantized Hugging Face files mean the weights that their writers meant?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasteagle.quant.formats import Format, format_of
from fasteagle.quant.layout import GROUP_SIZES, Quantized, dequantize, stack
from fasteagle.weights import Weights
from tests.hf_folders import Tensors
from tests.quant_files import (
    CONFIG,
    Coded,
    awq_tensors,
    compressed_config,
    compressed_tensors,
    gptq_tensors,
    hf_shapes,
    random_coded,
    shuffled_groups,
    write_awq_folder,
    write_compressed_folder,
    write_gptq_folder,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
CT = compressed_config(group_size=128, symmetric=True)
SIZES = (-1, *GROUP_SIZES, 96, 512)  # 96 and 512 are none of ours but are made of ours


def coded(shape: tuple[int, int], group_size: int, **options: Any) -> Coded:
    return random_coded(shape, group_size, torch.Generator().manual_seed(0), **options)


def shuffled(n_in: int, group_size: int) -> Tensor:
    return shuffled_groups(n_in, group_size, torch.Generator().manual_seed(1))


def load(fmt: Format, shape: tuple[int, int], held: Tensors) -> Quantized:
    """Matrix "m" of a file, after the check of names, shapes and types that a reader makes."""
    assert fmt.holds("m", held)
    parts = fmt.tensors("m", shape)
    assert not set(held) - set(parts)
    for name, part in parts.items():
        assert part.optional or name in held
        if name in held:
            assert (part.shape, held[name].dtype in part.dtypes) == (tuple(held[name].shape), True)
    return fmt.read("m", shape, held)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", SIZES)
def test_gptq_is_read_exactly(group_size: int, version: int, *, act_order: bool) -> None:
    shape = (16, 768)
    g_idx = shuffled(768, group_size) if act_order and group_size > 0 else None
    wanted = coded(shape, group_size, g_idx=g_idx)
    config = GPTQ | {"group_size": group_size, "desc_act": act_order}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    found = load(format_of(config), shape, gptq_tensors("m", wanted, version=version))
    assert torch.equal(dequantize(found), wanted.weight)
    assert found.group_size in GROUP_SIZES
    assert (found.order is not None) == (g_idx is not None)
    assert found.scales.dtype == torch.float16


@pytest.mark.parametrize("n_in", [40, 200], ids=["one short group", "a short last group"])
def test_a_short_last_group_is_padded(n_in: int) -> None:
    for g_idx in (None, shuffled(n_in, 128)):
        wanted = coded((8, n_in), 128, g_idx=g_idx)
        found = load(format_of(GPTQ), (8, n_in), gptq_tensors("m", wanted))
        assert torch.equal(dequantize(found), wanted.weight)


def test_one_group_of_any_length_is_read_exactly() -> None:
    wanted = coded((8, 88), -1)
    found = load(format_of(GPTQ | {"group_size": -1}), (8, 88), gptq_tensors("m", wanted))
    assert torch.equal(dequantize(found), wanted.weight)


def test_gptq_without_g_idx_is_in_order() -> None:
    wanted = coded((8, 256), 128)
    held = gptq_tensors("m", wanted, with_g_idx=False)
    assert torch.equal(dequantize(load(format_of(GPTQ), (8, 256), held)), wanted.weight)
    parts = format_of(GPTQ | {"desc_act": True}).tensors("m", (8, 256))
    assert not parts["m.g_idx"].optional


def test_weights_in_one_order_stack() -> None:
    fmt, g_idx = format_of(GPTQ | {"desc_act": True}), shuffled(256, 128)
    both = [coded((rows, 256), 128, g_idx=g_idx) for rows in (8, 16)]
    stacked = stack([load(fmt, (8 * n, 256), gptq_tensors("m", both[n - 1])) for n in (1, 2)])
    assert stacked is not None
    assert torch.equal(dequantize(stacked), torch.cat([one.weight for one in both]))


@pytest.mark.parametrize("group_size", SIZES)
def test_awq_is_read_exactly(group_size: int) -> None:
    wanted = coded((16, 768), group_size)
    fmt = format_of(AWQ | {"group_size": group_size})
    found = load(fmt, (16, 768), awq_tensors("m", wanted))
    assert torch.equal(dequantize(found), wanted.weight)
    assert not fmt.holds("m", ["m.weight"])  # modules_to_not_convert


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("group_size", SIZES)
def test_compressed_tensors_is_read_exactly(
    group_size: int, dtype: torch.dtype, *, symmetric: bool
) -> None:
    shape = (20, 768)  # 20 outputs do not fill the words of the zero points
    wanted = coded(shape, group_size, dtype=dtype)
    if symmetric:
        wanted = wanted._replace(points=torch.full_like(wanted.points, 8))
    fmt = format_of(compressed_config(group_size=group_size, symmetric=symmetric))
    found = load(fmt, shape, compressed_tensors("m", wanted, symmetric=symmetric))
    assert torch.equal(dequantize(found), wanted.weight)
    assert found.scales.dtype == dtype


def test_compressed_tensors_in_act_order_is_read_exactly() -> None:
    wanted = coded((8, 256), 64, g_idx=shuffled(256, 64))
    config = compressed_config(group_size=64, symmetric=False, actorder="group")
    held = compressed_tensors("m", wanted, with_g_idx=True)
    assert torch.equal(dequantize(load(format_of(config), (8, 256), held)), wanted.weight)


def test_compressed_tensors_of_a_group_order_never_set_is_in_order() -> None:
    wanted = coded((8, 252), 128)  # 252 inputs do not fill the words of a row
    held = compressed_tensors("m", wanted) | {"m.weight_g_idx": torch.full((252,), -1)}
    fmt = format_of(compressed_config(group_size=128, symmetric=False))
    assert torch.equal(dequantize(load(fmt, (8, 252), held)), wanted.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; expected gptq, awq, compressed"),
        ({}, "quant_method is None"),
        (GPTQ | {"bits": 8}, "GPTQ in 8 bits"),
        (AWQ | {"bits": 3}, "AWQ in 3 bits"),
        ({"quant_method": "gptq"}, "field bits is missing"),
        (GPTQ | {"group_size": 48}, "group_size is 48; expected -1 or a multiple of one of 32"),
        (GPTQ | {"group_size": 0}, "field group_size is 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'marlin'; expected gptq or gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is set"),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, "dynamic is set"),
        (GPTQ | {"pack_dtype": "int16"}, "'int16'; expected int32"),
        (GPTQ | {"desc_act": "yes"}, "field desc_act is 'yes'"),
        (AWQ | {"version": "gemv"}, "'gemv'; expected gemm"),
        (AWQ | {"zero_point": False}, "zero_point is false"),
        (CT | {"format": "int-quantized"}, "'int-quantized'; expected pack-quantized"),
        (CT | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is set"),
        (CT | {"config_groups": {}}, "0 schemes of weights; expected one"),
        (CT | {"config_groups": None}, "config_groups is None"),
        (CT | {"config_groups": {"a": {"weights": None}}}, "weights is None"),
        (compressed_config(group_size=64, symmetric=True, num_bits=8), "in 8 bits"),
        (compressed_config(group_size=64, symmetric=True, type="float"), "type 'float'"),
        (compressed_config(group_size=64, symmetric=True, strategy="block"), "'block'"),
    ],
)
def test_an_unknown_config_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_of(config)


def test_activations_in_8_bits_are_refused() -> None:
    config = compressed_config(group_size=64, symmetric=True)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(ValueError, match="input_activations is set"):
        format_of(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("config", "pack", "scale"),
    [
        (GPTQ, gptq_tensors, "m.scales"),
        (AWQ, awq_tensors, "m.scales"),
        (compressed_config(group_size=128, symmetric=False), compressed_tensors, "m.weight_scale"),
    ],
    ids=["gptq", "awq", "compressed-tensors"],
)
def test_a_scale_that_is_no_number_is_named(
    config: dict[str, Any], pack: Callable[[str, Coded], Tensors], scale: str, value: float
) -> None:
    held = pack("m", coded((8, 256), 128))
    held[scale][1, 1] = value
    with pytest.raises(ValueError, match=f"{scale} holds NaN or infinity"):
        load(format_of(config), (8, 256), held)


@pytest.mark.parametrize("group", [0, 2, -1], ids=["one too many", "beyond the last", "negative"])
def test_groups_of_wrong_size_are_refused(group: int) -> None:
    held = gptq_tensors("m", coded((8, 256), 128))
    held["m.g_idx"][200] = group
    with pytest.raises(ValueError, match=r"m\.g_idx does not put 128 columns in every group"):
        load(format_of(GPTQ), (8, 256), held)


@pytest.mark.parametrize("config", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_a_matrix_that_fills_no_words_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"m of shape \[12, 256\] does not fill int32 words"):
        format_of(config).tensors("m", (12, 256))


def test_a_stated_shape_that_is_another_is_refused() -> None:
    held = compressed_tensors("m", coded((8, 256), 128), symmetric=True)
    held["m.weight_shape"] = torch.tensor([8, 250])
    with pytest.raises(ValueError, match=r"m\.weight_shape is \[8, 250\]; expected \[8, 256\]"):
        load(format_of(CT), (8, 256), held)


@pytest.mark.parametrize(
    "write_folder",
    [
        lambda path: write_gptq_folder(path, act_order=True),
        lambda path: write_gptq_folder(path, version=2, zero_bias=True),
        write_awq_folder,
        write_compressed_folder,
    ],
    ids=["gptq act-order", "gptq v2", "awq", "compressed-tensors"],
)
def test_a_folder_is_read_exactly(write_folder: Callable[[Path], Tensors], tmp_path: Path) -> None:
    wanted = write_folder(tmp_path)
    fmt = format_of(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    weights = Weights(tmp_path)
    used = set()
    for name, shape in hf_shapes(CONFIG).items():
        matrix = name.removesuffix(".weight")
        if fmt.holds(matrix, weights.entries):
            names = [part for part in fmt.tensors(matrix, shape) if part in weights.entries]
            found = fmt.read(matrix, shape, {part: weights.read(part) for part in names})
            assert torch.equal(dequantize(found), wanted[name])
            if fmt.zero_bias and f"{matrix}.bias" in weights.entries:
                names.append(f"{matrix}.bias")
        else:
            names = [name]
            assert torch.equal(weights.read(name).float(), wanted[name])
        used |= set(names)
    assert used == set(weights.entries)
