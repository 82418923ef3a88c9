"""Is Lookahead the paper's: its tree, its window, its pool, round by round against a slow twin?

W window columns  N n-gram length  G guesses
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import CPU, plain_decode, prompt, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from fasteagle.draft.base import Accepted, Room, Verified
from fasteagle.draft.lookahead import LookaheadDrafter, Pool, window_parents
from fasteagle.engine import Engine
from fasteagle.model import Transformer, run_block
from fasteagle.tree import DraftTree, ancestors

Gram = tuple[int, ...]


class Twin:
    """Lookahead in plain Python: a list of all n-grams written, a pass for every prediction."""

    def __init__(
        self, target: Transformer, tokens: list[int], sizes: tuple[int, int, int], memory: int
    ) -> None:
        self.target, self.memory = target, memory
        self.width, self.ngram, self.n_guesses = sizes
        self.text, self.written, self.accepted = list(tokens[:1]), list[Gram](), list[int]()
        self.extend([*tokens[1:], *plain_decode(target, tokens, 1)])
        period = self.width + self.ngram - 3
        self.window = [
            [self.text[-1 - (period - level - i) % len(self.text)] for i in range(self.width)]
            for level in range(self.ngram - 1)
        ]

    def extend(self, tokens: list[int]) -> None:
        """More text, with the n-grams that it completes."""
        for token in tokens:
            self.text.append(token)
            if len(self.text) >= self.ngram:
                self.written.append(tuple(self.text[-self.ngram :]))

    def guesses(self) -> list[list[int]]:
        root = self.text[-1]
        newest = dict.fromkeys(reversed(self.written[-self.memory :]))  # each once
        found = [list(gram[1:]) for gram in newest if gram[0] == root][: self.n_guesses]
        return found + [[root] * (self.ngram - 1)] * (self.n_guesses - len(found))

    def tokens(self) -> list[int]:
        """The tree's tokens, in its order."""
        first, *others = self.window
        window = [*first[1:], *itertools.chain(*others)]
        return [self.text[-1], *itertools.chain(*self.guesses()), *window]

    def columns(self) -> list[list[int]]:
        """What every column has below level 0."""
        return [[level[i] for level in self.window[1:]] for i in range(self.width)]

    def round(self) -> None:
        first, below = [self.text[-1], *self.window[0][1:]], self.columns()
        paths = [[*first[1 : i + 1], *column] for i, column in enumerate(below)]
        chosen = [plain_decode(self.target, [*self.text, *path], 1)[0] for path in paths]
        grams = [(first[i], *below[i], chosen[i]) for i in range(self.width)]
        truth = plain_decode(self.target, self.text, self.width + self.ngram)
        matches = [
            sum(itertools.accumulate((a == b for a, b in zip(p, truth, strict=False)), min))
            for p in paths + self.guesses()
        ]
        self.accepted.append(max(matches))
        self.written += grams
        self.extend(truth[: max(matches) + 1])
        self.window = [[gram[level] for gram in grams] for level in range(1, self.ngram)]


SIZES = {
    "usual": ((3, 4, 3), 4096),
    "forgetful": ((4, 3, 2), 7),  # less than a prefill chunk writes
    "two_grams": ((3, 2, 2), 4096),
    "one_column": ((1, 3, 1), 20),
    "least": ((1, 2, 1), 20),
}


def drafter_of(sizes: tuple[int, int, int], memory: int = 4096) -> LookaheadDrafter:
    window, ngram, guesses = sizes
    return LookaheadDrafter(CPU, window=window, ngram=ngram, guesses=guesses, pool=memory)


@pytest.mark.parametrize(("sizes", "memory"), SIZES.values(), ids=SIZES)
def test_every_round_is_the_twins(sizes: tuple[int, int, int], memory: int) -> None:
    target, prompts = tiny_target(), [prompt(2), prompt(19), [3, 1, 4, 1, 5] * 5]
    engine = Engine(target, drafter_of(sizes, memory), batch=3, prefill_chunk=8)
    rows = engine.rows([engine.request(p, max_new_tokens=24, stop_ids=[]) for p in prompts])
    twins = [Twin(target, tokens, sizes, memory) for tokens in prompts]
    for _ in engine.decode(rows):
        for index, (row, twin) in enumerate(zip(rows, twins, strict=True)):
            if row.done:
                continue
            if row.stats.accepted:
                twin.round()
            assert twin.text == [*row.request.prompt, *row.tokens]
            assert engine.state.tree.tokens[index].tolist() == twin.tokens()
            assert row.stats.accepted == twin.accepted
    assert sum(sum(twin.accepted) for twin in twins) > 0
    if memory < 20:
        assert all(len(twin.written) > memory for twin in twins)


