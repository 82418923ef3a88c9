"""Does the target compute the same however a text is cut? test_parity.py has what it computes.

S new tokens  T cache slots
"""

from __future__ import annotations

import random

import pytest
import torch
from conftest import EXPERTS, VOCAB, full_pass, prompt, tiny_target
from scripted_drafters import RandomDrafter
from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.config import RopeScaling
from fasteagle.model import RoPE, Transformer
from fasteagle.tree import ancestors, causal_mask, tree_mask

ROPES = {
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, original_max_positions=48),
    "yarn": RopeScaling("yarn", 4.0, original_max_positions=48),
}
# Rounding reaches 2e-5 here, as hidden states are about 1; a slot or mask that is off shows as 0.1.
CLOSE = {"atol": 5e-5, "rtol": 1e-5}
CONFIGS: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha": {"n_kv_heads": 4},
    "mqa": {"n_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 12},
    "experts": EXPERTS,
    **{kind: {"rope_scaling": scaling} for kind, scaling in ROPES.items()},
}


@pytest.fixture(params=CONFIGS)
def target(request: pytest.FixtureRequest) -> Transformer:
    return tiny_target(**CONFIGS[request.param])


@torch.inference_mode()
def feed(target: Transformer, cache: KVCache, tokens: list[int], start: int) -> Tensor:
    """Hidden states of the next `tokens` of a sequence whose first `start` are in the cache."""
    slots = start + torch.arange(len(tokens))[None]
    mask = causal_mask(slots, cache.n_slots)
    return target(torch.tensor([tokens]), slots, slots, mask, cache)[0]


@pytest.mark.parametrize("sizes", [[1] * 24, [8, 8, 8], [23, 1], [5, 1, 11, 7]], ids=str)
def test_decode_equals_prefill(target: Transformer, sizes: list[int]) -> None:
    tokens, cache, rows, start = prompt(24), target.new_cache(1, 32), [], 0
    for size in sizes:
        rows.append(feed(target, cache, tokens[start : start + size], start))
        start += size
    whole = full_pass(target, tokens)
    torch.testing.assert_close(torch.cat(rows, 1), whole, **CLOSE)
    logits, expected = target.logits(torch.cat(rows, 1)), target.logits(whole)
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_every_tree_row_equals_the_sequence_that_its_path_spells(
    target: Transformer, seed: int
) -> None:
    n_nodes, n_slots, lengths = 12, 48, [7, 20]
    drafter = RandomDrafter(n_nodes, 5, VOCAB, seed)
    prompts = [prompt(length, seed) for length in lengths]
    grown = [drafter.grow(row, length) for row, length in enumerate(lengths)]
    tokens = torch.tensor([[3, *guesses] for guesses, _ in grown])
    parents = torch.tensor([[0, *above] for _, above in grown])
    above, start = ancestors(parents, 5), torch.tensor(lengths)
    cache = target.new_cache(2, n_slots)
    for row, committed in enumerate(prompts):
        one = target.new_cache(1, n_slots)
        feed(target, one, committed, 0)
        cache.k[:, row], cache.v[:, row] = one.k[:, 0], one.v[:, 0]
    positions = start[:, None] + above.sum(-1) - 1
    mask = tree_mask(start, above, n_slots)
    hidden, features = target(tokens, positions, cache.slots(start, n_nodes), mask, cache)
    assert torch.equal(hidden, features)
    for row, committed in enumerate(prompts):
        for node in range(n_nodes):
            path = tokens[row][above[row, node]].tolist()
            expected = full_pass(target, [*committed, *path])[0, -1]
            torch.testing.assert_close(hidden[row, node], expected, **CLOSE)


def test_features_are_the_inputs_of_the_layers_asked_for() -> None:
    target = tiny_target(n_layers=3)
    tokens, inputs = prompt(9), []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        for layer in target.layers
    ]
    slots = torch.arange(9)[None]
    mask, cache = causal_mask(slots, 9), target.new_cache(1, 9)
    _, features = target(torch.tensor([tokens]), slots, slots, mask, cache, feature_layers=(0, 2))
    for hook in hooks:
        hook.remove()
    assert torch.equal(features, torch.cat((inputs[0], inputs[2]), -1))


def test_the_scalings_differ_from_none() -> None:
    # Else the laws above could hold because nobody scales.
    plain = RoPE(8, 10000.0, None)
    for scaling in ROPES.values():
        assert not torch.allclose(plain.inv_freq, RoPE(8, 10000.0, scaling).inv_freq)


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        tiny_target(rope_scaling=RopeScaling("dynamic", 2.0))


def test_building_on_the_meta_device_keeps_the_frequencies() -> None:
    config = tiny_target(rope_scaling=ROPES["yarn"]).config
    with torch.device("meta"):
        empty = Transformer(config)
    empty.load_state_dict(tiny_target(rope_scaling=ROPES["yarn"]).state_dict(), assign=True)
    tokens = random.Random(0).choices(range(VOCAB), k=12)
    whole = full_pass(tiny_target(rope_scaling=ROPES["yarn"]), tokens)
    assert torch.equal(full_pass(empty, tokens), whole)
