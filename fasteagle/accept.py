"""How much of the draft does the target agree with?

    B batch  N tree nodes  P longest path, root included

The target chose one token after every node. A node survives if every node on its path carries the
token that its parent chose; the deepest survivor ends the accepted path and what the target chose
there is the bonus token. Every emitted token is then a choice of the target, made without looking
at the draft, so the output has the target's distribution for any drafter (the deterministic-draft
case of speculative sampling, arXiv 2211.17192, with the test replaced by equality).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.tree import DraftTree


class Verdict(NamedTuple):
    path: Tensor  # [B, P] accepted nodes, root first; entries past `n_accepted` are 0
    n_accepted: Tensor  # [B] accepted nodes, root included
    emitted: Tensor  # [B, P] accepted drafts then the bonus: `n_accepted` tokens, then padding


def accept(tree: DraftTree, above: Tensor, chosen: Tensor, *, n_path: int) -> Verdict:
    """Follow the target's choices `chosen [B, N]` down the tree; above is `ancestors`' `[B, N, N]`.

    0 +- 1 - 3     tokens [a, b, c, d], the target chose b after a, d after b, e after d:
      `- 2         path [0, 1, 3], n_accepted 3, emitted [b, d, e]
    """
    root = torch.arange(tree.tokens.shape[1], device=chosen.device) == 0
    match = (chosen.gather(1, tree.parents) == tree.tokens) | root
    alive = (match[:, None, :] | ~above).all(-1)  # [B, N]
    depth = above.sum(-1) - 1
    best = torch.where(alive, depth, -1).argmax(1, keepdim=True)  # [B, 1]
    count = depth.gather(1, best) + 1
    on_path = above.gather(1, best[:, :, None].expand(-1, -1, depth.shape[1]))  # [B, 1, N]
    steps = torch.arange(n_path, device=chosen.device)
    nodes = torch.arange(depth.shape[1], device=chosen.device)
    here = on_path & (depth[:, None, :] == steps[None, :, None])  # [B, P, N]: one node a step
    path = torch.where(here, nodes, 0).sum(-1)
    emitted = torch.where(
        steps < count - 1, tree.tokens.gather(1, path).roll(-1, 1), chosen.gather(1, best)
    )
    return Verdict(path, count[:, 0], emitted)