#   root, w1, w2 in a row, and below each of them a column: every node sees its own past only
@pytest.mark.parametrize("sizes", [(3, 4, 2), (1, 2, 1), (7, 5, 7), (4, 2, 3)])
def test_the_tree_has_the_papers_mask_and_positions(sizes: tuple[int, int, int]) -> None:
    window, ngram, guesses = sizes
    parents = torch.tensor([window_parents(window, ngram, guesses)])
    drafter = drafter_of(sizes)
    assert parents.shape[1] == drafter.n_nodes == (ngram - 1) * (window + guesses)
    above = ancestors(parents, drafter.n_path)[0]
    depth = above.sum(-1) - 1
    assert int(depth.max()) == drafter.n_path - 1
    first = 1 + guesses * (ngram - 1)
    for guess, step in itertools.product(range(guesses), range(ngram - 1)):
        begin = 1 + guess * (ngram - 1)
        seen = above[begin + step].nonzero()[:, 0].tolist()
        assert seen == [0, *range(begin, begin + step + 1)]
    nodes = [0, *range(first, drafter.n_nodes)]  # level by level
    for level, i in itertools.product(range(ngram - 1), range(window)):
        row = nodes[level * window + i]
        column = [nodes[other * window + i] for other in range(1, level + 1)]
        assert above[row].nonzero()[:, 0].tolist() == sorted([*nodes[: i + 1], *column])
        assert int(depth[row]) == level + i


@settings(deadline=None, max_examples=100)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.booleans()), max_size=6),
        max_size=6,
    ),
    size=st.integers(2, 9),
)
def test_the_pool_holds_the_newest_of_what_was_written(
    batches: list[list[tuple[int, int, bool]]], size: int
) -> None:
    pool, written = Pool(1, 2, CPU, size=size), list[Gram]()
    for batch in batches:
        if not batch:
            continue
        rows = torch.tensor([[(a, b) for a, b, _ in batch]])
        pool.insert(rows, torch.tensor([[valid for *_, valid in batch]]))
        written += [(a, b) for a, b, valid in batch if valid]
        for root in range(3):
            newest = dict.fromkeys(reversed(written[-size:]))
            wanted = [b for a, b in newest if a == root][:2]
            found = pool.newest(torch.tensor([[root]]), 2)[0, :, 0].tolist()
            assert found == wanted + [root] * (2 - len(wanted))


def test_a_row_without_news_keeps_its_memory_and_a_new_sequence_forgets() -> None:
    drafter, generator = drafter_of((3, 4, 2)), torch.Generator().manual_seed(0)
    memory = drafter.new_memory(3, 32)
    memory.window.random_(20, generator=generator)
    memory.pool.grams.random_(20, generator=generator)
    memory.pool.count.fill_(9)
    before = [tensor.clone() for tensor in drafter.volatile(memory)]
    rows = torch.randint(20, (3, 5), generator=generator)
    start, n_valid = torch.tensor([6, 0, 6]), torch.tensor([0, 3, 2])
    news = Accepted(torch.zeros(3, 5, 1), rows, rows, start, n_valid)
    tree = DraftTree(torch.ones(3, drafter.n_nodes).long(), drafter.parents.expand(3, -1))
    rounds = [(None, 1, 1), (Verified(tree, tree.tokens), 3 + 1, 1 + 1)]  # columns are all equal
    for verified, n_written, n_distinct in rounds:
        drafter.extend(news._replace(verified=verified), Room(memory, 32, run_block))
        window, grams, count = drafter.volatile(memory)
        assert torch.equal(window[0], before[0][0])
        assert torch.equal(grams[0, :-1], before[1][0, :-1])  # the last takes what is not wanted
        assert count[0] == 9
        assert set(memory.history.tokens[0, :7].tolist()) == {0}
        assert int(count[1]) == n_written
        assert int((grams[1, :-1, 0] >= 0).sum()) == n_distinct
        assert int(count[2]) > 9


def test_a_text_is_guessed_alike_whatever_was_decoded_before() -> None:
    target = tiny_target()
    engine, tokens = Engine(target, drafter_of((3, 4, 3))), [3, 1, 4, 1, 5] * 3
    first = engine.generate([tokens], max_new_tokens=30, stop_ids=[])[0]
    engine.generate([prompt(30)], max_new_tokens=40, stop_ids=[])
    again = engine.generate([tokens], max_new_tokens=30, stop_ids=[])[0]
    assert again.tokens == first.tokens == plain_decode(target, tokens, 30)
    assert again.stats.accepted == first.stats.accepted


def test_the_embedded_base_guesses_its_own_text(engine: Engine) -> None:
    texts = ["import os\n", "class Reader:\n    def __init__(self, name):\n"]
    ahead = Engine(engine.target, LookaheadDrafter(CPU), tokenizer=engine.tokenizer, batch=2)
    results = ahead.generate(texts, max_new_tokens=60, stop_ids=[])
    assert min(result.stats.accept_length for result in results) > 2
    assert [result.tokens for result in results] == [
        result.tokens for result in engine.generate(texts, max_new_tokens=60, stop_ids=[])
    ]


@pytest.mark.parametrize(
    "sizes", [{"window": 0}, {"ngram": 1}, {"guesses": 0}, {"window": 58}, {"window": -1}]
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at most 256 are supported"):
        LookaheadDrafter(CPU, **sizes)
    assert LookaheadDrafter(CPU, window=57).n_nodes == 256
