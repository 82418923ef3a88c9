"""Do gpt-fast's and eaglefast's .pth files mean the weights that their writers meant?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.families import read_config, target_weights
from fasteagle.heads import draft_weights, read_draft_config
from fasteagle.quant.gptfast import (
    HEAD_COPY,
    Int4,
    Int8,
    format_of_file,
    head_names,
    head_shapes,
    rope_rows,
    target_names,
    unpack_tiles,
)
from fasteagle.quant.layout import GROUP_SIZES, Quantized, dequantize, select_rows
from fasteagle.quant.packed import Shape
from tests.gptfast_files import (
    Mode,
    int4_matrix,
    int4_tensors,
    tile_words,
    write_gptfast,
    write_gptfast_head,
)
from tests.hf_folders import Tensors, assert_equal, fused
from tests.quant_files import CONFIG, HEAD

TILES = (2, 4, 8)
MODES = [*(Mode(4, inner_k_tiles=tiles) for tiles in TILES), Mode(4, 64, 2), Mode(8), Mode(16)]


class Meta(NamedTuple):
    shape: Shape
    dtype: torch.dtype


def headers(held: Tensors) -> dict[str, Meta]:
    return {name: Meta(tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}


def read(names: dict[str, dict[str, Shape]], held: Tensors, rows: Tensor) -> tuple[Tensors, set]:
    """A whole file by our names, and which of its tensors that took."""
    fmt = format_of_file(headers(held))
    found, used = {}, set()
    for ours, parts in names.items():
        stacked = []
        for name, shape in parts.items():
            matrix = name.removesuffix(".weight")
            weight: Quantized | Tensor
            if fmt is not None and fmt.holds(matrix, held):
                tensors = fmt.tensors(matrix, shape)
                for part, (wanted, dtypes, _) in tensors.items():
                    assert tuple(held[part].shape) == wanted
                    assert held[part].dtype in dtypes
                weight = fmt.read(matrix, shape, held)
                weight = select_rows(weight, rows) if "qkv" in ours else weight
                used |= set(tensors)
                stacked.append(dequantize(weight))
            else:
                assert tuple(held[name].shape) == shape
                stacked.append((held[name][rows] if "qkv" in ours else held[name]).float())
                used.add(name)
        found[ours] = torch.cat(stacked)
    return found, used


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_target_is_read_exactly(mode: Mode, tmp_path: Path) -> None:
    path, wanted = write_gptfast(tmp_path, mode)
    config = read_config(json.loads((tmp_path / "config.json").read_text()))
    held = torch.load(path, weights_only=True)
    found, used = read(target_names(config), held, rope_rows(config))
    layers = [f"layers.{index}." for index in range(config.n_layers)]
    assert_equal(found, fused(wanted, layers, "model."))
    assert used == set(held)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_eaglefast_head_is_read_exactly(mode: Mode, tmp_path: Path) -> None:
    path, wanted = write_gptfast_head(tmp_path, mode)
    held = torch.load(path, weights_only=True)
    stated = json.loads((tmp_path / "config.json").read_text())
    config = read_draft_config(stated, head_shapes(headers(held)))
    found, used = read(head_names(config), held, rope_rows(config))
    assert_equal(found, fused(wanted, ["layers.0."]))
    assert {name for name in held if not name.startswith(HEAD_COPY)} == used


def test_names_and_shapes_are_those_of_our_parameters() -> None:
    target = read_config(CONFIG)
    head = read_draft_config(HEAD, {"fc.bias": (64,), "embed_tokens.weight": (40, 64)})
    for names, plan in (
        (target_names(target), target_weights(target)),
        (head_names(head), draft_weights(head)),
    ):
        shapes = {
            ours: (sum(shape[0] for shape in parts.values()), *next(iter(parts.values()))[1:])
            for ours, parts in names.items()
        }
        assert shapes == {weight.name: weight.shape for weight in plan}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("inner_k_tiles", TILES)
def test_int4_is_read_exactly(group_size: int, inner_k_tiles: int) -> None:
    mode = Mode(4, group_size, inner_k_tiles)
    for n_in in (256, 512, 96, 1100):  # the last two are stored padded
        codes, grid, wanted = int4_matrix((16, n_in), mode, torch.Generator().manual_seed(n_in))
        held = int4_tensors("m", codes, grid, mode)
        fmt = format_of_file(headers(held))
        assert fmt == Int4(group_size, inner_k_tiles)
        assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
            name: part.shape for name, part in fmt.tensors("m", (16, n_in)).items()
        }
        found = fmt.read("m", (16, n_in), held)
        assert torch.equal(dequantize(found), wanted)
        assert (found.shape, found.group_size) == ((16, n_in), group_size)


def test_the_word_that_the_docstring_shows() -> None:
    columns = torch.arange(32) % 16
    codes = torch.zeros(8, 32, dtype=torch.int64)
    codes[1] = columns
    word = tile_words(codes, 2)[0, 0, 5, 0].item()
    inputs = (2, 10, 18, 26, 3, 11, 19, 27)
    assert [word >> 4 * nibble & 15 for nibble in range(8)] == [i % 16 for i in inputs]
    assert torch.equal(unpack_tiles(tile_words(codes, 2))[1], columns.to(torch.uint8))


def test_turned_rows_are_pairs_of_halves() -> None:
    # One query head and one kv head of D = 4: q 0..3, k 4..7, v 8..11
    config = DraftConfig("eagle", 8, 4, 1, 1, 1, 4, 8)
    assert rope_rows(config).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11]


def test_model_pth_is_not_quantized() -> None:
    assert format_of_file(headers({"output.weight": torch.zeros(8, 8)})) is None


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"m.weight": (8, 64)}, r"m.scales_and_zeros has shape \[8, 64\]; expected int4 .* CUDA"),
        ({}, r"has shape \[\]"),
        ({"m.weight": (1, 1, 32, 8)}, r"has shape \[1, 1, 32, 8\]"),
        ({"m.weight": (1, 3, 32, 1)}, "has 4 groups for 96 inputs; expected of 32, 64, 128, 256"),
    ],
    ids=["cpu", "no weight", "16 tiles", "group of 24"],
)
def test_int4_that_is_not_for_cuda_is_refused(shapes: dict[str, Shape], message: str) -> None:
    entries = {name: Meta(shape, torch.int32) for name, shape in shapes.items()}
    entries["m.scales_and_zeros"] = Meta((4, 8, 2), torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        format_of_file(entries)


def test_outputs_that_fill_no_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="m has 12 outputs; gpt-fast int4 needs a multiple of 8"):
        Int4(32, 8).tensors("m", (12, 256))


def test_a_scale_that_is_no_number_is_named() -> None:
    held = {"m.weight": torch.ones(8, 32, dtype=torch.int8), "m.scales": torch.ones(8)}
    held["m.scales"][3] = float("inf")
    with pytest.raises(ValueError, match=r"m\.scales holds NaN or infinity"):
        Int8().read("m", (8, 32), held)
    codes, grid, _ = int4_matrix((8, 256), Mode(4), torch.Generator().manual_seed(0))
    grid[1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"m\.scales_and_zeros holds NaN or infinity"):
        Int4(32, 8).read("m", (8, 256), int4_tensors("m", codes, grid, Mode(4)))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"tie_word_embeddings": True}, "ties lm_head .* set tie_word_embeddings to false"),
        ({"attention_bias": True}, "no biases and no q and k norms"),
    ],
    ids=["tied", "biases"],
)
def test_a_model_that_gpt_fast_cannot_hold_is_refused(field: dict[str, bool], message: str) -> None:
    config: ModelConfig = read_config(CONFIG | field)
    with pytest.raises(ValueError, match=message):
        target_names(config)


def test_a_file_that_is_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds no fc\.weight; expected a head"):
        head_shapes(headers({"tok_embeddings.weight": torch.zeros(8, 8)}))
