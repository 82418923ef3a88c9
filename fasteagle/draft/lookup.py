"""Did the newest tokens occur before, and what came after them? Prompt lookup, without a model.

    B batch  T cache slots  N tree nodes

Text that copies (code, summaries, answers that quote) repeats its own n-grams, and prompt and
output are searched alike. The longest match counts, of equally long ones the most recent; what
followed it is the guess.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasteagle.draft.base import Accepted, Drafter, Room
from fasteagle.draft.history import History
from fasteagle.tree import MAX_NODES, DraftTree

LOOKUP = 8  # tokens guessed
NGRAM = 3  # most tokens that must match; one is the least
MAX_NGRAM = 64  # a step of the round each


def look_up(tokens: Tensor, length: Tensor, *, ngram: int, n_guesses: int) -> Tensor:
    """Guesses `[B, n_guesses]` at what follows tokens `[B, T]`, whose last is at `length [B]`.

    Past the end of the text they go on as if it repeated itself from the match. Without a match
    they repeat the last token.

        tokens [5, 6, 7, 8, 5, 6], ngram 3: the last 2 match at 1, the guesses are 7, 8, 5, 6, 7, ..
    """
    n_slots = tokens.shape[1]
    last = length[:, None].clamp(max=n_slots - 1)  # a row that ended may be past what is read
    slots = torch.arange(n_slots, device=tokens.device)
    before = slots < last
    same, run = before, torch.zeros_like(tokens)  # run: how many tokens that end here match
    for n in range(ngram):
        token = tokens.gather(1, (last - n).clamp(min=0))
        same = same & (slots >= n) & (tokens.roll(n, 1) == token)
        run = run + same
    # A slot without a match scores by its place: the last one before the end wins.
    score = torch.where(before, run * n_slots + slots, -1)
    match = score.argmax(1, keepdim=True)
    period = (last - match).clamp(min=1)
    steps = torch.arange(n_guesses, device=tokens.device) % period
    return tokens.gather(1, torch.minimum(match + 1 + steps, last))


class LookupDrafter(Drafter):
    """Guesses a chain of `n_guesses` tokens. ValueError for sizes that cannot be."""

    name = "lookup"
    is_chain = True
    is_static = True

    def __init__(
        self, device: torch.device, *, n_guesses: int = LOOKUP, ngram: int = NGRAM
    ) -> None:
        check_lookup(n_guesses, ngram)
        self.n_guesses, self.ngram = n_guesses, ngram
        self.n_nodes = self.n_path = 1 + n_guesses
        self.parents = torch.arange(-1, n_guesses, device=device).clamp(min=0)

    @property
    def words(self) -> str:
        return f"prompt lookup of {self.n_guesses} tokens after {self.ngram} or fewer"

    def new_memory(self, batch: int, n_slots: int) -> History:
        return History(batch, n_slots, self.parents.device)

    def extend(self, news: Accepted, room: Room) -> Tensor:
        history_of(room).write(news)
        return super().extend(news, room)

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        tokens = history_of(room).tokens[:, : room.n_slots]
        guesses = look_up(tokens, length, ngram=self.ngram, n_guesses=self.n_guesses)
        return DraftTree(torch.cat((root, guesses), 1), self.parents.expand(len(root), -1))


def history_of(room: Room) -> History:
    """The History of a drafter that has one."""
    assert isinstance(room.memory, History), f"{type(room.memory).__name__} is no History"
    return room.memory


def check_lookup(n_guesses: int, ngram: int) -> None:
    """ValueError for a number of guesses or a length to match that cannot be."""
    if not 1 <= n_guesses < MAX_NODES:
        raise ValueError(f"lookup of {n_guesses} tokens; give 1 to {MAX_NODES - 1}")
    if not 1 <= ngram <= MAX_NGRAM:
        raise ValueError(f"lookup after {ngram} tokens; give an --ngram of 1 to {MAX_NGRAM}")
