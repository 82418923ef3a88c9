"""Which tiny random models do the tests share?

V vocabulary
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import TypeVar

import torch
from hypothesis import strategies as st
from scripted_drafters import VOCAB

from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.model import Transformer
from fasteagle.tree import MC_SIM_7B_63, Tree, static_tree

Module = TypeVar("Module", bound=torch.nn.Module)
CPU = torch.device("cpu")
MC_SIM = static_tree(MC_SIM_7B_63)
BUSHY = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


@cache
def tiny_target(seed: int = 0, **changes: object) -> Transformer:
    """A random float32 target whose greedy text wanders; one instance for equal arguments."""
    config = ModelConfig(
        "LlamaForCausalLM",
        vocab_size=VOCAB,
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_positions=192,
    )
    return randomize(Transformer(replace(config, **changes)), seed)


@cache
def tiny_head(target: Transformer, seed: int = 1, **changes: object) -> EagleHead:
    """A random head of the target's shape."""
    c = target.config
    config = DraftConfig(
        "eagle",
        vocab_size=c.vocab_size,
        dim=c.dim,
        n_layers=1,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=48,
    )
    return randomize(EagleHead(replace(config, **changes)), seed).to(target.device)


def randomize(module: Module, seed: int) -> Module:
    """Strong attention and weak embeddings, so that the text depends on all that came before."""
    gains = {"embed": 0.1, "attn": 3.0, "mlp": 1.0}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data.copy_(1 + 0.2 * noise)
        else:
            gain = next((g for part, g in gains.items() if part in name), 1.5)
            weight.data.copy_(noise * (gain / weight.shape[-1] ** 0.5))
    return module.eval().requires_grad_(False)


def eagle(target: Transformer, tree: Tree = MC_SIM, **changes: object) -> EagleDrafter:
    return EagleDrafter(tiny_head(target, **changes), target, tree)


@st.composite
def tree_choices(draw: st.DrawFn, max_nodes: int = 14, max_rank: int = 3) -> list[list[int]]:
    """JSON paths of a random valid tree, in any order; ranks may have gaps."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, max_nodes))):
        path = (*draw(st.sampled_from(paths)), draw(st.integers(0, max_rank)))
        if path not in paths:
            paths.append(path)
    return draw(st.permutations([list(path) for path in paths[1:]]))


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(vocab) for _ in range(length)]
