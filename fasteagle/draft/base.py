"""What must a drafter do? The class that every drafter extends.

    B batch  S new tokens  P longest path, root included  N tree nodes  F feature dim  T cache slots

A drafter never decides what is emitted: the engine's choice after a node depends on the tokens
before it and on the seed, never on the tree. So a drafter can cost speed, not correctness.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from fasteagle.model import RunBlock, take
from fasteagle.tree import DraftTree


class Verified(NamedTuple):
    """What the target made of a whole tree."""

    tree: DraftTree
    chosen: Tensor  # [B, N] what it chose after every node, accepted or not


class Accepted(NamedTuple):
    """A piece of the sequence: S rows, of which the first `n_valid` are valid."""

    features: Tensor  # [B, S, F] the target's, of `tokens`
    tokens: Tensor  # [B, S] at positions `start`, `start + 1`, ...
    following: Tensor  # [B, S] the token after each
    start: Tensor  # [B]
    n_valid: Tensor  # [B]; a row with 0 has no news
    verified: Verified | None = None  # None: a piece of prompt

    @property
    def last(self) -> Tensor:
        """Which row is the last valid one, `[B, 1]`; row 0 where there is none."""
        return (self.n_valid - 1).clamp(min=0)[:, None]


class Memory(Protocol):
    """What a drafter remembers of its sequences."""

    @property
    def n_bytes(self) -> int: ...


class Room(NamedTuple):
    """Where a drafter works: its memory, how much of it to read, and how to run a block."""

    memory: Memory | None  # what `new_memory` made
    n_slots: int  # attention reads the first so many slots
    run: RunBlock


class Drafter:
    """Guesses trees. A subclass sets `name`, `n_nodes` and `n_path` and overrides `propose`."""

    name: str
    n_nodes: int  # N, the root included
    n_path: int  # P
    n_scratch: int = 0  # slots past `length` that `propose` may write
    is_chain: bool = False  # every tree is one path: node n follows node n - 1
    weights: nn.Module | None = None  # its own
    feature_layers: tuple[int, ...] = ()  # target layers whose inputs are the features, in order;
    # () is the last hidden state, after the final norm
    trained_length: int | None = None  # tokens that it was trained on, if it minds

    @property
    def n_ahead(self) -> int:
        """Slots past `length` that verifying or drafting a tree writes."""
        return max(self.n_nodes, self.n_scratch)

    @property
    def tree_name(self) -> str | None:
        """What --tree calls its tree, if that is for a user to choose."""
        return None

    @property
    def is_static(self) -> bool:
        """Whether every tree has the same parents."""
        return self.n_nodes == 1

    @property
    def words(self) -> str:
        """What it is, for people."""
        return self.name

    def new_memory(self, batch: int, n_slots: int) -> Memory | None:
        """What it remembers of `batch` sequences of `n_slots` positions; None if nothing.

        A row begins a new sequence whenever `extend` sees `start` 0 with an `n_valid` above 0.
        """
        return None

    def volatile(self, memory: Memory | None) -> list[Tensor]:
        """The tensors of a memory that a step changes elsewhere than behind `length`."""
        return []

    def extend(self, news: Accepted, room: Room) -> Tensor:
        """Take in a piece of the sequence; returns the state `[B, 1, C]` that `propose` gets.

        Every token comes once and in order. A row without news keeps its memory, except behind
        `length`.
        """
        return take(news.features, news.last)

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        """Grow a tree on `root [B, 1]`, the token at position `length [B]`: no host sync."""
        raise NotImplementedError
