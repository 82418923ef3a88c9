"""What do the tests share? Tiny random models, slow twins, and drafters from perfect to hostile.

B batch  S new tokens  N tree nodes  P longest path, root included  C model dim  V vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fasteagle import demo
from fasteagle.cache import KVCache
from fasteagle.checkpoint import load_head, load_target
from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.draft.base import Drafter, last_of
from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.draft.none import NoDrafter
from fasteagle.engine import Engine
from fasteagle.model import RunBlock, Transformer, take
from fasteagle.request import Generation, Request
from fasteagle.sample import SamplingParams
from fasteagle.tree import MC_SIM_7B_63, DraftTree, StaticTree, causal_mask, chain, static_tree

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
VOCAB = 20
Module = TypeVar("Module", bound=torch.nn.Module)
MC_SIM = static_tree(MC_SIM_7B_63)
BUSHY = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


# ------------------------------------------------------------------------------------ models


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


def eagle(target: Transformer, tree: StaticTree = MC_SIM, **changes: object) -> EagleDrafter:
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


@pytest.fixture(scope="session")
def golden_pair() -> tuple[Transformer, EagleHead]:
    target = load_target(GOLDEN / "byte_pair" / "base", dtype=torch.float32)
    return target, load_head(GOLDEN / "byte_pair" / "eagle1", target)


@pytest.fixture(scope="session")
def demo_pair() -> tuple[Transformer, EagleHead]:
    target = load_target(demo.BASE, dtype=torch.float32)
    return target, load_head(demo.HEAD, target)


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(vocab) for _ in range(length)]


# ------------------------------------------------------------------------------------ running


def full_pass(target: Transformer, tokens: Sequence[int]) -> Tensor:
    """Hidden states `[1, S, C]` of a whole sequence in one pass on a fresh cache."""
    slots = torch.arange(len(tokens), device=target.device)[None]
    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.inference_mode():
        kv = target.new_cache(1, len(tokens))
        return target(ids, slots, slots, causal_mask(slots, len(tokens)), kv)[0]


@cache
def _plain(target: Transformer, tokens: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    sequence = list(tokens)
    for _ in range(n_tokens):
        sequence.append(int(target.logits(full_pass(target, sequence)[0, -1]).argmax()))
    return tuple(sequence[len(tokens) :])


def plain_decode(target: Transformer, tokens: Sequence[int], n_tokens: int) -> list[int]:
    """The slow twin: greedy decoding that computes the whole sequence again for every token."""
    return list(_plain(target, tuple(tokens), n_tokens))


def decode(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Requests of any mix of limits and sampling, as one batch."""
    rows = engine.rows(requests)
    for _ in engine.decode(rows):
        pass
    return [row.result() for row in rows]


def tokens_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def seeded(engine: Engine, seeds: Sequence[int], tokens: Sequence[int], **sampling: float) -> list:
    """One request a seed for the same prompt, with 3 new tokens unless told otherwise."""
    limit = int(sampling.pop("max_new_tokens", 3))
    return [
        engine.request(
            tokens,
            max_new_tokens=limit,
            sampling=SamplingParams(seed=seed, **sampling),
            stop_ids=[],
        )
        for seed in seeds
    ]


# ----------------------------------------------------------------------------------- drafters


class ScriptedDrafter:
    """A drafter without weights or cache; a subclass says which tree grows from a row."""

    name = "scripted"
    weights: nn.Module | None = None
    is_chain = False
    feature_layers: tuple[int, ...] = ()

    def __init__(self, n_nodes: int, n_path: int, vocab: int, seed: int = 0) -> None:
        self.n_nodes, self.n_path, self.vocab = n_nodes, n_path, vocab
        self.rng = random.Random(seed)

    def grow(self, row: int, length: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the nodes after the root, which is the row's token `length`."""
        raise NotImplementedError

    def new_cache(self, batch: int, n_slots: int) -> KVCache | None:
        return None

    def extend(
        self,
        features: Tensor,
        tokens: Tensor,
        start: Tensor,
        count: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> Tensor:
        return take(features, last_of(count))

    def propose(
        self,
        state: Tensor,
        root: Tensor,
        length: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> DraftTree:
        grown = [self.grow(row, n) for row, n in enumerate(length.tolist())]
        guesses = torch.tensor([guess for guess, _ in grown], dtype=torch.int64)
        parents = torch.tensor([[0, *parents] for _, parents in grown])
        return DraftTree(torch.cat((root, guesses), 1), parents)


class RandomDrafter(ScriptedDrafter):
    """Random tokens on a tree of another random shape in every round."""

    def grow(self, row: int, length: int) -> tuple[list[int], list[int]]:
        depth, parents, guesses = [0], [0], [-1]
        free = [self.rng.sample(range(self.vocab), self.vocab)]  # siblings carry distinct tokens
        for node in range(1, self.n_nodes):
            able = [n for n in range(node) if depth[n] < self.n_path - 1 and free[n]]
            parent = self.rng.choice(able)
            guesses.append(free[parent].pop())
            free.append(self.rng.sample(range(self.vocab), self.vocab))
            parents.append(parent)
            depth.append(depth[parent] + 1)
        return guesses[1:], parents[1:]


class OracleDrafter(ScriptedDrafter):
    """Knows every row's whole text `truth`, prompt included.

    The right token hides among `width - 1` wrong siblings. `fails(rng)` is the depth from which all
    is wrong: 1 is always wrong, n_path never.
    """

    def __init__(
        self,
        truth: Sequence[Sequence[int]],
        *,
        n_path: int = 6,
        width: int = 1,
        vocab: int = VOCAB,
        fails: Callable[[random.Random], int] | None = None,
    ) -> None:
        super().__init__(1 + (n_path - 1) * width, n_path, vocab)
        self.truth, self.width = truth, width
        self.fails = fails or (lambda rng: n_path)

    def grow(self, row: int, length: int) -> tuple[list[int], list[int]]:
        future = list(self.truth[row][length + 1 :]) if row < len(self.truth) else []
        future += [0] * self.n_path
        guesses: list[int] = []
        parents: list[int] = []
        parent, failed = 0, self.fails(self.rng)
        for depth in range(1, self.n_path):
            right = future[depth - 1]
            wrong = self.rng.sample([t for t in range(self.vocab) if t != right], self.width)
            at = self.rng.randrange(self.width)
            level = wrong if depth >= failed else [*wrong[:at], right, *wrong[at + 1 :]]
            parents += [parent] * self.width
            parent = len(guesses) + 1 + at
            guesses += level
        return guesses, parents


MakeDrafter = Callable[[Transformer, list[list[int]]], Drafter]

# Every kind of drafter for a target and the true texts; contract tests run over all of them.
DRAFTERS: dict[str, MakeDrafter] = {
    "none": lambda target, truth: NoDrafter(),
    "eagle": lambda target, truth: eagle(target),
    "eagle_chain": lambda target, truth: eagle(target, chain(3)),
    "random": lambda target, truth: RandomDrafter(12, 5, target.config.vocab_size),
    "oracle": lambda target, truth: OracleDrafter(truth),
    "always_wrong": lambda target, truth: OracleDrafter(truth, fails=lambda rng: 1),
    "wrong_once": lambda target, truth: OracleDrafter(truth, fails=lambda rng: rng.randint(1, 6)),
    "decoys": lambda target, truth: OracleDrafter(
        truth, width=3, fails=lambda rng: rng.randint(1, 6)
    ),
}
