"""What does a step compute on the device? One round, or one chunk of prefill.

    B batch  S tokens of a prefill chunk  N tree nodes  P longest path, root included  T cache slots
    C model dim  F feature dim

Steps take and return nothing: they read and write the State, whose tensors keep their addresses.
All shapes are static and nothing synchronizes with the host, so a step can run as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle import tree_attention
from fasteagle.accept import Verdict, accept
from fasteagle.compile import Compiler, Step
from fasteagle.draft.base import Accepted, Drafter, Room, Verified
from fasteagle.model import RunBlock, Transformer, run_block, take
from fasteagle.sample import Knobs, choose, new_knobs
from fasteagle.tree import DraftTree, ancestors, causal_mask, tree_mask


class Chunk(NamedTuple):
    """A piece of prompt for every row; rows without one have 0 valid tokens."""

    tokens: Tensor  # [B, S]
    following: Tensor  # [B, S] the token after each; the last chunk fills in the root
    n_valid: Tensor  # [B]

    def load(self, row: int, tokens: Sequence[int], count: int) -> None:
        """Set a row: `count` tokens and, shifted by one, their followers, as far as there are."""
        padded = torch.zeros(2, self.tokens.shape[1], dtype=torch.int64)
        padded[0, :count] = torch.tensor(tokens[:count])
        padded[1, : len(tokens) - 1] = torch.tensor(tokens[1:])
        self.tokens[row], self.following[row] = padded.to(self.tokens.device)
        self.n_valid[row] = count


class State(NamedTuple):
    """All that changes between steps, apart from the caches."""

    tree: DraftTree  # the next one to verify
    length: Tensor  # [B] tokens in the caches; the root of the tree is not yet one of them
    active: Tensor  # [B] bool, rows whose length may grow
    emitted: Tensor  # [B, P + 1] a round's tokens and, last, how many of them are valid
    chunk: Chunk
    knobs: Knobs

    def tensors(self) -> list[Tensor]:
        flat = [*self.tree, self.length, self.active, self.emitted]
        return [*flat, *self.chunk, *self.knobs]


def new_state(
    drafter: Drafter, *, batch: int, n_slots: int, chunk: int, device: torch.device
) -> State:
    """State for `batch` idle rows on caches of `n_slots` slots and prefill chunks of `chunk`."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return State(
        tree=DraftTree(zeros(batch, drafter.n_nodes), zeros(batch, drafter.n_nodes)),
        length=zeros(batch),
        active=zeros(batch, dtype=torch.bool),
        emitted=zeros(batch, drafter.n_path + 1),
        chunk=Chunk(zeros(batch, chunk), zeros(batch, chunk), zeros(batch)),
        knobs=new_knobs(batch, n_slots, device),
    )


def news_of_round(state: State, features: Tensor, chosen: Tensor, verdict: Verdict) -> Accepted:
    """What a drafter hears after a round: features `[B, N, F]` and choices `[B, N]` of the tree."""
    return Accepted(
        features=take(features, verdict.path),
        tokens=take(state.tree.tokens, verdict.path),
        following=verdict.emitted,
        start=state.length,
        n_valid=verdict.n_accepted,
        verified=Verified(state.tree, chosen),
    )


def rehearsal(target: Transformer, make: Callable[[], Step]) -> Step | None:
    """A step that is not compiled, which times the attention that it meets (tree_attention.py);
    None where there is nothing to choose. It runs before the compiled one, for which that counts.
    """
    if not tree_attention.is_open(target.dtype, target.device):
        return None
    step = make()

    def run() -> None:
        with tree_attention.measuring():
            step()

    return run


