"""How does a small model grow a tree, level by level? Static trees and EAGLE-2's dynamic ones.

    B batch  N tree nodes  V draft vocabulary  C state dim  w nodes of one level  k top_k
    M nodes that the small model runs on, the root left out

EAGLE heads and standalone draft models differ in what a step computes; the tree is theirs alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.draft.base import Drafter, Room
from fasteagle.model import take
from fasteagle.tree import MAX_NODES, DraftTree, DynamicTree, StaticTree, Tree, ancestors


class Level(NamedTuple):
    """One step down a static tree: the nodes of a depth that have children, and those children."""

    pick: Tensor  # [w] which nodes of this depth have children
    source: Tensor  # [w] row of each one's parent in the previous level
    above: Tensor  # [w, M] ancestors among all internal nodes, itself included
    offset: int  # how many internal nodes come before them
    owner: Tensor  # [c] for each child: row of its parent in this level
    rank: Tensor  # [c] for each child: which guess it is
    width: int  # guesses needed a row: highest rank + 1


def plan_levels(tree: StaticTree, device: torch.device) -> list[Level]:
    """The steps for a static tree. Level 0 is the root, which `extend` has already run."""
    above = ancestors(torch.tensor([tree.parents]), tree.n_path)[0]
    at = [[n for n in range(tree.n_nodes) if tree.depth[n] == d] for d in range(tree.n_path)]
    inner = [n for depth in range(1, tree.n_path) for n in tree.internal(depth)]
    levels, previous = [], [0]

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    for depth in range(tree.n_path - 1):
        nodes, children = tree.internal(depth), at[depth + 1]
        ranks = [tree.rank[n] for n in children]
        levels.append(
            Level(
                pick=index([at[depth].index(n) for n in nodes]),
                source=index([previous.index(tree.parents[n]) for n in nodes]),
                above=above[nodes][:, inner].to(device),
                offset=inner.index(nodes[0]) if depth else 0,
                owner=index([nodes.index(tree.parents[n]) for n in children]),
                rank=index(ranks),
                width=max(ranks) + 1,
            )
        )
        previous = nodes
    return levels


class Place(NamedTuple):
    """Where the nodes of a level are: `depth` below the root, with `offset` model rows before."""

    length: Tensor  # [B] rows of the sequence
    depth: int
    offset: int
    above: Tensor  # [B, w, M'] or [w, M'] bool, ancestors among the rows from `length` on


def best(logits: Tensor, width: int) -> Tensor:
    """The `width` most likely tokens of logits `[..., V]`, best first: `[..., width]`."""
    if width == 1:  # an argmax fuses, a topk is a kernel of its own
        return logits.argmax(-1, keepdim=True)
    return logits.topk(width, -1).indices


def confident(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best guesses of logits `[..., V]`: their log probabilities and ids `[..., k]`."""
    scores, guesses = logits.float().log_softmax(-1).topk(k, -1)
    # Rounding must not lift a child above its parent.
    return scores.clamp(max=0.0), guesses


