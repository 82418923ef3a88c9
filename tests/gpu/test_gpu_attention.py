"""On a GPU: is tree attention torch's attention, also in a graph, and keep in one kernel keep?"""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import MC_SIM, first_gaps, prompt, tokens_of
from torch import Tensor

from fasteagle import demo, tree_attention
from fasteagle.attention_trial import Inputs, Shape, noise
from fasteagle.cache import KVCache
from fasteagle.checkpoint import load_head, load_target
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.tree import causal_mask
from fasteagle.tree_attention import VARIABLE, attend_tree, prepare, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

CUDA = torch.device("cuda", 0)
ERROR = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
MODELS = [
    (1, 32, 1, 128),
    (1, 8, 4, 128),
    (3, 4, 7, 64),
    (1, 2, 1, 256),
    (2, 3, 2, 80),
    (16, 32, 1, 64),
]


def spoilt(inputs: Inputs, live: int) -> Inputs:
    """The same with NaN in keys and values that no row sees."""
    inputs.k[:, :, live:] = torch.nan
    inputs.v[:, :, live:] = torch.nan
    return inputs


def error(inputs: Inputs, live: int) -> float:
    """The distance of ours to float32 over the live slots, by its norm."""
    q, k, v, bias = (t.float() for t in inputs[:4])
    wanted = reference(q, k[:, :, :live], v[:, :, :live], bias[..., :live], inputs.newest)
    found = attend_tree(*spoilt(inputs, live)).float()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_tree_attention_is_attention_over_live_slots(
    model: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch, heads, group, dim = model
    for tokens in (1, 26, 64):  # a kernel is compiled for each, and for most of the slots
        for n_slots in (48, 1000, 4096):
            shape = Shape(batch, heads, tokens * group, dim, n_slots, dtype, CUDA)
            for live in (1, n_slots // 3, n_slots):
                found = error(noise(shape, live=live), live)
                assert found < ERROR[dtype], f"{tokens} tokens, {live} of {n_slots} slots"


@pytest.mark.parametrize("rows", [6, 26])
def test_a_captured_call_follows_its_inputs(rows: int) -> None:
    inputs = noise(Shape(1, 8, rows, 128, 1024, torch.bfloat16, CUDA), live=1024)
    torch.ops.fasteagle.tree_attention(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.fasteagle.tree_attention(*inputs)
    for live in (1024, 40, 700):
        inputs.newest.fill_(live - 1)
        inputs.bias[..., live:] = -torch.inf
        inputs.bias[..., :live] = 0
        graph.replay()
        assert torch.equal(found, attend_tree(*inputs))  # equal calls, equal bits
        wanted = reference(*inputs).float()
        assert (found.float() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", [*ERROR, torch.float32], ids=str)
@pytest.mark.parametrize(("n_path", "dim"), [(6, 128), (9, 80), (64, 128), (33, 256)])
def test_keep_in_one_kernel_is_gather_and_scatter(
    n_path: int, dim: int, dtype: torch.dtype
) -> None:
    n_slots = 3 * n_path + 9
    caches = [KVCache((8, 3, 8, n_slots, dim), dtype=dtype, device=CUDA) for _ in range(2)]
    caches[0].k.normal_()
    caches[0].v.normal_()
    caches[1].k.copy_(caches[0].k)
    caches[1].v.copy_(caches[0].v)
    nodes = 1 + torch.randperm(2 * n_path)[: n_path - 1].sort().values
    path = torch.zeros(3, n_path, dtype=torch.int64)
    path[0, 1:] = path[2, 1:] = nodes
    start, path = torch.tensor([1, 3, n_slots - 4], device=CUDA), path.to(CUDA)
    for cache, mode in zip(caches, ("eager", "captured"), strict=True):
        cache.keep(start, path, mode=mode)
    # Padded rows land in the last slot in any order; nothing reads it.
    assert torch.equal(caches[0].k[..., :-1, :], caches[1].k[..., :-1, :])
    assert torch.equal(caches[0].v[..., :-1, :], caches[1].v[..., :-1, :])


@pytest.mark.parametrize("model", MODELS[:3], ids=str)
def test_shapes_are_measured_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, model: tuple[int, int, int, int]
) -> None:
    batch, heads, group, dim = model
    shape = Shape(batch, heads, 26 * group, dim, 512, torch.bfloat16, CUDA)
    monkeypatch.delenv(VARIABLE, raising=False)
    before = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = prepare(shape)
        monkeypatch.setenv(VARIABLE, "triton")
        assert prepare(shape), "it compiles here, and computes what torch does"
    print(f"{shape}: {'ours' if ours else 'torch'}")  # noqa: T201
    assert torch.equal(torch.cuda.get_rng_state(), before), "the caller's random numbers moved"


def hidden_states(word: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the embedded base makes of 26 rows after a prompt, with one attention."""
    monkeypatch.setenv(VARIABLE, word)
    target = load_target(demo.BASE, dtype=torch.bfloat16, device="cuda")
    tokens = torch.tensor([prompt(90, 0, 2048)], device="cuda")
    cache = target.new_cache(1, 128)
    with torch.inference_mode():
        for rows in (torch.arange(64), torch.arange(64, 90)):
            slots = rows[None].cuda()
            mask = causal_mask(slots, 128)
            hidden, _ = target(tokens[:, rows[0] : rows[-1] + 1], slots, slots, mask, cache)
    return hidden.float()


def test_hidden_states_of_a_model_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found = (hidden_states(word, monkeypatch) for word in ("sdpa", "triton"))
    distance = (found - wanted).norm() / wanted.norm()
    assert 0 < distance < 0.03, "0 would mean that one of them was not taken"


def test_captured_texts_part_only_at_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(demo.BASE, dtype=torch.bfloat16, device="cuda")
    prompts = [prompt(length, seed, 2048) for seed, length in enumerate((1, 12, 40, 100))]
    texts = []
    for word in ("sdpa", "triton"):
        monkeypatch.setenv(VARIABLE, word)
        drafter = EagleDrafter(load_head(demo.HEAD, target), target, MC_SIM)
        engine = Engine(target, drafter, compiled=True)
        texts.append(tokens_of(engine.generate(prompts, max_new_tokens=48, stop_ids=[])))
    taken = {
        shape.rows for (force, shape), ours in tree_attention.winners.items() if ours and force
    }
    assert 2 * MC_SIM.n_nodes in taken  # the base has two query heads a kv head
    gaps = first_gaps(target, prompts, texts)
    assert all(gap < 0.25 for gap in gaps), gaps
