"""What would a head as good as a paper's do for a round? SIMULATED acceptance, batch 1, greedy.

    N tree nodes  D deepest level  P longest path, root included (D + 1)  T positions  V vocabulary

Random weights draft nothing that the target would choose. So the known greedy continuation is put
into the drafted tree, as often as given rates say, after the drafter has done all of its work. How
many tokens a round accepts is then drawn beforehand; the time of the round is a real one.

rates [.8, .5], the tree 0 - 1 - 2, the text goes on with a, b:
    one round in five      verifies [root, wrong, wrong]   accepts 0
    two in five            verifies [root, a, wrong]       accepts 1
    two in five            verifies [root, a, b]           accepts 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fasteagle.draft.base import Accepted, Drafter, Memory, Room
from fasteagle.engine import Engine
from fasteagle.tree import DraftTree, ancestors

PAPER = (0.76, 0.69, 0.67, 0.68, 0.68)  # LLaMA2-chat 7B, MT-bench, T = 0: arXiv 2401.15077, table 2
SEEDS = 500  # tried for one whose run accepts what the rates promise
TRIES = 4  # at a continuation that the drafting engine itself goes on with


def parse_rates(text: str) -> tuple[float, ...]:
    """The type of --accept: acceptance by depth, `0.76,0.69`; ArgumentTypeError for others."""
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of acceptance rates by depth; give numbers from 0 to 1 with "
            "commas between, such as 0.76,0.69,0.67"
        )
    return rates


def by_depth(rates: Sequence[float], depth: int) -> list[float]:
    """Rates for so many levels: levels below the last rate take that one."""
    return [rates[min(level, len(rates) - 1)] for level in range(depth)]


def expected_accept_length(rates: Sequence[float], depth: int) -> float:
    """Tokens a round on average, the bonus included: 1 + a1 + a1 a2 + ... to the last level."""
    total, reached = 1.0, 1.0
    for rate in by_depth(rates, depth):
        reached *= rate
        total += reached
    return total


def draw(rates: Sequence[float], depth: int, n_positions: int, seed: int) -> Tensor:
    """How many levels are right of a tree whose root is at each position: `[T]` int64, 0 to D.

    A coin for every position and level; the first that fails ends the path.
    """
    generator = torch.Generator().manual_seed(seed)
    coins = torch.rand(n_positions, depth, generator=generator)
    return (coins < torch.tensor(by_depth(rates, depth))).long().cumprod(1).sum(1)


def walk(right: Tensor, prompt_tokens: int, new_tokens: int) -> list[int]:
    """What the rounds of a request accept, `right [T]` given: a round's root is the last token."""
    accepted, made, table = [], 1, right.tolist()  # prefill makes the first token
    while made < new_tokens:
        accepted.append(table[prompt_tokens + made - 1])
        made += accepted[-1] + 1
    return accepted


def fair_draw(
    rates: Sequence[float], depth: int, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Tensor]:
    """`draw` for every prompt, with the luck that brings a run closest to the expected length.

    Of SEEDS draws, as a short run has few rounds: by luck alone 40 of them would be a tenth faster
    or slower.
    """
    wanted, n_prompts = expected_accept_length(rates, depth), len(prompts)
    n_positions = max(map(len, prompts)) + new_tokens + depth

    def tables(seed: int) -> list[Tensor]:
        first = seed * n_prompts
        return [draw(rates, depth, n_positions, first + at) for at in range(n_prompts)]

    def distance(seed: int) -> float:
        rounds = [
            accepted
            for table, prompt in zip(tables(seed), prompts, strict=True)
            for accepted in walk(table, len(prompt), new_tokens)
        ]
        return abs(sum(rounds) / max(1, len(rounds)) + 1 - wanted)

    return tables(min(range(SEEDS), key=distance))


