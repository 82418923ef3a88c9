"""Is a round of a quantized model one graph, without recompiles, and with the eager text?

Graphs run eagerly here (test_compile.py), so texts are equal to the bit; that generated code agrees
is tested through generate.py in test_quantized_pairs.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import prompt, tiny_head, tiny_target, tokens_of
from test_compile import n_graphs, nothing_is_compiled, regional, traced  # noqa: F401

from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.fill import quantize_
from fasteagle.quant.linear import QuantLinear
from fasteagle.tree import chain

KINDS = {"int8": {"bits": 8}, "int4": {"bits": 4, "lm_head_bits": 8}}


def engine_of(kind: str, *, compiled: bool, n_layers: int = 2, vocab: int | None = None) -> Engine:
    target = tiny_target(max_positions=64, n_layers=n_layers, dim=32)
    pair = [copy.deepcopy(part) for part in (target, tiny_head(target))]
    for weight in [weight for part in pair for weight in part.parameters()]:
        weight.data = weight.data.bfloat16()  # RoPE's frequencies stay float32
    target, head = (quantize_(part, keep_dense=True, **KINDS[kind]) for part in pair)
    ids = None if vocab is None else torch.arange(0, 2 * vocab, 2)
    drafter = EagleDrafter(head, target, chain(3), ids)
    return Engine(target, drafter, compiled=compiled, prefill_chunk=16)


def texts(engine: Engine) -> list[list[int]]:
    prompts = [prompt(length) for length in (3, 20)]
    return tokens_of([engine.generate([p], max_new_tokens=16, stop_ids=[])[0] for p in prompts])


@pytest.mark.parametrize("form", ["traced", "regional"])
def test_a_quantized_round_is_one_graph(form: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(form)
    engine, eager = (engine_of("int4", compiled=compiled, n_layers=1) for compiled in (True, False))
    before = n_graphs()
    engine.warm_up()
    if form == "traced":
        assert n_graphs() - before == 3 * len(engine.buckets)
    with nothing_is_compiled():
        assert texts(engine) == texts(eager)


def test_one_compiled_block_serves_all_quantized_layers(regional: None) -> None:  # noqa: F811
    counts = []
    for n_layers in (2, 4):
        before = n_graphs()
        engine_of("int4", compiled=True, n_layers=n_layers).warm_up(longest=8)
        counts.append(n_graphs() - before)
    assert counts[0] == counts[1] > 0


def test_a_draft_vocabulary_takes_rows_of_a_quantized_lm_head() -> None:
    pruned, whole = engine_of("int8", compiled=False, vocab=8), engine_of("int8", compiled=False)
    assert isinstance(pruned.drafter, EagleDrafter)
    rows = pruned.drafter.draft_lm_head
    assert isinstance(rows, QuantLinear)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wanted = whole.target.logits(x)[:, :16:2]
    assert torch.allclose(rows(x).float(), wanted.float(), rtol=1e-2, atol=1e-2)
    assert texts(pruned) == texts(whole)
