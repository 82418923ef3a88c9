"""What do Medusa heads guess? (arXiv 2401.10774, sections 2.1 and 2.3)

    B batch  N tree nodes  C model dim  V vocabulary  k top_k  w nodes of one level

Head i takes the target's last hidden state of a token (after the final norm) and guesses the token
i + 2 places on; the target's own lm_head guesses the next. So all nodes of depth d have the guesses
of head d - 1 as their tokens, whatever their parents are, and there is nothing to remember.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle.config import MedusaConfig
from fasteagle.draft.base import Room
from fasteagle.draft.grow import Guesses, TreeDrafter, best, confident, likeliest
from fasteagle.model import Linear, Transformer
from fasteagle.tree import DraftTree, DynamicTree, StaticTree, Tree, static_tree

# What Medusa decodes vicuna-7b with, 63 nodes and the root: mc_sim_7b_63 of medusa_choices.py in
# its repository. (EAGLE-1's tree of this name is another one.)
MEDUSA_MC_SIM_7B_63 = [
    [0], [1], [2], [3], [4], [5], [6], [7], [8], [9],
    [0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [0, 6], [0, 7], [0, 8], [0, 9],
    [1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [1, 5], [1, 6], [2, 0], [2, 1], [2, 2],
    [3, 0], [3, 1], [4, 0], [5, 0], [6, 0], [7, 0], [8, 0], [9, 0],
    [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 0, 4], [0, 0, 5], [0, 0, 6], [0, 0, 7],
    [0, 0, 8], [0, 0, 9], [0, 1, 0], [0, 1, 1], [0, 1, 2], [0, 2, 0], [0, 2, 1], [0, 3, 0],
    [0, 4, 0], [0, 5, 0], [0, 6, 0], [0, 7, 0], [1, 0, 0], [1, 0, 1], [2, 0, 0],
    [0, 0, 0, 0], [0, 0, 0, 1],
]  # fmt: skip


def medusa_tree(n_heads: int) -> StaticTree:
    """Medusa's own tree, as deep as there are heads."""
    return static_tree([path for path in MEDUSA_MC_SIM_7B_63 if len(path) <= n_heads])


class MedusaHead(nn.Module):
    """Residual layers, x + SiLU(W x + b), and an lm_head."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        layers = (Linear(config.dim, config.dim) for _ in range(config.n_layers))
        self.layers = nn.ModuleList(layers)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., C]` -> `[..., V]`."""
        for layer in self.layers:
            x = x + F.silu(layer(x))
        scores: Tensor = self.lm_head(x)
        return scores


class MedusaHeads(nn.Module):
    """A head for every place that is guessed."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(MedusaHead(config) for _ in range(config.n_heads))


class MedusaDrafter(TreeDrafter):
    """Medusa heads on a tree, by default Medusa's own.

    ValueError for a tree deeper than there are heads, or wider than the vocabulary.
    """

    name = "medusa"
    title = "Medusa heads"

    def __init__(self, weights: MedusaHeads, target: Transformer, tree: Tree | None = None) -> None:
        n_heads = weights.config.n_heads
        tree = tree or medusa_tree(n_heads)
        if tree.n_path - 1 > n_heads:
            raise ValueError(
                f"the tree is {tree.n_path - 1} deep, but there are {n_heads} Medusa heads, one a "
                "level; use a less deep --tree"
            )
        super().__init__(tree, n_guesses=weights.config.vocab_size, device=target.device)
        self.n_scratch, self.deepest = 0, n_heads
        self.weights, self.heads = weights, weights.heads
        self.ranks: list[Tensor] = []  # [w] a level: which guess each of its nodes is
        self.widths: list[int] = []  # how many guesses a level needs
        if isinstance(tree, StaticTree):
            for level in range(1, tree.n_path):
                ranks = [r for r, d in zip(tree.rank, tree.depth, strict=True) if d == level]
                self.ranks.append(torch.tensor(ranks, device=target.device))
                self.widths.append(max(ranks) + 1)

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        if isinstance(self.tree, DynamicTree):
            return self._propose_dynamic(self.tree, state, root)
        tokens = [root]
        for level, (ranks, width) in enumerate(zip(self.ranks, self.widths, strict=True)):
            ranked = best(self.heads[level](state), width)[:, 0]  # [B, width]
            tokens.append(ranked[:, ranks])
        return DraftTree(torch.cat(tokens, 1), self.parents.expand(root.shape[0], -1))

    def _propose_dynamic(self, tree: DynamicTree, state: Tensor, root: Tensor) -> DraftTree:
        """EAGLE-2's rule, for guesses that do not depend on the nodes they follow."""
        k = tree.top_k
        scores, tokens = confident(self.heads[0](state)[:, 0], k)  # [B, k]
        number = torch.arange(k, device=root.device).expand(root.shape[0], -1)
        guesses = Guesses([scores], [tokens], [])
        for level in range(1, tree.n_path - 1):
            more, tokens = confident(self.heads[level](state), k)  # [B, 1, k]
            children = (scores[:, :, None] + more).flatten(1)  # [B, k * k]
            guesses.add(children, tokens.expand(-1, k, -1).flatten(1), number)
            chosen = likeliest(children, k)
            number, scores = k + (level - 1) * k * k + chosen, children.gather(1, chosen)
        return guesses.rerank(root, tree.n_nodes, k)