def likeliest(scores: Tensor, n: int) -> Tensor:
    """Where the `n` highest of scores `[B, M]` are, best first; of equals the first: `[B, n]`."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :n]


def cache_of(room: Room) -> KVCache:
    """The KVCache of a drafter that has one."""
    assert isinstance(room.memory, KVCache), f"{type(room.memory).__name__} is no KVCache"
    return room.memory


class TreeDrafter(Drafter):
    """A drafter that runs a small model on tree nodes. A subclass overrides `step` and `logits`."""

    title: str  # what it is without its tree
    deepest: int = MAX_NODES - 1  # levels that it can guess

    def __init__(
        self, tree: Tree, *, n_guesses: int, device: torch.device, pruned: bool = False
    ) -> None:
        """n_guesses: of how many tokens `logits` speaks, if `pruned` fewer than the target has.
        ValueError for a tree that needs more.
        """
        if tree.width > n_guesses:
            where, cure = ("draft vocabulary", " or a larger one") if pruned else ("vocabulary", "")
            raise ValueError(
                f"the tree asks for guess number {tree.width - 1} of a {where} of {n_guesses}; use "
                f"a narrower --tree{cure}"
            )
        self.tree, self.n_guesses = tree, n_guesses
        self.n_nodes, self.n_path, self.is_chain = tree.n_nodes, tree.n_path, tree.is_chain
        self.n_scratch = tree.n_inner
        self.levels: list[Level] = []
        if isinstance(tree, StaticTree):
            self.parents = torch.tensor([tree.parents], device=device)
            self.levels = plan_levels(tree, device)

    @property
    def tree_name(self) -> str:
        return self.tree.name

    @property
    def is_static(self) -> bool:
        return isinstance(self.tree, StaticTree)

    @property
    def words(self) -> str:
        return f"{self.title}, tree {self.tree.name}"

    def step(self, tokens: Tensor, state: Tensor, place: Place, room: Room) -> Tensor:
        """Run the model on nodes with tokens `[B, w]`, whose parents have state `[B, w, C]`."""
        raise NotImplementedError

    def logits(self, state: Tensor) -> Tensor:
        """What comes after each row, `[B, w, C]` -> `[B, w, V]`."""
        raise NotImplementedError

    def tokens(self, guesses: Tensor) -> Tensor:
        """The target's ids of the draft vocabulary's."""
        return guesses

    @property
    def n_steps(self) -> int:
        """How often the model runs in a round: on the root, and once a level below it."""
        return self.tree.n_path - 1 if isinstance(self.tree, StaticTree) else self.tree.depth + 1

    def grow(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        """A tree on `root [B, 1]` whose state `[B, 1, C]` is known; the model has `length` rows."""
        if isinstance(self.tree, DynamicTree):
            return self._grow_dynamic(self.tree, state, root, length, room)
        return self._grow_static(state, root, length, room)

    def _grow_static(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        guesses = [root]
        for depth, level in enumerate(self.levels):
            if depth:
                guessed = guesses[-1]
                if not self.is_chain:  # else there is one of each
                    guessed, state = guessed[:, level.pick], state[:, level.source]
                place = Place(length, depth, level.offset, level.above)
                state = self.step(guessed, state, place, room)
            ranked = self.tokens(best(self.logits(state), level.width))
            guesses.append(ranked[..., -1] if self.is_chain else ranked[:, level.owner, level.rank])
        return DraftTree(torch.cat(guesses, 1), self.parents.expand(root.shape[0], -1))

    def _grow_dynamic(
        self, tree: DynamicTree, state: Tensor, root: Tensor, length: Tensor, room: Room
    ) -> DraftTree:
        """EAGLE-2 (arXiv 2406.16858, section 4): expand by confidence, then keep the best nodes."""
        k = tree.top_k
        scores, tokens = self._ranked(state, k)  # [B, 1, k]: the first level
        frontier = Frontier(
            number=torch.arange(k, device=root.device).expand(root.shape[0], -1),
            scores=scores[:, 0],
            tokens=tokens[:, 0],
            state=state.expand(-1, k, -1),
            above=torch.eye(k, dtype=torch.bool, device=root.device).expand(root.shape[0], -1, -1),
        )
        guesses = Guesses([frontier.scores], [frontier.tokens], [])
        for depth in range(1, tree.depth + 1):
            place = Place(length, depth, (depth - 1) * k, frontier.above)
            state = self.step(frontier.tokens, frontier.state, place, room)
            scores, tokens = self._ranked(state, k)  # [B, k, k]
            scores = frontier.scores[:, :, None] + scores
            first = k + (depth - 1) * k * k
            guesses.add(scores.flatten(1), tokens.flatten(1), frontier.number)
            if depth < tree.depth:
                frontier = frontier.next(*guesses.newest, state, first)
        return guesses.rerank(root, tree.n_nodes, k)

    def _ranked(self, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best guesses after each row: their log probabilities and tokens `[B, w, k]`."""
        scores, guesses = confident(self.logits(state), k)
        return scores, self.tokens(guesses)


class Frontier(NamedTuple):
    """The nodes that a level of a dynamic tree expands, k a row."""

    number: Tensor  # [B, k] among all guesses
    scores: Tensor  # [B, k] log probability of the path
    tokens: Tensor  # [B, k]
    state: Tensor  # [B, k, C] of their parents
    above: Tensor  # [B, k, k * depth] ancestors among the nodes expanded so far

    def next(self, scores: Tensor, tokens: Tensor, state: Tensor, first: int) -> Frontier:
        """The best of the children `[B, k * k]`, whose numbers begin at `first`; state is ours."""
        k = self.number.shape[1]
        chosen = likeliest(scores, k)
        parent = chosen // k
        eye = torch.eye(k, dtype=torch.bool, device=chosen.device)
        return Frontier(
            number=first + chosen,
            scores=scores.gather(1, chosen),
            tokens=tokens.gather(1, chosen),
            state=take(state, parent),
            above=torch.cat((take(self.above, parent), eye.expand(len(chosen), -1, -1)), -1),
        )


class Guesses(NamedTuple):
    """All guesses of a dynamic tree: k on the root, then k on each expanded node, in order."""

    scores: list[Tensor]  # [B, k], then [B, k * k] a level
    tokens: list[Tensor]
    expanded: list[Tensor]  # [B, k] a level, the guesses that were expanded

    def add(self, scores: Tensor, tokens: Tensor, expanded: Tensor) -> None:
        self.scores.append(scores)
        self.tokens.append(tokens)
        self.expanded.append(expanded)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        return self.scores[-1], self.tokens[-1]

    def rerank(self, root: Tensor, n_nodes: int, k: int) -> DraftTree:
        """The root and the best `n_nodes` - 1 guesses, in the order in which they were made.

        A parent scores at least as much as its child and comes before it, so with ties going to
        the earlier guess it is never left out.
        """
        kept = likeliest(torch.cat(self.scores, 1), n_nodes - 1).sort(-1).values  # [B, N - 1]
        tokens = torch.cat(self.tokens, 1).gather(1, kept)
        parents = torch.zeros_like(kept)
        if self.expanded:
            group = kept // k  # 0: children of the root; g: of the expanded node g - 1
            owner = torch.cat(self.expanded, 1).gather(1, (group - 1).clamp(min=0))
            above = 1 + (kept[:, None, :] < owner[:, :, None]).sum(-1)
            parents = torch.where(group > 0, above, 0)
        return DraftTree(
            torch.cat((root, tokens), 1), torch.cat((torch.zeros_like(root), parents), 1)
        )
