"""Panels hold the same weights in another order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_target

from fasteagle import demo, panel
from fasteagle.checkpoint import load_head, load_target
from fasteagle.engine import Engine
from fasteagle.model import Linear, pack


def test_packing_keeps_every_weight() -> None:
    weight = torch.randn(48, 7)
    packed = panel.pack(weight)
    assert packed.shape == (3, 7, 16)
    assert packed.is_contiguous()
    assert packed[1, 2, 5] == weight[16 + 5, 2]
    assert torch.equal(panel.unpack(packed), weight)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 19])
def test_a_traced_product_equals_linear(rows: int) -> None:
    """Groups of eight rows and a rest, in one full graph."""
    x, weight = torch.randn(1, rows, 24), torch.randn(32, 24)
    traced = torch.compile(panel.product, fullgraph=True, dynamic=False, backend="eager")
    y = traced(x, panel.pack(weight))
    assert y.shape == (1, rows, 32)
    torch.testing.assert_close(y, F.linear(x, weight))
    torch.testing.assert_close(panel.product(x, panel.pack(weight)), F.linear(x, weight))


@pytest.mark.parametrize("short", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, panel.LIBRARY_ROWS])
def test_a_weight_that_fits_sixteen_bits_is_stored_so_and_multiplied_the_same(
    short: torch.dtype, rows: int
) -> None:
    """Half the bytes, the very same values, sums in float32."""
    scale = 1.0 if short == torch.float16 else 2.0**20  # past what float16 holds
    weight, x = (scale * torch.randn(64, 24)).to(short).float(), torch.randn(1, rows, 24)
    packed = panel.pack(weight)
    assert packed.dtype == short
    assert torch.equal(panel.unpack(packed).float(), weight)
    torch._dynamo.reset()
    traced = torch.compile(panel.product, fullgraph=True, dynamic=False, backend="eager")
    y = traced(x, packed)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("value", [1 + 2.0**-20, 1e-30 * 3.1, 65504 * 3.01])
def test_one_value_that_does_not_fit_keeps_all_bits(value: float) -> None:
    weight = torch.ones(16, 2)
    weight[3, 1] = value
    packed = panel.pack(weight)
    assert packed.dtype == torch.float32
    assert torch.equal(panel.unpack(packed), weight)


def test_rows_can_be_looked_up() -> None:
    weight, tokens = torch.randn(64, 5), torch.tensor([[0, 63], [17, 16]])
    found = panel.lookup(panel.pack(weight), tokens, torch.float32)
    assert torch.equal(found, weight[tokens])
    short = weight.half().float()  # in 16 bits when packed
    found = panel.lookup(panel.pack(short), tokens, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, short[tokens])


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.randn(17, 4), "no whole panels"),
        (torch.randn(16, 4, dtype=torch.float64), "not a dtype of models"),
        (torch.randn(1, 4, 16), "packed already"),
        (torch.empty(16, 4, device="meta"), "not on the CPU"),
    ],
)
def test_what_cannot_be_packed_stays(weight: torch.Tensor, why: str) -> None:
    assert not panel.packable(weight), why
    layer = Linear(4, 4)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    pack(layer)
    assert layer.weight.shape == weight.shape


@pytest.mark.parametrize("tied", [False, True])
def test_only_a_compiled_cpu_engine_packs_and_eager_can_go_on(tied: bool) -> None:
    target = tiny_target(tie_embeddings=tied, vocab_size=64)
    before = Engine(target).generate([[1, 2, 3]], max_new_tokens=12)[0]
    assert target.layers[0].self_attn.o_proj.weight.dim() == 2
    Engine(target, compiled=True)
    assert target.layers[0].self_attn.o_proj.weight.dim() == 3
    assert (target.embed_tokens.weight.dim() == 3) == tied
    assert Engine(target).generate([[1, 2, 3]], max_new_tokens=12)[0].tokens == before.tokens


def test_a_head_that_comes_after_packing_still_borrows_the_embedding() -> None:
    target = load_target(demo.BASE, dtype=torch.float32)
    before = target.embed_tokens.table.clone()
    pack(target)
    after = target.embed_tokens.table
    assert after.dtype == torch.float32
    assert torch.equal(after, before)
    assert not load_head(demo.HEAD, target).config.own_embedding


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_to_the_library_where_it_is_fast(
    slow: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panel, "SLOW_IN_SHORT", slow)
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    weight, x = torch.randn(16, 8).to(dtype), torch.randn(panel.LIBRARY_ROWS, 8).to(dtype)
    y = torch.compile(panel.product, fullgraph=True, backend=look)(x, panel.pack(weight))
    torch.testing.assert_close(y, F.linear(x, weight))
    by_library = any("linear" in str(node.target) for node in graphs[0].graph.nodes)
    assert by_library == (dtype == torch.float32 or not slow)
