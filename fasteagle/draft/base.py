"""What must a drafter do? The protocol that the engine calls.

    B batch  S new tokens  P longest path, root included  N tree nodes  F feature dim  T cache slots

A drafter never decides what is emitted, so it can only cost speed, not correctness, as long as it
keeps one promise: **siblings of a tree carry distinct tokens**.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.model import RunBlock
from fasteagle.tree import DraftTree


class Drafter(Protocol):
    name: str
    n_nodes: int  # N, the root included
    n_path: int  # P
    feature_layers: tuple[
        int, ...
    ]  # target layers whose inputs are the features; () is the last hidden

    def new_cache(self, batch: int, n_slots: int) -> KVCache | None:
        """The drafter's own cache for `n_slots` positions, or None if it keeps no state."""
        ...

    def extend(
        self,
        features: Tensor,
        tokens: Tensor,
        start: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> Tensor:
        """Take in a chunk of the sequence: features `[B, S, F]` of positions `start [B]` onward and
        tokens `[B, S]`, each the one *after* its feature. Returns states `[B, S, C]` for `propose`.
        """
        ...

    def propose(
        self,
        states: Tensor,
        tokens: Tensor,
        start: Tensor,
        count: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> DraftTree:
        """Grow a tree after the `count [B]` valid rows of an extended chunk.

        states, tokens and start are what `extend` returned and was given; the last valid token is
        the root. Attention reads the first `n_slots` slots. No host synchronization.
        """
        ...


def last_row(x: Tensor, count: Tensor) -> Tensor:
    """Row `count - 1` of x `[B, S, ...]`, kept as `[B, 1, ...]`; row 0 where count is 0."""
    index = (count - 1).clamp(min=0).view(-1, 1, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, 1, *x.shape[2:]))
