"""On a GPU: does every kernel multiply by the weights that the codes stand for, also in a graph?

M rows  O outputs  I inputs
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import MC_SIM, first_gaps, prompt, tokens_of
from test_quant_layout import weights
from torch import Tensor

from fasteagle import demo
from fasteagle.checkpoint import load_head, load_target
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.quant.kernels import DENSE, TINYGEMM, TRITON
from fasteagle.quant.layout import dequantize
from fasteagle.quant.linear import QuantLinear
from fasteagle.quant.rounding import quantize
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(4096, 4096), (1000, 688)]  # the second fills no tile
ROWS = (1, 8, 9, 16, 26, 64, 65)  # around the ends of each kernel
KINDS = [(4, 32), (4, 128), (8, 32)]  # the interpreter has the others


def inputs(n_rows: int, n_inputs: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(n_rows)
    return torch.randn(n_rows, n_inputs, generator=generator, device="cuda").to(dtype)


def error(y: Tensor, x: Tensor, exact: Tensor) -> float:
    wanted = x.double() @ exact.T
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right_for_every_number_of_rows(
    shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype
) -> None:
    made = quantize(weights(*shape).cuda(), bits=bits, group_size=group_size)
    layer, exact = QuantLinear(made, dtype=dtype, device="cuda"), dequantize(made, torch.float64)
    for n_rows in ROWS:
        x = inputs(n_rows, shape[1], dtype)
        assert error(layer(x), x, exact) < BOUNDS[dtype], f"{n_rows} rows"


def test_every_kernel_had_its_turn() -> None:
    made = quantize(weights(64, 64).cuda(), bits=4, group_size=32)
    layer = QuantLinear(made, dtype=torch.bfloat16, device="cuda")
    assert [kernel for _, kernel in layer.plan] == [TINYGEMM, TRITON, DENSE]


@pytest.mark.parametrize(("bits", "n_rows"), [(4, 1), (4, 26), (8, 26), (4, 128)])
def test_a_captured_product_is_the_eager_one(bits: int, n_rows: int) -> None:
    made = quantize(weights(4096, 4096).cuda(), bits=bits, group_size=32)
    layer = QuantLinear(made, dtype=torch.bfloat16, device="cuda")
    x = inputs(n_rows, 4096, torch.bfloat16)
    wanted = layer(x).clone()  # also compiles the kernel, before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("n_outputs", [1024, 12288])
def test_a_row_hardly_depends_on_the_others(n_outputs: int) -> None:
    # The Triton kernel sums in one order however many rows there are (triton_ops.py), so a verify
    # should choose what a plain step does; a unit in the last place is allowed.
    made = quantize(weights(n_outputs, 4096).cuda(), bits=4, group_size=32)
    layer = QuantLinear(made, dtype=torch.float16, device="cuda")
    x = inputs(64, 4096, torch.float16)
    many = layer(x)
    for n_rows in (1, 4, 16, 26):
        assert (layer(x[:n_rows]) - many[:n_rows]).abs().max() <= 1e-3 * many.abs().max()


@pytest.mark.parametrize("mode", [4, 8])
def test_captured_text_of_a_quantized_pair_parts_only_at_a_tie(tmp_path: Path, mode: int) -> None:
    files = []
    for source, name in ((demo.BASE, "base"), (demo.HEAD, "head")):
        shutil.copytree(source, tmp_path / name)
        plan = plan_quantization(tmp_path / name, Recipe(mode, pad=True))
        files.append(quantize_checkpoint(plan))
    target = load_target(files[0], dtype=torch.bfloat16, device="cuda")
    drafter = EagleDrafter(load_head(files[1], target), target, MC_SIM)
    engines = [Engine(target), Engine(target, drafter, compiled=True)]
    prompts = [prompt(length, seed, 2048) for seed, length in enumerate((1, 12, 40, 100))]
    results = [e.generate(prompts, max_new_tokens=48, stop_ids=[]) for e in engines]
    gaps = first_gaps(target, prompts, [tokens_of(result) for result in results])
    assert all(gap < 0.25 for gap in gaps), gaps
