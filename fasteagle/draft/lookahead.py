"""What does the target itself find likely further on? Lookahead decoding (arXiv 2402.02057).

    B batch  N n-gram length  W window columns  G guesses  M n-grams in the pool  K n-grams at once

Without a draft model: beside verifying, every pass refines a window of guesses at later positions
(Jacobi iteration), collects the n-grams that it wrote, and verifies those that begin with the root.
All of it is one tree, which gives each node the positions and the mask of the paper's figure 2:

    N 4, W 3, G 1    root +- g - g - g        a guess: the rest of an n-gram
                      |+- w1 - w2             level 0: root, w1, w2
                      ||   |    `- y2 - z2    level 1: y0, y1, y2, a level below each column
                      ||    `- y1 - z1        level 2: z0, z1, z2
                       `- y0 - z0             column 0 becomes the n-gram root, y0, z0, chosen

What differs from the paper and its code, and why:
- The window's nodes are guesses as any others and may be accepted; it costs nothing.
- The window begins full, with the end of the prompt, not level by level: shapes are static.
- When sampling, the window is filled with what the target draws there, not with its argmax.
- The pool takes the n-grams of the output as well as those of the prompt and the window.
- The pool is a ring: an n-gram that was not written again for M others is forgotten. Of those with
  one first token, the G newest are tried, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasteagle.draft.base import Accepted, Drafter, Room, Verified
from fasteagle.draft.history import History
from fasteagle.tree import MAX_NODES, DraftTree

WINDOW, NGRAM, GUESSES = 7, 5, 7  # as the authors advise for a 7B model: 56 nodes
POOL = 4096
EMPTY = -1  # no token


class Pool:
    """N-grams `[B, M + 1, N]`, each once, in a ring; the last row takes what is not wanted."""

    def __init__(self, batch: int, ngram: int, device: torch.device, *, size: int) -> None:
        shape = (batch, size + 1, ngram)
        self.grams = torch.zeros(shape, dtype=torch.int64, device=device)
        self.grams[:, :, 0] = EMPTY
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)  # written so far
        self.size = size

    def clear(self, rows: Tensor) -> None:
        """Forget everything in rows `[B]` bool."""
        self.grams[:, :, 0].masked_fill_(rows[:, None], EMPTY)
        self.count.masked_fill_(rows, 0)

    def insert(self, grams: Tensor, valid: Tensor) -> None:
        """Remember n-grams `[B, K, N]` where valid `[B, K]`; the last of them is the newest."""
        known = (_equal(grams, self.grams) & valid[:, :, None]).any(1)  # [B, M + 1]
        self.grams[:, :, 0].masked_fill_(known, EMPTY)
        later = torch.ones_like(valid)[:, :, None].expand(-1, -1, valid.shape[1]).triu(1)
        again = (_equal(grams, grams) & valid[:, None] & later).any(2)  # [B, K]
        first = torch.where(again, EMPTY, grams[:, :, 0])
        rank = valid.cumsum(1)
        total = rank[:, -1:]
        slots = (self.count[:, None] + rank - 1) % self.size
        slots = torch.where(valid & (rank > total - self.size), slots, self.size)
        grams = torch.cat((first[:, :, None], grams[:, :, 1:]), 2)
        self.grams.scatter_(1, slots[:, :, None].expand(grams.shape), grams)
        self.count.add_(total[:, 0])

    def newest(self, root: Tensor, n: int) -> Tensor:
        """What follows root `[B, 1]` in its `n` newest n-grams, newest first: `[B, n, N - 1]`.

        Where there are fewer, the root again and again.
        """
        slots = torch.arange(self.size, device=root.device)
        age = (self.count[:, None] - 1 - slots) % self.size
        age = torch.where(self.grams[:, :-1, 0] == root, age, age + self.size)
        ages, chosen = age.topk(n, largest=False)
        index = chosen[:, :, None].expand(-1, -1, self.grams.shape[2])
        found = (ages < self.size)[:, :, None]
        return torch.where(found, self.grams.gather(1, index)[:, :, 1:], root[:, :, None])


def _equal(some: Tensor, others: Tensor) -> Tensor:
    """Which of n-grams `[B, K, N]` equal which of `[B, M, N]`: `[B, K, M]`."""
    same = some[:, :, None, 0] == others[:, None, :, 0]
    for n in range(1, some.shape[2]):  # not one comparison with N in its shape: M is large
        same = same & (some[:, :, None, n] == others[:, None, :, n])
    return same


class Trajectories:
    """What Lookahead remembers: the text, the window `[B, N - 1, W]` and the pool."""

    def __init__(self, history: History, window: Tensor, pool: Pool) -> None:
        self.history, self.window, self.pool = history, window, pool

    @property
    def n_bytes(self) -> int:
        changed = (self.window, self.pool.grams, self.pool.count)
        return self.history.n_bytes + sum(t.numel() * t.element_size() for t in changed)


class LookaheadDrafter(Drafter):
    """Guesses from what the target wrote in its window. ValueError for sizes that cannot be."""

    name = "lookahead"
    is_static = True

    def __init__(
        self,
        device: torch.device,
        *,
        window: int = WINDOW,
        ngram: int = NGRAM,
        guesses: int = GUESSES,
        pool: int = POOL,
    ) -> None:
        n_nodes = (ngram - 1) * (window + guesses)
        if min(window, ngram - 1, guesses) < 1 or n_nodes > MAX_NODES:
            raise ValueError(
                f"--window {window}, --ngram {ngram} and --guesses {guesses} make {n_nodes} nodes, "
                f"(ngram - 1) * (window + guesses); at most {MAX_NODES} are supported, and ngram "
                "is at least 2, the others 1"
            )
        assert pool >= guesses, f"{guesses} guesses from a pool of {pool}"
        self.window, self.ngram, self.guesses, self.pool = window, ngram, guesses, pool
        self.n_nodes, self.n_path = n_nodes, max(ngram, window + ngram - 2)
        self.parents = torch.tensor(window_parents(window, ngram, guesses), device=device)

    @property
    def words(self) -> str:
        return (
            f"Lookahead, window {self.window}, n-grams of {self.ngram}, {self.guesses} guesses "
            "a round"
        )

    def new_memory(self, batch: int, n_slots: int) -> Trajectories:
        device = self.parents.device
        shape = (batch, self.ngram - 1, self.window)
        window = torch.zeros(shape, dtype=torch.int64, device=device)
        history = History(batch, n_slots, device)
        return Trajectories(history, window, Pool(batch, self.ngram, device, size=self.pool))

    def volatile(self, memory: object) -> list[Tensor]:
        assert isinstance(memory, Trajectories), f"{type(memory).__name__} is no Trajectories"
        return [memory.window, memory.pool.grams, memory.pool.count]

    def extend(self, news: Accepted, room: Room) -> Tensor:
        memory = _memory(room)
        has_news = news.n_valid > 0
        memory.pool.clear(has_news & (news.start == 0))
        memory.history.write(news)
        grams, valid = self._written(news, memory.history)
        if news.verified is None:
            window = self._first_window(news, memory.history)
        else:
            ladder = self._ladder(news.verified)
            window = ladder[:, 1:]
            grams = torch.cat((ladder.mT, grams), 1)  # what is true is newer than what may be
            valid = torch.cat((has_news[:, None].expand(-1, self.window), valid), 1)
        memory.pool.insert(grams, valid)
        memory.window.copy_(torch.where(has_news[:, None, None], window, memory.window))
        return super().extend(news, room)

    def _written(self, news: Accepted, history: History) -> tuple[Tensor, Tensor]:
        """The n-grams `[B, S, N]` of the text that end in a piece of it, and which are some."""
        rows = torch.arange(news.following.shape[1], device=news.start.device)
        first = news.start[:, None] + rows + 2 - self.ngram
        slots = first[:, :, None] + torch.arange(self.ngram, device=rows.device)
        index = slots.clamp(0, history.tokens.shape[1] - 1).flatten(1)
        grams = history.tokens.gather(1, index).view(slots.shape)
        return grams, (rows < news.n_valid[:, None]) & (first >= 0)

    def _first_window(self, news: Accepted, history: History) -> Tensor:
        """A window `[B, N - 1, W]` that has the text's end come again, or all of a short text."""
        period, device = self.window + self.ngram - 3, news.start.device
        ahead = torch.arange(self.ngram - 1, device=device)[:, None] + torch.arange(
            self.window, device=device
        )
        end = history.tokens.shape[1] - 1
        length = (news.start + news.n_valid)[:, None].clamp(max=end)
        slots = length - (period - ahead.flatten()) % (length + 1)
        return history.tokens.gather(1, slots).view(-1, *ahead.shape)

    def _ladder(self, verified: Verified) -> Tensor:
        """The verified window with what the target chose below it, `[B, N, W]`.

        Column i holds the n-gram that begins i places after the root. Without its first row it is
        the next window: one place further, however many tokens were accepted, as in the
        authors' code.
        """
        window, chosen = self._of_window(verified.tree.tokens), self._of_window(verified.chosen)
        return torch.cat((window, chosen[:, -1:]), 1)

    def _of_window(self, nodes: Tensor) -> Tensor:
        """The part `[B, N - 1, W]` of nodes `[B, tree nodes]` that is the window: the last ones."""
        first = 1 + self.guesses * (self.ngram - 1)
        window = torch.cat((nodes[:, :1], nodes[:, first:]), 1)
        return window.view(-1, self.ngram - 1, self.window)

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        memory = _memory(room)
        guesses = memory.pool.newest(root, self.guesses).flatten(1)
        window = memory.window.flatten(1)[:, 1:]  # the root stands where its first token does
        tokens = torch.cat((root, guesses, window), 1)
        return DraftTree(tokens, self.parents.expand(len(root), -1))


def window_parents(window: int, ngram: int, guesses: int) -> list[int]:
    """The tree of a round: the root, the guesses' chains, then the window level by level.

    window 2, ngram 3, guesses 1: [0, 0, 1, 0, 0, 3] for root, g, g, w1, y0, y1
    """
    steps = ngram - 1
    parents = [0]
    for _ in range(guesses):
        parents += [0, *range(len(parents), len(parents) + steps - 1)]
    above = [0, *range(len(parents), len(parents) + window - 1)]
    parents += above[:-1]
    for _ in range(1, steps):
        first = len(parents)
        parents += above
        above = list(range(first, first + window))
    return parents


def _memory(room: Room) -> Trajectories:
    assert isinstance(room.memory, Trajectories), f"{type(room.memory).__name__} is no Trajectories"
    return room.memory