class SimulatedDrafter(Drafter):
    """A drafter whose trees carry the known text as far as drawn, else wrong tokens; batch 1.

    The drafter draws its tree from its own tokens, which are inputs of its next levels; only then
    are they replaced. On the path to the first of the deepest nodes stands the known text; every
    other node is wrong, so that nothing is accepted by chance.
    """

    name = "simulated"

    def __init__(
        self, model: Drafter, rates: Sequence[float], *, vocab_size: int, device: torch.device
    ) -> None:
        self.model, self.rates, self.vocab_size = model, tuple(rates), vocab_size
        self.n_nodes, self.n_path, self.n_scratch = model.n_nodes, model.n_path, model.n_scratch
        self.is_chain, self.weights = model.is_chain, model.weights
        self.feature_layers, self.trained_length = model.feature_layers, model.trained_length
        self.device = device
        self.known = self.right = torch.empty(0, dtype=torch.int64)  # [T], of `new_memory`
        # What the drafter guessed: nobody reads it, but its last level is dead code otherwise.
        self.guessed = torch.zeros(1, self.n_nodes, dtype=torch.int64, device=device)  # [1, N]

    @property
    def tree_name(self) -> str | None:
        return self.model.tree_name

    @property
    def is_static(self) -> bool:
        return self.model.is_static

    @property
    def words(self) -> str:
        return f"{self.model.words}, SIMULATED acceptance {', '.join(map(str, self.rates))}"

    @property
    def n_steps(self) -> int:
        """How often the drafter's model runs in a round."""
        return getattr(self.model, "n_steps", 0)

    @property
    def expected_accept_length(self) -> float:
        """The closed form, for trees that are as deep as they may be."""
        return expected_accept_length(self.rates, self.n_path - 1)

    def new_memory(self, batch: int, n_slots: int) -> Memory | None:
        assert batch == 1, f"acceptance is simulated for one row, not {batch}"
        size = n_slots + self.n_path
        self.known, self.right = torch.zeros(2, size, dtype=torch.int64, device=self.device)
        return self.model.new_memory(batch, n_slots)

    def volatile(self, memory: Memory | None) -> list[Tensor]:
        return self.model.volatile(memory)

    def load(self, prompt_tokens: int, known: Sequence[int], right: Tensor) -> None:
        """What follows a prompt of so many tokens, and how many levels are right, `[T]`."""
        text = torch.tensor(list(known))[: len(self.known) - prompt_tokens]
        self.known.zero_()
        self.known[prompt_tokens : prompt_tokens + len(text)] = text.to(self.device)
        self.right.zero_()
        self.right[: len(right)] = right[: len(self.right)].to(self.device)

    def extend(self, news: Accepted, room: Room) -> Tensor:
        return self.model.extend(news, room)

    def propose(self, state: Tensor, root: Tensor, length: Tensor, room: Room) -> DraftTree:
        tree = self.model.propose(state, root, length, room)
        self.guessed.copy_(tree.tokens)
        above = ancestors(tree.parents, self.n_path)
        depth = above.sum(-1) - 1  # [1, N]
        deepest = depth.argmax(1, keepdim=True)
        path = above.gather(1, deepest[:, :, None].expand(-1, -1, self.n_nodes))[:, 0]
        known = self.known[length[:, None] + depth]
        node = torch.arange(self.n_nodes, device=root.device)
        wrong = (known + 1 + node % (self.vocab_size - 1)) % self.vocab_size  # siblings differ
        right = path & (depth <= self.right[length][:, None])
        tokens = torch.where(right, known, wrong)
        return DraftTree(torch.where(depth == 0, root, tokens), tree.parents)


def rehearse(
    engine: Engine, prompt: Sequence[int], plain: Sequence[int], right: Tensor, limits: Any
) -> tuple[list[int], bool]:
    """Load a prompt whose plain continuation is known; what the engine makes of it, and if stable.

    In 16 bits a tree's pass may choose otherwise than a plain step where two logits are close; what
    the engine itself wrote is then known, until it writes the same again.
    """
    drafter = engine.drafter
    assert isinstance(drafter, SimulatedDrafter), f"{drafter.name} simulates nothing"
    known = list(plain)
    for _ in range(TRIES):
        drafter.load(len(prompt), known, right)
        [made] = engine.generate([prompt], **limits)
        if made.tokens == known[: len(made.tokens)]:
            return known, True
        known = made.tokens
    return known, False
