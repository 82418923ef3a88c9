"""What must a drafter do? The protocol that the engine calls.

    B batch  S new tokens  P longest path, root included  N tree nodes  F feature dim  T cache slots

A drafter never decides what is emitted, so it can only cost speed, not correctness, as long as it
keeps one promise: **siblings of a tree carry distinct tokens**.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from fasteagle.cache import KVCache
from fasteagle.model import RunBlock
from fasteagle.tree import DraftTree


class Drafter(Protocol):
    name: str
    weights: nn.Module | None  # its own
    n_nodes: int  # N, the root included
    n_path: int  # P
    is_chain: bool  # every tree is one path: node n follows node n - 1
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
        count: Tensor,
        *,
        cache: KVCache | None,
        n_slots: int,
        run: RunBlock,
    ) -> Tensor:
        """Take in a chunk of the sequence: features `[B, S, F]` of positions `start [B]` onward and
        tokens `[B, S]`, each the one *after* its feature; `count [B]` rows are valid. Returns the
        state `[B, 1, C]` of the last valid row. A row of count 0 is in the middle of its text
        while others take in a prompt: what is kept for it must stay as it is.
        """
        ...

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
        """Grow a tree on `root [B, 1]`, the token at position `length [B]`.

        state is what `extend` returned for the row before. Attention reads the first `n_slots`
        slots. No host synchronization.
        """
        ...


def last_of(count: Tensor) -> Tensor:
    """Which row is the last of `count [B]` valid ones: `[B, 1]`; row 0 where there is none."""
    return (count - 1).clamp(min=0)[:, None]
