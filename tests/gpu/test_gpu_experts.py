"""On a GPU: do experts compute what they do on the CPU, and does a round with them never wait?"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import EXPERTS, MC_SIM, eagle, first_gaps, prompt, tiny_target, tokens_of
from test_experts import by_hand, certain, layer_of, poisoned, quantized, rows_of
from test_gpu import in_mid_text, waits_are_errors
from torch import Tensor

from fasteagle.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

DTYPES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("n_rows", [1, 2, 26, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_experts_are_those_of_the_cpu(dtype: torch.dtype, n_rows: int) -> None:
    layer, x = layer_of(dim=64, intermediate_size=96).to(dtype), rows_of(n_rows, dim=64).to(dtype)
    wanted = by_hand(layer, x)
    moved = copy.deepcopy(layer).cuda()
    for product in (moved.gate_up_proj, moved.down_proj):
        product.choose_kernel()
        assert product.picks == (dtype != torch.float32)
    found = moved(x.cuda()).double().cpu()
    clear = certain(layer, x)
    assert int(clear.sum()) > 0.95 * n_rows
    assert error(found[:, clear], wanted[:, clear]) < DTYPES[dtype]
    if n_rows == 1:
        poisoned(moved, x.cuda())
        assert torch.equal(moved(x.cuda()).double().cpu(), found)  # not so for NaN


@pytest.mark.parametrize("n_rows", [1, 26, 130])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts_are_near_the_weights_of_their_codes(bits: int, n_rows: int) -> None:
    narrow, exact = quantized(bits, keep=False, device="cuda")
    x = rows_of(n_rows, dim=64).bfloat16()
    wanted = exact(x.float())
    found = narrow(x.cuda()).float().cpu()
    clear = certain(exact, x)
    assert error(found[:, clear], wanted[:, clear]) < 0.02


def test_a_captured_round_with_experts_gives_the_eager_text_and_never_waits() -> None:
    target = copy.deepcopy(tiny_target(**EXPERTS)).to("cuda")
    prompts = [prompt(length) for length in (5, 17, 40)]
    engines = [
        Engine(target, eagle(target, MC_SIM), compiled=compiled, prefill_chunk=16)
        for compiled in (False, True)
    ]
    texts = [
        tokens_of(engine.generate(prompts, max_new_tokens=32, stop_ids=[])) for engine in engines
    ]
    assert all(gap < 1e-3 for gap in first_gaps(target, prompts, texts))
    key = in_mid_text(engines[1])
    with torch.inference_mode(), waits_are_errors():
        engines[1].steps[key]()
