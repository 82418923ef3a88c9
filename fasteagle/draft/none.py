"""Plain decoding: a drafter whose tree is the root alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fasteagle.draft.base import Drafter, Room
from fasteagle.tree import DraftTree


class NoDrafter(Drafter):
    """Drafts nothing, so that every round is one ordinary decoding step."""

    name = "none"
    n_nodes = 1
    n_path = 1
    is_chain = True

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        return DraftTree(root, torch.zeros_like(root))
