"""Which drafters need no weights? Those that follow a script, from perfect to hostile.

B batch  S new tokens  N tree nodes  P longest path, root included  C model dim  V vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasteagle.draft.base import Drafter, Room
from fasteagle.tree import DraftTree

VOCAB = 20  # of the tiny targets


class ScriptedDrafter(Drafter):
    """A drafter without weights or cache; a subclass says which tree grows from a row."""

    name = "scripted"

    def __init__(self, n_nodes: int, n_path: int, vocab: int, seed: int = 0) -> None:
        self.n_nodes, self.n_path, self.vocab = n_nodes, n_path, vocab
        self.rng = random.Random(seed)

    def grow(self, row: int, length: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the nodes after the root, which is the row's token `length`."""
        raise NotImplementedError

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        grown = [self.grow(row, n) for row, n in enumerate(length.tolist())]
        guesses = torch.tensor([guess for guess, _ in grown], dtype=torch.int64)
        parents = torch.tensor([[0, *parents] for _, parents in grown])
        return DraftTree(torch.cat((root, guesses), 1), parents)


class RandomDrafter(ScriptedDrafter):
    """Random tokens on a tree of another random shape in every round."""

    def grow(self, row: int, length: int) -> tuple[list[int], list[int]]:
        depth, parents, guesses = [0], [0], [-1]
        free = [self.rng.sample(range(self.vocab), self.vocab)]  # siblings carry distinct tokens
        for node in range(1, self.n_nodes):
            able = [n for n in range(node) if depth[n] < self.n_path - 1 and free[n]]
            parent = self.rng.choice(able)
            guesses.append(free[parent].pop())
            free.append(self.rng.sample(range(self.vocab), self.vocab))
            parents.append(parent)
            depth.append(depth[parent] + 1)
        return guesses[1:], parents[1:]


class OracleDrafter(ScriptedDrafter):
    """Knows every row's whole text `truth`, prompt included.

    The right token hides among `width - 1` wrong siblings. `fails(rng)` is the depth from which all
    is wrong: 1 is always wrong, n_path never.
    """

    def __init__(
        self,
        truth: Sequence[Sequence[int]],
        *,
        n_path: int = 6,
        width: int = 1,
        vocab: int = VOCAB,
        fails: Callable[[random.Random], int] | None = None,
    ) -> None:
        super().__init__(1 + (n_path - 1) * width, n_path, vocab)
        self.truth, self.width = truth, width
        self.fails = fails or (lambda rng: n_path)

    def grow(self, row: int, length: int) -> tuple[list[int], list[int]]:
        future = list(self.truth[row][length + 1 :]) if row < len(self.truth) else []
        future += [0] * self.n_path
        guesses: list[int] = []
        parents: list[int] = []
        parent, failed = 0, self.fails(self.rng)
        for depth in range(1, self.n_path):
            right = future[depth - 1]
            wrong = self.rng.sample([t for t in range(self.vocab) if t != right], self.width)
            at = self.rng.randrange(self.width)
            level = wrong if depth >= failed else [*wrong[:at], right, *wrong[at + 1 :]]
            parents += [parent] * self.width
            parent = len(guesses) + 1 + at
            guesses += level
        return guesses, parents