class Steps:
    """Builds the steps of one engine: its target, drafter, caches and state."""

    def __init__(self, target: Transformer, drafter: Drafter, state: State, n_slots: int) -> None:
        tree_attention.forced()  # ValueError for a word that it does not know
        batch = state.length.shape[0]
        self.target, self.drafter, self.state = target, drafter, state
        self.cache = target.new_cache(batch, n_slots)
        self.memory = drafter.new_memory(batch, n_slots)

    def build(self, kind: str, n_slots: int, sampled: bool, compiler: Compiler) -> Step:
        """The step "round", "prefill" (a prompt's last chunk) or "extend" (an earlier chunk).

        n_slots is how much of the caches attention reads; it covers every active row and its tree.
        """
        name = f"{kind}_{n_slots}_{'sampled' if sampled else 'greedy'}"

        make = {"round": self._round, "prefill": self._prefill, "extend": self._extend}[kind]
        step = make(n_slots, sampled, compiler.part(run_block, f"{name}_block"), compiler)
        changed = [*self.state.tensors(), *self.drafter.volatile(self.memory)]
        first = rehearsal(self.target, lambda: make(n_slots, sampled, run_block, compiler.off))
        return compiler.step(step, name, changed, first)

    def _round(self, n_slots: int, sampled: bool, run: RunBlock, compiler: Compiler) -> Step:
        state, n_path, mode = self.state, self.drafter.n_path, compiler.mode

        def decide(hidden: Tensor, positions: Tensor, above: Tensor) -> tuple[Tensor, Verdict]:
            chosen = choose(self.target.logits(hidden), positions, state.knobs, sampled=sampled)
            return chosen, accept(state.tree, above, chosen, n_path=n_path)

        def draft(features: Tensor, chosen: Tensor, verdict: Verdict) -> None:
            count = verdict.n_accepted[:, None]
            state.emitted.copy_(torch.cat((verdict.emitted, count), 1))
            self._draft(news_of_round(state, features, chosen, verdict), n_slots)

        decide = compiler.part(decide, f"decide_{n_slots}")
        draft = compiler.part(draft, f"draft_{n_slots}")

        def step() -> None:
            above = ancestors(state.tree.parents, n_path)
            positions = state.length[:, None] + above.sum(-1) - 1
            slots = self.cache.slots(state.length, positions.shape[1])
            mask = tree_mask(state.length, above, n_slots)
            hidden, features = self._verify(state.tree.tokens, positions, slots, mask, run)
            chosen, verdict = decide(hidden, positions, above)
            if not self.drafter.is_chain:  # the path of a chain lies where it belongs
                self.cache.keep(state.length, verdict.path, mode=mode)
            draft(features, chosen, verdict)

        return step

    def _prefill(self, n_slots: int, sampled: bool, run: RunBlock, compiler: Compiler) -> Step:
        """The last chunk of a prompt: chooses the first token and drafts the first tree."""
        state = self.state

        def settle(hidden: Tensor, features: Tensor) -> None:
            news = self._news(features)
            logits = self.target.logits(take(hidden, news.last))
            positions = state.length[:, None] + news.last
            root = choose(logits, positions, state.knobs, sampled=sampled)
            emitted = root.expand(-1, self.drafter.n_path)
            emitted = torch.cat((emitted, torch.ones_like(root)), 1)
            fresh = news.n_valid[:, None] > 0
            state.emitted.copy_(torch.where(fresh, emitted, state.emitted))
            following = news.following.scatter(1, news.last, root)
            self._draft(news._replace(following=following), n_slots)

        finish = compiler.part(settle, f"first_{n_slots}")

        def step() -> None:
            finish(*self._read_chunk(n_slots, run))

        return step

    def _extend(self, n_slots: int, sampled: bool, run: RunBlock, compiler: Compiler) -> Step:
        """A chunk of a prompt that is not its last: nothing is chosen, nothing drafted."""
        state = self.state
        assert not sampled, "a chunk in the middle of a prompt chooses nothing"

        def take_in(features: Tensor) -> None:
            self.drafter.extend(self._news(features), self._room(n_slots))

        extend = compiler.part(take_in, f"extend_{n_slots}")

        def step() -> None:
            _, features = self._read_chunk(n_slots, run)
            extend(features)
            state.length.add_(state.chunk.n_valid)

        return step

    def _read_chunk(self, n_slots: int, run: RunBlock) -> tuple[Tensor, Tensor]:
        tokens = self.state.chunk.tokens
        slots = self.cache.slots(self.state.length, tokens.shape[1])
        return self._verify(tokens, slots, slots, causal_mask(slots, n_slots), run)

    def _verify(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, mask: Tensor, run: RunBlock
    ) -> tuple[Tensor, Tensor]:
        layers = self.drafter.feature_layers
        return self.target(
            tokens, positions, slots, mask, self.cache, feature_layers=layers, run=run
        )

    def _news(self, features: Tensor) -> Accepted:
        """The chunk of prompt whose features `[B, S, F]` the target has computed."""
        tokens, following, count = self.state.chunk
        return Accepted(features, tokens, following, self.state.length, count)

    def _room(self, n_slots: int) -> Room:
        return Room(self.memory, n_slots, run_block)

    def _draft(self, news: Accepted, n_slots: int) -> None:
        """Hand news that starts at `length` to the drafter, grow a tree, advance `length`."""
        state, room = self.state, self._room(n_slots)
        tree = self.drafter.propose(
            self.drafter.extend(news, room),
            take(news.following, news.last),
            state.length + news.n_valid,
            room,
        )
        # While some rows take a prompt's last chunk, others wait for their next round.
        fresh = news.n_valid[:, None] > 0
        state.tree.tokens.copy_(torch.where(fresh, tree.tokens, state.tree.tokens))
        state.tree.parents.copy_(torch.where(fresh, tree.parents, state.tree.parents))
        state.length.add_(torch.where(state.active, news.n_valid, 0))
