"""Do codes stand for the weights that they were made from, in every group size?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasteagle.quant.layout import (
    GROUP_SIZES,
    ROWS,
    Quantized,
    dequantize,
    pack_int4,
    select_rows,
    stack,
    unpack_int4,
)
from fasteagle.quant.rounding import CLIPS, quantize

# bits 4 with every group size, and 8, whose group is the row
KINDS = [(4, size) for size in GROUP_SIZES] + [(8, 32)]


def weights(n_outputs: int, n_inputs: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, some of them off centre."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_outputs, n_inputs, generator=generator)
    sizes = torch.rand(n_outputs, 1, generator=generator) + 0.1
    return noise * sizes + torch.linspace(-0.3, 0.3, n_outputs)[:, None]


def same(one: Quantized, other: Quantized) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_byte_holds_two_columns_half_a_group_apart() -> None:
    # group of 32: column 0 -> low bits of byte 0, column 16 -> its high bits, 1 | 17 -> byte 1
    values = torch.zeros(1, 32, dtype=torch.int64)
    values[0, 0], values[0, 16], values[0, 17] = 5, 3, 9
    assert pack_int4(values, 32)[0, :3].tolist() == [5 + 16 * 3, 16 * 9, 0]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_unpacking_gives_back_what_was_packed(group_size: int) -> None:
    values = torch.randint(0, 16, (5, 3 * group_size), generator=torch.Generator().manual_seed(0))
    codes = pack_int4(values, group_size)
    assert codes.shape == (5, 3 * group_size // 2)
    assert torch.equal(unpack_int4(codes, group_size).long(), values)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_every_weight_is_within_half_a_step_or_clipped(
    bits: int, group_size: int, clip: str
) -> None:
    weight = weights(24, 2 * group_size)
    made = quantize(weight, bits=bits, group_size=group_size, clip=clip)
    error = (dequantize(made) - weight).abs()
    step = made.scales.float().repeat_interleave(made.group_size, 1)
    # Rounding a scale and a zero to bfloat16 moves the ends of the range a little.
    inside = error <= step * 0.51 + weight.abs().amax() * 2**-8
    assert inside.all() if clip == "minmax" else inside.float().mean() > 0.9


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_the_mse_range_is_never_worse_than_the_whole_range(bits: int, group_size: int) -> None:
    weight = weights(32, 2 * group_size, seed=1)
    errors = [
        (
            dequantize(quantize(weight, bits=bits, group_size=group_size, clip=clip)) - weight
        ).square()
        for clip in ("mse", "minmax")
    ]
    best, whole = (e.unflatten(1, (-1, group_size if bits == 4 else e.shape[1])) for e in errors)
    assert (best.sum(-1) <= whole.sum(-1) * (1 + 1e-5)).all()
    assert best.sum() < 0.99 * whole.sum() or bits == 8


def test_scales_and_zeros_are_the_same_in_every_16_bit_kernel() -> None:
    made = quantize(weights(8, 96), bits=4, group_size=32)
    assert made.zeros is not None
    assert made.scales.dtype == made.zeros.dtype == torch.bfloat16


def test_a_group_of_equal_weights_is_exact() -> None:
    weight = torch.full((2, 64), 0.75)
    assert torch.equal(dequantize(quantize(weight, bits=4, group_size=32)), weight)
    assert torch.equal(dequantize(quantize(weight * 0, bits=8, group_size=32)), weight * 0)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_last_group_that_is_not_full_changes_no_other(group_size: int) -> None:
    weight = weights(6, 3 * group_size)
    whole = dequantize(quantize(weight, bits=4, group_size=group_size))
    cut = weight[:, : 2 * group_size + 5]
    made = quantize(cut, bits=4, group_size=group_size)
    assert made.n_stored == 3 * group_size
    assert made.shape == cut.shape
    assert torch.equal(dequantize(made)[:, : 2 * group_size], whole[:, : 2 * group_size])
    assert (dequantize(made) - cut).abs().max() < cut.abs().max() / 5


def test_column_order_is_undone() -> None:
    weight = weights(4, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    made = quantize(weight[:, order], bits=4, group_size=32)
    straight = dequantize(made)
    assert torch.equal(dequantize(made._replace(order=order))[:, order], straight)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_rows_stack_and_are_selected(bits: int, group_size: int) -> None:
    weight = weights(9, group_size)
    whole = quantize(weight, bits=bits, group_size=group_size)
    parts = [quantize(rows, bits=bits, group_size=group_size) for rows in weight.split(4)]
    stacked = stack(parts)
    assert stacked is not None
    assert same(stacked, whole)
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(dequantize(select_rows(whole, rows)), dequantize(whole)[rows])


def test_different_layouts_do_not_stack() -> None:
    weight = weights(4, 64)
    base = quantize(weight, bits=4, group_size=32)
    turned = base._replace(order=torch.arange(63, -1, -1))
    for other in (
        quantize(weight, bits=4, group_size=64),
        quantize(weight, bits=8, group_size=32),
        turned,
    ):
        assert stack([base, other]) is None
    assert stack([turned, turned]) is not None


def test_a_tall_weight_is_dequantized_in_pieces() -> None:
    weight = weights(2 * ROWS + 5, 32)
    made = quantize(weight, bits=4, group_size=32)
    rows = torch.tensor([0, ROWS - 1, ROWS, 2 * ROWS + 4])
    assert torch.equal(dequantize(made)[rows], dequantize(select_rows(made, rows)))
    assert dequantize(made).shape == weight.shape
