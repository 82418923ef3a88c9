"""Plain decoding: a drafter whose tree is the root alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasteagle.cache import KVCache
from fasteagle.draft.base import last_of
from fasteagle.model import RunBlock, take
from fasteagle.tree import DraftTree


class NoDrafter:
    """Drafts nothing, so that every round is one ordinary decoding step."""

    name = "none"
    weights: nn.Module | None = None
    n_nodes = 1
    n_path = 1
    is_chain = True
    feature_layers: tuple[int, ...] = ()

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
        return DraftTree(root, torch.zeros_like(root))
