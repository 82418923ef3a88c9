"""Plain decoding: a drafter whose tree is the root alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.draft.base import last_row
from fasteagle.model import RunBlock
from fasteagle.tree import DraftTree


class NoDrafter:
    """Drafts nothing, so that every round is one ordinary decoding step."""

    name = "none"
    n_nodes = 1
    n_path = 1
    feature_layers: tuple[int, ...] = ()

    def new_cache(self, batch: int, n_slots: int) -> KVCache | None:
        return None

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
        return features

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
        root = last_row(tokens, count)
        return DraftTree(root, torch.zeros_like(root))
