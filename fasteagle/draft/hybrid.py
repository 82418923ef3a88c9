"""What if the text has said it before? A model's tree, continued by prompt lookup.

    B batch  N nodes of the model's tree  P its longest path  k tokens added

Lookup is followed down the model's tree as far as the two agree, and hangs its next k tokens below
that node: below the root where they do not agree at all. No token is guessed twice in one place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasteagle.accept import accept
from fasteagle.draft.base import Accepted, Drafter, Memory, Room
from fasteagle.draft.history import History
from fasteagle.draft.lookup import NGRAM, check_lookup, look_up
from fasteagle.tree import MAX_NODES, DraftTree, ancestors


class Both:
    """The memory of a model, and the text."""

    def __init__(self, model: Memory | None, history: History) -> None:
        self.model, self.history = model, history

    @property
    def n_bytes(self) -> int:
        return self.history.n_bytes + (self.model.n_bytes if self.model else 0)


class HybridDrafter(Drafter):
    """A drafter whose trees get `n_guesses` more tokens. ValueError for sizes that cannot be."""

    name = "hybrid"

    def __init__(
        self, model: Drafter, device: torch.device, *, n_guesses: int, ngram: int = NGRAM
    ) -> None:
        check_lookup(n_guesses, ngram)
        self.n_nodes = model.n_nodes + n_guesses
        if self.n_nodes > MAX_NODES:
            raise ValueError(
                f"a tree of {model.n_nodes} nodes and --lookup {n_guesses} exceed the {MAX_NODES} "
                "that are supported; use a smaller one of them"
            )
        self.model, self.device = model, device
        self.n_guesses, self.ngram = n_guesses, ngram
        self.n_path = model.n_path + n_guesses
        self.n_scratch, self.weights = model.n_scratch, model.weights
        self.feature_layers, self.trained_length = model.feature_layers, model.trained_length

    @property
    def tree_name(self) -> str | None:
        return self.model.tree_name

    @property
    def words(self) -> str:
        return f"{self.model.words}, and {self.n_guesses} tokens of prompt lookup"

    def new_memory(self, batch: int, n_slots: int) -> Both:
        memory = self.model.new_memory(batch, n_slots)
        return Both(memory, History(batch, n_slots, self.device))

    def volatile(self, memory: Memory | None) -> list[Tensor]:
        assert isinstance(memory, Both), f"{type(memory).__name__} is not Both"
        return self.model.volatile(memory.model)

    def extend(self, news: Accepted, room: Room) -> Tensor:
        memory = _memory(room)
        memory.history.write(news)
        return self.model.extend(news, room._replace(memory=memory.model))

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        memory, n_path = _memory(room), self.model.n_path
        tree = self.model.propose(state, root, length, room._replace(memory=memory.model))
        text = memory.history.tokens[:, : room.n_slots]
        n_guesses = n_path - 1 + self.n_guesses
        guesses = look_up(text, length, ngram=self.ngram, n_guesses=n_guesses)
        above = ancestors(tree.parents, n_path)
        depth = above.sum(-1) - 1
        # As if lookup were the target: which path of the tree does it take?
        verdict = accept(tree, above, guesses.gather(1, depth), n_path=n_path)
        agreed = verdict.n_accepted[:, None] - 1  # [B, 1] tokens
        steps = torch.arange(self.n_guesses, device=root.device)
        last = verdict.path.gather(1, agreed)
        added = (tree.tokens.shape[1] - 1 + steps[1:]).expand(len(root), -1)
        return DraftTree(
            torch.cat((tree.tokens, guesses.gather(1, agreed + steps)), 1),
            torch.cat((tree.parents, last, added), 1),
        )


def _memory(room: Room) -> Both:
    assert isinstance(room.memory, Both), f"{type(room.memory).__name__} is not Both"
    return room.memory
