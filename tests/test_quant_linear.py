"""Does every CPU kernel multiply by the weights that the codes stand for?

M rows  O outputs  I inputs
"""

from __future__ import annotations

import pytest
import torch
from test_quant_layout import KINDS, weights
from torch import Tensor, nn

from fasteagle.model import Linear
from fasteagle.quant import kernels
from fasteagle.quant.kernels import ANY, CPU_INT4, CPU_INT8, DENSE, TINYGEMM, TRITON
from fasteagle.quant.layout import Quantized, dequantize
from fasteagle.quant.linear import QuantLinear, Stacked
from fasteagle.quant.rounding import quantize

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
BOUND = 1e-2  # of bfloat16, relative to the product in float64
ROWS = (1, 3, 4, 5, 8, 9, 16, 33)


def inputs(n_rows: int, n_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_rows)
    return torch.randn(n_rows, n_inputs, generator=generator).to(BF16)


def relative_error(y: Tensor, x: Tensor, weight: Quantized) -> float:
    exact = x.double() @ dequantize(weight, torch.float64).T
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("keep_dense", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("shape", [(48, 256), (40, 688), (17, 96), (16, 33), (7, 72)], ids=str)
def test_products_are_right_for_every_number_of_rows(
    shape: tuple[int, int], bits: int, group_size: int, keep_dense: bool
) -> None:
    made = quantize(weights(*shape), bits=bits, group_size=group_size)
    layer = QuantLinear(made, dtype=BF16, keep_dense=keep_dense)
    for n_rows in ROWS:
        x = inputs(n_rows, shape[1])
        assert relative_error(layer(x), x, made) < BOUND, f"{n_rows} rows"


def test_column_order_bias_and_leading_dimensions() -> None:
    made = quantize(weights(16, 64), bits=4, group_size=32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    made = made._replace(order=order)
    layer = QuantLinear(made, bias=True, dtype=BF16)
    bias = torch.linspace(-8, 8, 16).to(BF16)
    layer.load_state_dict({"bias": bias}, strict=True)
    for shape in ((2, 3), (4, 2)):  # a few rows and many
        x = inputs(shape[0] * shape[1], 64).view(*shape, 64)
        y = layer(x)
        assert y.shape == (*shape, 16)
        assert relative_error(y - bias, x, made) < 2 * BOUND


def test_the_portable_codes_come_back() -> None:
    made = quantize(weights(16, 64), bits=4, group_size=32)
    layer = QuantLinear(made, dtype=BF16, keep_dense=True, keep_codes=True)
    assert torch.equal(dequantize(layer.quantized), dequantize(made))
    assert QuantLinear(made, dtype=BF16, keep_dense=True).codes is None


def test_stacked_layers_lie_side_by_side() -> None:
    made = quantize(weights(8, 64), bits=4, group_size=32)
    dense = Linear(64, 4, bias=False).to(BF16)
    parts = [QuantLinear(made, dtype=BF16), dense]
    layer = Stacked(parts, bias=True, dtype=BF16)
    assert isinstance(layer.bias, nn.Parameter)
    layer.bias.data = torch.arange(12).to(BF16)
    x = inputs(3, 64)
    wanted = torch.cat([part(x) for part in parts], -1) + layer.bias
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_equals_eager(bits: int) -> None:
    made = quantize(weights(48, 96), bits=bits, group_size=32)
    layers = [QuantLinear(made, dtype=BF16, keep_dense=True), QuantLinear(made, dtype=BF16)]

    def both(few: Tensor, many: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers for x in (few, many)]

    given = inputs(3, 96), inputs(24, 96)
    compiled = torch.compile(both, fullgraph=True, dynamic=False)
    for ours, eager in zip(compiled(*given), both(*given), strict=True):
        assert (ours - eager).float().norm() <= eager.float().norm() * BOUND


# ------------------------------------------------------------------------------ which kernel


def names(bits: int, device: str, dtype: torch.dtype) -> list[tuple[int, str]]:
    ranges = kernels.kernels(bits, device=torch.device(device), dtype=dtype)
    return [(limit.rows, limit.kernel) for limit in ranges]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An RTX 3090, as far as the choice of kernels can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    return monkeypatch


def test_kernels_go_by_rows_device_and_dtype(card: pytest.MonkeyPatch) -> None:
    half = torch.float16
    assert names(4, "cuda", BF16) == [(8, TINYGEMM), (64, TRITON), (ANY, DENSE)]
    assert names(4, "cuda", half) == names(8, "cuda", BF16) == [(64, TRITON), (ANY, DENSE)]
    for amx, rows in ((True, 4), (False, 8)):
        card.setattr(kernels, "has_amx", lambda amx=amx: amx)
        assert names(4, "cpu", BF16) == [(rows, CPU_INT4), (ANY, DENSE)]
        assert names(8, "cpu", BF16) == [(rows, CPU_INT8), (ANY, DENSE)]


def test_a_missing_kernel_is_said_beforehand(card: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert kernels.fallbacks(4, device=cuda, dtype=BF16) == []
    card.setattr(kernels, "has_triton", lambda: False)
    (said,) = kernels.fallbacks(4, device=cuda, dtype=BF16)
    assert "products of more than 16 rows dequantize the weight first" in said
    assert names(4, "cuda", BF16) == [(16, TINYGEMM), (ANY, DENSE)]
    assert kernels.fallbacks(4, device=torch.device("cpu"), dtype=BF16) == []


def test_a_device_without_a_kernel_is_refused(card: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"int4 .* no fast CPU kernel in float16; use --dtype bfl"):
        names(4, "cpu", torch.float16)
    card.setattr(kernels, "has_triton", lambda: False)
    for bits, dtype in ((8, BF16), (8, torch.float16), (4, torch.float16)):
        for ask in (kernels.kernels, kernels.fallbacks):
            with pytest.raises(ValueError, match=r"no kernel in b?float16 on this GPU .* without"):
                ask(bits, device=CUDA, dtype=dtype)
    card.setattr(kernels, "has_triton", lambda: True)
    card.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"int4 .* capability 7\.5, with Triton, which needs 8\.0"):
        names(4, "cuda", BF16)
    assert names(4, "cuda", torch.float16) == [(64, TRITON), (ANY, DENSE)]
