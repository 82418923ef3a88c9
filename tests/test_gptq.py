"""Does GPTQ choose the codes of its slow textbook form, and are they better than nearest ones?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasteagle.quant.gptq import gptq
from fasteagle.quant.layout import Quantized, dequantize, unpack_int4
from fasteagle.quant.rounding import quantize

SIZES = (32, 64, 128, 256)


def layer(n_outputs: int = 16, n_inputs: int = 96, n_rows: int = 400) -> tuple[Tensor, Tensor]:
    """A weight `[O, I]` and the Hessian `[I, I]`, float64, of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(n_inputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(n_rows, n_inputs) @ normal(n_inputs, n_inputs)
    inputs = inputs * normal(n_inputs).exp()
    return normal(n_outputs, n_inputs), inputs.T @ inputs


def errors(found: Quantized, weight: Tensor, hessian: Tensor) -> Tensor:
    """Squared error of each output `[O]` on the calibration inputs."""
    difference = dequantize(found, torch.float64) - weight
    return ((difference @ hessian) * difference).sum(1)


def textbook(weight: Tensor, hessian: Tensor, start: Quantized, order: list[int]) -> Tensor:
    """The slow twin: values `[O, I]` by Optimal Brain Surgeon, one column and one inverse a step.

    Quantize column c, move the others by -error / inverse[c, c] * inverse[c], then strike c out of
    the inverse (arXiv 2210.17323, equations 2 and 3). The grid is that of `start`.
    """
    left, result = weight.clone(), torch.empty_like(weight)
    inverse = torch.linalg.inv(hessian)
    low, high = (-8, 7) if start.bits == 4 else (-127, 127)
    for column in order:
        group = column // start.group_size
        scale = start.scales[:, group].double()
        zero = 0.0 if start.zeros is None else start.zeros[:, group].double()
        code = ((left[:, column] - zero) / scale).round().clamp(low, high)
        result[:, column] = code * scale + zero
        error = (left[:, column] - result[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        row = inverse[column].clone()
        inverse -= row[:, None] * row / row[column]
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(("bits", "n_inputs"), [(4, 96), (4, 75), (8, 40)])
def test_codes_are_the_textbook_ones(bits: int, n_inputs: int, clip: str, act_order: bool) -> None:
    weight, hessian = layer(n_inputs=n_inputs)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n_inputs)
    start = quantize(weight, bits=bits, group_size=32, clip=clip)
    order = list(range(n_inputs))
    if act_order:
        order.sort(key=lambda column: -float(hessian[column, column]))
    found = gptq(
        weight,
        hessian,
        bits=bits,
        group_size=32,
        clip=clip,
        act_order=act_order,
        damping=0.01,
        block=16,
    )
    wanted = textbook(weight, damped, start, order)
    torch.testing.assert_close(dequantize(found, torch.float64), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_inputs", [64, 75, 200])
def test_unrelated_inputs_make_it_rounding_to_nearest(
    n_inputs: int, bits: int, clip: str, act_order: bool
) -> None:
    weight = layer(n_inputs=n_inputs)[0].float()
    hessian = torch.diag(torch.linspace(0, 3, n_inputs))  # the first input was always 0
    found = gptq(weight, hessian, bits=bits, group_size=64, clip=clip, act_order=act_order)
    wanted = quantize(weight, bits=bits, group_size=64, clip=clip)
    assert found.shape == wanted.shape
    assert found.tensors().keys() == wanted.tensors().keys()
    for name, tensor in wanted.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


@pytest.mark.parametrize("n_rows", [20, 400])  # 20 inputs leave most directions to the damping
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("group_size", SIZES)
def test_outputs_are_nearer_than_with_rounding(
    group_size: int, clip: str, act_order: bool, n_rows: int
) -> None:
    weight, hessian = layer(64, 200, n_rows)
    found = gptq(
        weight.float(), hessian.float(), group_size=group_size, clip=clip, act_order=act_order
    )
    nearest = quantize(weight, bits=4, group_size=group_size, clip=clip)
    gained = errors(found, weight, hessian) / errors(nearest, weight, hessian)
    assert gained.mean() < 0.8
    assert (gained > 1).float().mean() < 0.05


def test_blocks_and_the_hessians_scale_change_nothing() -> None:
    weight, hessian = layer()
    wanted = gptq(weight, hessian, group_size=32)
    for block, scale in ((1, 1.0), (7, 1.0), (96, 1.0), (128, 1e6)):
        found = gptq(weight, hessian * scale, group_size=32, block=block)
        assert torch.equal(found.codes, wanted.codes)


def test_padding_holds_what_rounding_puts_there() -> None:
    weight, hessian = layer(n_inputs=75)
    found = gptq(weight, hessian, group_size=64, clip="minmax")
    nearest = quantize(weight, bits=4, group_size=64)
    assert found.n_stored == 128
    padding = [unpack_int4(one.codes, 64)[:, 75:] for one in (found, nearest)]
    assert torch.equal(*padding)


def test_input_that_was_always_zero_takes_no_part() -> None:
    weight, hessian = layer(n_inputs=64)
    hessian[[3, 40]] = 0
    hessian[:, [3, 40]] = 0
    found = gptq(weight, hessian, group_size=32)
    nearest = quantize(weight, bits=4, group_size=32, clip="mse")
    full, wanted = dequantize(found), dequantize(nearest)
    assert torch.equal(full[:, [3, 40]], wanted[:, [3, 40]])
    kept = [column for column in range(64) if column not in (3, 40)]
    assert not torch.equal(full[:, kept], wanted[:, kept])


def test_no_input_at_all_is_rounding_to_nearest() -> None:
    weight, _ = layer(n_inputs=64)
    found = gptq(weight, torch.zeros(64, 64), group_size=32)
    assert torch.equal(found.codes, quantize(weight, bits=4, group_size=32, clip="mse").codes)


def test_one_input_direction_without_damping_is_damped_anyway() -> None:
    weight, _ = layer(n_inputs=64)
    inputs = torch.linspace(0.5, 2, 64)[None]
    hessian = inputs.T @ inputs
    found = gptq(weight.float(), hessian, group_size=32, damping=0.0)
    assert errors(found, weight, hessian.double()).isfinite().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite_is_refused(wrong: float) -> None:
    weight, hessian = layer(n_inputs=32)
    hessian[2, 5] = wrong
    with pytest.raises(ValueError, match="32 inputs holds NaN or infinity"):
        gptq(weight, hessian, group_size=32)


def test_matrix_that_is_no_hessian_is_refused() -> None:
    weight, _ = layer(n_inputs=32)
    with pytest.raises(ValueError, match="not positive definite, even with 50 of"):
        gptq(weight, -torch.eye(32) - 1, group_size=32)
