"""What does each part of a round cost when it runs alone? And rounds without compiled prompts.

    B batch  N tree nodes  P longest path  F feature dim  C model dim

The same functions that fasteagle.rounds strings together, each built as a step of its own. Between
them the values pass through static tensors, as everything else that a captured step reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.accept import Verdict, accept
from fasteagle.compile import Compiler, Step
from fasteagle.draft.base import Room
from fasteagle.engine import Engine
from fasteagle.model import run_block, take
from fasteagle.rounds import news_of_round, rehearsal
from fasteagle.sample import choose
from fasteagle.tree import ancestors, tree_mask


class Between(NamedTuple):
    """What one part leaves for the next."""

    chosen: Tensor  # [B, N] the target's choice after every node
    features: Tensor  # [B, N, F]
    path: Tensor  # [B, P]
    n_accepted: Tensor  # [B]
    emitted: Tensor  # [B, P]


def separate(
    engine: Engine,
    n_slots: int,
    names: Sequence[str] = ("verify", "settle", "draft"),
    *,
    sampled: bool = False,
) -> dict[str, Step]:
    """Steps "verify" (target, lm_head, choice), "settle" (accept, move the cache), "check" (both in
    one) and "draft", by name; sampled: the choice is a draw, which sorts the vocabulary.
    """
    state, drafter, target = engine.state, engine.drafter, engine.target
    batch, nodes, path = engine.batch, drafter.n_nodes, drafter.n_path

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=target.device)

    width = target.config.dim * max(1, len(drafter.feature_layers))
    between = Between(
        chosen=empty(batch, nodes),
        features=torch.randn(batch, nodes, width).to(target.device, target.dtype),
        path=empty(batch, path),
        n_accepted=torch.ones_like(state.length),
        emitted=empty(batch, path),
    )

    def make(name: str, compiler: Compiler) -> Step:
        setting = Setting(engine, between, n_slots, compiler, sampled)
        parts = [part(setting) for part in MAKERS[name]]

        def run() -> None:
            for part in parts:
                part()

        return run

    changed, steps = [*state.tensors(), *between], {}
    for name in names:
        first = rehearsal(target, partial(make, name, engine.compiler.off))
        step = make(name, engine.compiler)
        steps[name] = engine.compiler.step(step, f"{name}_alone", changed, first)
    return steps


class Setting(NamedTuple):
    """What a part is built for."""

    engine: Engine
    between: Between
    n_slots: int
    compiler: Compiler  # the engine's, or one that is off
    sampled: bool


def verify_part(setting: Setting) -> Step:
    engine, between, n_slots, compiler, sampled = setting
    state, target, cache = engine.state, engine.target, engine.builder.cache
    n_path, layers = engine.drafter.n_path, engine.drafter.feature_layers
    run = compiler.part(run_block, f"verify_alone_block_{n_slots}")

    def pick(hidden: Tensor, positions: Tensor) -> Tensor:
        return choose(target.logits(hidden), positions, state.knobs, sampled=sampled)

    pick = compiler.part(pick, f"pick_alone_{n_slots}")

    def verify() -> None:
        above = ancestors(state.tree.parents, n_path)
        positions = state.length[:, None] + above.sum(-1) - 1
        slots = cache.slots(state.length, positions.shape[1])
        mask = tree_mask(state.length, above, n_slots)
        hidden, features = target(
            state.tree.tokens, positions, slots, mask, cache, feature_layers=layers, run=run
        )
        between.chosen.copy_(pick(hidden, positions))
        between.features.copy_(features)

    return verify


def settle_part(setting: Setting) -> Step:
    engine, between, n_slots, compiler, _ = setting
    state, n_path, mode = engine.state, engine.drafter.n_path, compiler.mode
    cache, is_chain = engine.builder.cache, engine.drafter.is_chain
    judge = compiler.part(accept, f"judge_alone_{n_slots}")

    def settle() -> None:
        above = ancestors(state.tree.parents, n_path)
        verdict = judge(state.tree, above, between.chosen, n_path=n_path)
        if not is_chain:
            cache.keep(state.length, verdict.path, mode=mode)
        for kept, new in zip(between[2:], verdict, strict=True):
            kept.copy_(new)

    return settle


def draft_part(setting: Setting) -> Step:
    engine, between, n_slots, compiler, _ = setting
    state, drafter = engine.state, engine.drafter
    room = Room(engine.builder.memory, n_slots, run_block)

    def grow() -> None:
        chosen, features, *verdict = between
        news = news_of_round(state, features, chosen, Verdict(*verdict))
        row, root = drafter.extend(news, room), take(news.following, news.last)
        tree = drafter.propose(row, root, state.length + news.n_valid, room)
        state.tree.tokens.copy_(tree.tokens)
        state.tree.parents.copy_(tree.parents)

    return compiler.part(grow, f"draft_alone_{n_slots}")


MAKERS: dict[str, Sequence[Callable[[Setting], Step]]] = {
    "verify": [verify_part],
    "settle": [settle_part],
    "check": [verify_part, settle_part],
    "draft": [draft_part],
}


def eager_prompts(engine: Engine, *, sampled: bool) -> None:
    """Feed prompts to an engine without compiling what that takes; its rounds stay as they are."""
    for n_slots in engine.buckets:
        for kind, draws in (("extend", False), ("prefill", sampled)):
            key = (kind, n_slots, draws)
            engine.steps[key] = engine.builder.build(*key, engine.compiler.off)
