"""Which drafters do the laws run over? All rows of the table, variants, and scripted ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from scripted_drafters import OracleDrafter, RandomDrafter
from tiny_models import BUSHY, MC_SIM, eagle, randomize, tiny_head, tiny_target

from fasteagle.draft.base import Drafter
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.draft.kinds import DRAFTERS as KINDS
from fasteagle.draft.kinds import Options
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.tree import DynamicTree, chain

MakeDrafter = Callable[[Transformer, list[list[int]]], Drafter]


@cache
def tiny_weights(kind: str, target: Transformer) -> torch.nn.Module | None:
    """Random weights of a row of KINDS for a target."""
    row = KINDS[kind]
    if row.module is None or row.config is None:
        return None
    return randomize(row.module(row.config(target.config)), 1).to(target.device)


def tiny_drafter(kind: str, target: Transformer, **options: object) -> Drafter:
    """A drafter of a row of KINDS."""
    return KINDS[kind].drafter(tiny_weights(kind, target), target, Options(**options))


# Options of kinds whose usual trees are deeper than the rooms of these tests.
SMALL: dict[str, dict[str, object]] = {
    "lookup": {"lookup": 5},
    "lookahead": {"window": 3, "ngram": 4, "guesses": 3},
    "hybrid": {"tree": BUSHY, "lookup": 3},
}


def of_kind(kind: str) -> MakeDrafter:
    return lambda target, truth: tiny_drafter(kind, target, **SMALL.get(kind, {}))


SCRIPTED: dict[str, MakeDrafter] = {
    "random": lambda target, truth: RandomDrafter(12, 5, target.config.vocab_size),
    "oracle": lambda target, truth: OracleDrafter(truth),
    "always_wrong": lambda target, truth: OracleDrafter(truth, fails=lambda rng: 1),
    "wrong_once": lambda target, truth: OracleDrafter(truth, fails=lambda rng: rng.randint(1, 6)),
    "decoys": lambda target, truth: OracleDrafter(
        truth, width=3, fails=lambda rng: rng.randint(1, 6)
    ),
}
VARIANTS: dict[str, MakeDrafter] = {
    "eagle_chain": lambda target, truth: eagle(target, chain(3)),
    "eagle_pruned": lambda target, truth: EagleDrafter(
        tiny_head(target), target, MC_SIM, torch.arange(0, target.config.vocab_size, 2)
    ),
    "eagle_dynamic": lambda target, truth: eagle(target, DynamicTree(12, 3, 4)),
    "eagle3_dynamic": lambda target, truth: tiny_drafter(
        "eagle3", target, tree=DynamicTree(12, 3, 4)
    ),
    "medusa_dynamic": lambda target, truth: tiny_drafter(
        "medusa", target, tree=DynamicTree(12, 3, 4)
    ),
    "standalone_bushy": lambda target, truth: tiny_drafter("standalone", target, tree=BUSHY),
    "standalone_dynamic": lambda target, truth: tiny_drafter(
        "standalone", target, tree=DynamicTree(12, 3, 4)
    ),
    "lookahead_least": lambda target, truth: tiny_drafter(
        "lookahead", target, window=1, ngram=2, guesses=1
    ),
    "hybrid_dynamic": lambda target, truth: tiny_drafter(
        "hybrid", target, tree=DynamicTree(12, 3, 4), lookup=2
    ),
}
# Every kind of drafter for a target and the true texts; contract tests run over all of them.
DRAFTERS = {kind: of_kind(kind) for kind in KINDS} | VARIANTS | SCRIPTED
# For the laws of compiled steps.
DRAFTS: dict[str, Callable[[Transformer], Drafter | None]] = {
    kind: lambda target, kind=kind: tiny_drafter(kind, target) for kind in KINDS
} | {
    "eagle": lambda target: eagle(target, BUSHY),
    "eagle3": lambda target: tiny_drafter("eagle3", target, tree=BUSHY),
    "eagle_dynamic": lambda target: eagle(target, DynamicTree(6, 2, 2)),
    "experts": lambda target: None,
    "medusa": lambda target: tiny_drafter("medusa", target, tree=DynamicTree(6, 2, 2)),
    "standalone": lambda target: tiny_drafter("standalone", target, tree=chain(2)),
    "lookup": lambda target: tiny_drafter("lookup", target, lookup=4),
    "lookahead": lambda target: tiny_drafter("lookahead", target, window=2, ngram=3, guesses=2),
    "hybrid": lambda target: tiny_drafter("hybrid", target, tree=chain(2), lookup=2),
}
EXPERTS = {"n_experts": 4, "n_experts_per_token": 2}


def short_engine(kind: str, *, compiled: bool, batch: int = 1, **changes: object) -> Engine:
    """An engine with little room, so that few cache buckets hold all there can be."""
    changes |= {**EXPERTS, "n_layers": 1} if kind == "experts" else {}
    target = tiny_target(max_positions=48, **changes)
    sizes = {"batch": batch, "prefill_chunk": 8}
    return Engine(target, DRAFTS[kind](target), compiled=compiled, **sizes)
