"""What does a step compute on the device? One round, or one chunk of prefill.

    B batch  S tokens of a prefill chunk  N tree nodes  P longest path, root included  T cache slots
    C model dim  F feature dim

Steps take and return nothing: they read and write the State, whose tensors keep their addresses.
All shapes are static and nothing synchronizes with the host, so a step can run as one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.accept import Verdict, accept
from fasteagle.compile import Compiler, Step
from fasteagle.draft.base import Drafter, last_of
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


class Steps:
    """Builds the steps of one engine: its target, drafter, caches and state."""

    def __init__(self, target: Transformer, drafter: Drafter, state: State, n_slots: int) -> None:
        batch = state.length.shape[0]
        self.target, self.drafter, self.state = target, drafter, state
        self.cache = target.new_cache(batch, n_slots)
        self.draft_cache = drafter.new_cache(batch, n_slots)

    def build(self, kind: str, n_slots: int, sampled: bool, compiler: Compiler) -> Step:
        """The step "round", "prefill" (a prompt's last chunk) or "extend" (an earlier chunk).

        n_slots is how much of the caches attention reads; it covers every active row and its tree.
        """
        name = f"{kind}_{n_slots}_{'sampled' if sampled else 'greedy'}"

        make = {"round": self._round, "prefill": self._prefill, "extend": self._extend}[kind]
        step = make(n_slots, sampled, compiler.part(run_block, f"{name}_block"), compiler)
        return compiler.step(step, name, self.state.tensors())

    def _round(self, n_slots: int, sampled: bool, run: RunBlock, compiler: Compiler) -> Step:
        state, n_path = self.state, self.drafter.n_path

        def decide(hidden: Tensor, positions: Tensor, above: Tensor) -> Verdict:
            chosen = choose(self.target.logits(hidden), positions, state.knobs, sampled=sampled)
            return accept(state.tree, above, chosen, n_path=n_path)

        def draft(features: Tensor, verdict: Verdict) -> None:
            path, count, emitted = verdict
            state.emitted.copy_(torch.cat((emitted, count[:, None]), 1))
            self._draft(take(features, path), emitted, count, n_slots)

        decide = compiler.part(decide, f"decide_{n_slots}")
        draft = compiler.part(draft, f"draft_{n_slots}")

        def step() -> None:
            above = ancestors(state.tree.parents, n_path)
            positions = state.length[:, None] + above.sum(-1) - 1
            slots = self.cache.slots(state.length, positions.shape[1])
            mask = tree_mask(state.length, above, n_slots)
            hidden, features = self._verify(state.tree.tokens, positions, slots, mask, run)
            verdict = decide(hidden, positions, above)
            if not self.drafter.is_chain:  # the path of a chain lies where it belongs
                self.cache.keep(state.length, verdict.path, layerwise=compiler.traces)
            draft(features, verdict)

        return step

    def _prefill(self, n_slots: int, sampled: bool, run: RunBlock, compiler: Compiler) -> Step:
        """The last chunk of a prompt: chooses the first token and drafts the first tree."""
        state = self.state

        def settle(hidden: Tensor, features: Tensor) -> None:
            _, following, count = state.chunk
            last = last_of(count)
            logits = self.target.logits(take(hidden, last))
            root = choose(logits, state.length[:, None] + last, state.knobs, sampled=sampled)
            emitted = root.expand(-1, self.drafter.n_path)
            emitted = torch.cat((emitted, torch.ones_like(root)), 1)
            state.emitted.copy_(torch.where(count[:, None] > 0, emitted, state.emitted))
            self._draft(features, following.scatter(1, last, root), count, n_slots)

        finish = compiler.part(settle, f"first_{n_slots}")

        def step() -> None:
            finish(*self._read_chunk(n_slots, run))

        return step

    def _extend(self, n_slots: int, sampled: bool, run: RunBlock, compiler: Compiler) -> Step:
        """A chunk of a prompt that is not its last: nothing is chosen, nothing drafted."""
        state = self.state
        assert not sampled, "a chunk in the middle of a prompt chooses nothing"
        extend = compiler.part(self._extend_drafter, f"extend_{n_slots}")

        def step() -> None:
            _, features = self._read_chunk(n_slots, run)
            extend(features, state.chunk.following, state.chunk.n_valid, n_slots)
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

    def _extend_drafter(
        self, features: Tensor, tokens: Tensor, count: Tensor, n_slots: int
    ) -> Tensor:
        return self.drafter.extend(
            features,
            tokens,
            self.state.length,
            count,
            cache=self.draft_cache,
            n_slots=n_slots,
            run=run_block,
        )

    def _draft(self, features: Tensor, tokens: Tensor, count: Tensor, n_slots: int) -> None:
        """Extend the drafter by rows that start at `length`, grow a tree, advance `length`."""
        state = self.state
        tree = self.drafter.propose(
            self._extend_drafter(features, tokens, count, n_slots),
            take(tokens, last_of(count)),
            state.length + count,
            cache=self.draft_cache,
            n_slots=n_slots,
            run=run_block,
        )
        # While some rows take a prompt's last chunk, others wait for their next round.
        fresh = count[:, None] > 0
        state.tree.tokens.copy_(torch.where(fresh, tree.tokens, state.tree.tokens))
        state.tree.parents.copy_(torch.where(fresh, tree.parents, state.tree.parents))
        state.length.add_(torch.where(state.active, count, 0))
