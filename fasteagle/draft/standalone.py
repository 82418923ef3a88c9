"""What does a smaller model of the same vocabulary guess? (arXiv 2211.17192)

    B batch  S new tokens  T cache slots  C draft model dim  V draft vocabulary
    w nodes of one level

An EAGLE head pairs a token with the feature before it, so its rows begin with the second token; a
model wants the first one too. Its cache is therefore one row ahead: after `extend` it holds the
root, and the state is the root's.

    tokens     t0  t1  t2
    following  t1  t2  t3        rows t0 t1 t2 t3 at positions 0 to 3; the next extend repeats t3
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fasteagle.cache import KVCache
from fasteagle.draft.base import Accepted, Room
from fasteagle.draft.grow import Place, TreeDrafter, cache_of
from fasteagle.model import Transformer, take
from fasteagle.tokenizer import Tokenizer
from fasteagle.tree import DraftTree, Tree, causal_mask, chain, tree_mask

LENGTH = 5  # of the chain that is guessed when nobody says how long
# What two tokenizers must agree on to count as one.
PROBES = (
    "The eagle has landed, hasn't it?",
    "def f(x):\n    return x[0] ** 12345  # 3.14",
    "\u00dcber na\u00efve \u6f22\u5b57, \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f985",
)
PADDING = 100  # one part in so many may vocabularies differ: rows that pad an embedding


class StandaloneDrafter(TreeDrafter):
    """A whole model that runs on a tree, by default on a chain of 5, beside its own cache.

    ValueError for a model of another vocabulary, or a tree wider than the vocabulary.
    """

    name = "standalone"
    title = "draft model"

    def __init__(self, model: Transformer, target: Transformer, tree: Tree | None = None) -> None:
        check_vocabulary(model.config.vocab_size, target.config.vocab_size)
        self.n_guesses = min(model.config.vocab_size, target.config.vocab_size)
        super().__init__(tree or chain(LENGTH), n_guesses=self.n_guesses, device=target.device)
        self.n_scratch += 1  # the root is a row of its cache
        self.model = self.weights = model
        self.trained_length = model.config.attention_span

    def new_memory(self, batch: int, n_slots: int) -> KVCache:
        return self.model.new_cache(batch, n_slots)

    def extend(self, news: Accepted, room: Room) -> Tensor:
        # The row at `start` is there already, as the last root, except where the text begins and
        # after a chunk of prompt that was not for this row.
        tokens = torch.cat((news.tokens[:, :1], news.following), 1)
        slots = cache_of(room).slots(news.start, tokens.shape[1])
        hidden = self._run(tokens, slots, slots, causal_mask(slots, room.n_slots), room)
        return take(hidden, news.n_valid[:, None])

    def step(self, tokens: Tensor, state: Tensor, place: Place, room: Room) -> Tensor:
        positions = (place.length + place.depth - 1)[:, None].expand(tokens.shape)
        slots = cache_of(room).slots(place.length + place.offset, tokens.shape[1])
        mask = tree_mask(place.length, place.above, room.n_slots)
        return self._run(tokens, positions, slots, mask, room)

    def _run(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, mask: Tensor, room: Room
    ) -> Tensor:
        """Hidden states `[B, S, C]` of tokens, positions, slots `[B, S]` under mask `[B, S, T]`."""
        # The target may write an id that only pads its vocabulary; any token stands for it.
        known = tokens.clamp(max=self.model.config.vocab_size - 1)
        return self.model(known, positions, slots, mask, cache_of(room), run=room.run)[0]

    def logits(self, state: Tensor) -> Tensor:
        return self.model.logits(state)[..., : self.n_guesses]

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        return self.grow(state, root, length + 1, room)


def check_vocabulary(draft: int, target: int) -> None:
    """ValueError for vocabularies whose sizes differ by more than padding, 1 %, can."""
    if abs(draft - target) * PADDING > min(draft, target):
        raise ValueError(
            f"the draft model has a vocabulary of {draft} and the target one of {target}; give a "
            "model of the target's family (sizes may differ by 1 %, which padding explains)"
        )


def check_tokenizers(path: str | Path, own: Tokenizer | None, tokenizer: Tokenizer | None) -> None:
    """ValueError if a draft model's own tokenizer, where it has one, is not the target's."""
    if own is None or tokenizer is None:
        return
    for text in PROBES:
        ours, theirs = (each.encode(text, bos=False) for each in (tokenizer, own))
        if ours != theirs:
            raise ValueError(
                f"{path} has another tokenizer than the target: of {text!r:.20} it makes "
                f"{theirs[:4]}, not {ours[:4]}; give a draft model of the target's family"
            )
