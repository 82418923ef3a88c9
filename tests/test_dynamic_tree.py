"""Is a dynamic tree EAGLE-2's: the likeliest paths, parents before children, whatever ties?

B batch  N tree nodes  V vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VOCAB, eagle, plain_decode, prompt, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasteagle.draft.base import Room
from fasteagle.draft.grow import Place, TreeDrafter
from fasteagle.engine import Engine
from fasteagle.model import run_block
from fasteagle.tree import MAX_NODES, DynamicTree, ancestors, parse_tree

ROOM = Room(None, 64, run_block)


class TableDrafter(TreeDrafter):
    """A model whose next token depends on the last two: its state is the row of a table.

    table `[V * V, V]` holds logits; a state is (last token, logits).
    """

    def __init__(self, tree: DynamicTree, table: Tensor) -> None:
        super().__init__(tree, n_guesses=table.shape[1], device=table.device)
        self.table, self.places = table, []  # type: ignore[var-annotated]

    def start(self, root: Tensor) -> Tensor:
        return torch.cat((root.float(), self.table[root[:, 0]]), 1)[:, None]

    def step(self, tokens: Tensor, state: Tensor, place: Place, room: Room) -> Tensor:
        self.places.append(place)
        before = state[..., 0].long()
        rows = self.table[before * self.table.shape[1] + tokens]
        return torch.cat((tokens[..., None].float(), rows), -1)

    def logits(self, state: Tensor) -> Tensor:
        return state[..., 1:]


def grown(tree: DynamicTree, table: Tensor, roots: list[int]) -> tuple[list[Any], list[Any]]:
    drafter, root = TableDrafter(tree, table), torch.tensor(roots)[:, None]
    made = drafter.grow(drafter.start(root), root, torch.full((len(roots),), 7), ROOM)
    for depth, place in enumerate(drafter.places, 1):
        assert (place.depth, place.offset) == (depth, (depth - 1) * tree.top_k)
        assert place.above.shape == (len(roots), tree.top_k, depth * tree.top_k)
        assert bool((place.above.sum(-1) == depth).all())
    return made.tokens.tolist(), made.parents.tolist()


def by_hand(tree: DynamicTree, table: Tensor, root: int) -> tuple[list[int], list[int]]:
    """The slow twin, on lists: nodes are (score, token, parent), in the order they are made."""
    size, k = table.shape[1], tree.top_k

    def children(row: int) -> list[tuple[float, int]]:
        scores = table[row].log_softmax(-1)
        order = torch.topk(scores, k).indices.tolist()
        return [(min(float(scores[token]), 0.0), token) for token in order]

    nodes = [(score, token, -1) for score, token in children(root)]
    frontier = list(range(k))
    for depth in range(tree.depth):
        made = []
        for node in frontier:
            score, token, parent = nodes[node]
            before = nodes[parent][1] if parent >= 0 else root
            for more, child in children(before * size + token):
                total = torch.tensor(score) + torch.tensor(more)  # float32, as on the device
                made.append((float(total), child, node))
        if depth < tree.depth - 1:
            order = sorted(range(len(made)), key=lambda i: -made[i][0])[:k]
            frontier = [len(nodes) + i for i in order]
        nodes += made
    best = sorted(range(len(nodes)), key=lambda i: -nodes[i][0])[: tree.n_nodes - 1]
    kept = sorted(best)
    number = {-1: 0} | {node: 1 + i for i, node in enumerate(kept)}
    tokens = [root] + [nodes[node][1] for node in kept]
    return tokens, [0] + [number[nodes[node][2]] for node in kept]


@st.composite
def dynamic_trees(draw: st.DrawFn) -> DynamicTree:
    k, depth = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    n_nodes = draw(st.integers(2, 1 + min(k + depth * k * k, 40)))
    return DynamicTree(n_nodes, depth, k)


@settings(deadline=None, max_examples=60)
@given(tree=dynamic_trees(), seed=st.integers(0, 999))
def test_the_tree_is_that_of_the_slow_twin(tree: DynamicTree, seed: int) -> None:
    table = torch.randn(36, 6, generator=torch.Generator().manual_seed(seed)) * 2
    tokens, parents = grown(tree, table, [0, 3, 5])
    for row, root in enumerate((0, 3, 5)):
        assert (tokens[row], parents[row]) == by_hand(tree, table, root)


#   all logits equal: every node of a depth ties with every other
#   one logit far above the others: log p = 0, so a child ties with its parent
#   both kinds of row in one table
TIED = {
    "equal": lambda rows: torch.zeros_like(rows),
    "certain": lambda rows: torch.full_like(rows, -1e4).scatter(1, rows.argmax(1)[:, None], 1e4),
    "mixed": lambda rows: torch.where(torch.arange(len(rows))[:, None] % 2 == 0, 0.0, rows * 1e4),
}


@settings(deadline=None, max_examples=30)
@given(tree=dynamic_trees(), seed=st.integers(0, 99), kind=st.sampled_from(sorted(TIED)))
def test_tied_scores_keep_parents_before_children(tree: DynamicTree, seed: int, kind: str) -> None:
    rows = torch.rand(36, 6, generator=torch.Generator().manual_seed(seed))
    table = TIED[kind](rows)
    if kind == "certain":
        assert float(table.log_softmax(-1).max(-1).values.min()) == 0.0
    tokens, parents = grown(tree, table, [1, 4])
    above = ancestors(torch.tensor(parents), tree.n_path)
    for row, root in enumerate((1, 4)):
        assert (tokens[row], parents[row]) == by_hand(tree, table, root)
        assert all(parent < node for node, parent in enumerate(parents[row]) if node)
        siblings = list(zip(parents[row][1:], tokens[row][1:], strict=True))
        assert len(set(siblings)) == len(siblings)
        # With a parent at its right place, depths add up: a node is one deeper than its parent.
        depth = (above[row].sum(-1) - 1).tolist()
        assert all(depth[n] == depth[p] + 1 for n, p in enumerate(parents[row]) if n)
        assert max(depth) < tree.n_path


def test_a_certain_model_makes_its_own_text_the_tree() -> None:
    # After a comes b, after b comes c ...: log p = 0 all along, so the whole path is kept.
    size = 6
    table = torch.full((size * size, size), -1e4)
    for row in range(size * size):
        table[row, (row % size + 1) % size] = 1e4
    tokens, parents = grown(DynamicTree(5, 3, 2), table, [0])
    path = [0]
    for token in range(1, 5):
        path += [n for n, t in enumerate(tokens[0]) if t == token and parents[0][n] == path[-1]][:1]
    assert [tokens[0][n] for n in path] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tree", ["dynamic-2-0-1", "dynamic-4-2-1", "dynamic-21-4-3"])
def test_any_dynamic_tree_is_lossless_through_the_engine(tree: str) -> None:
    target = tiny_target()
    prompts = [prompt(length) for length in (3, 17)]
    shape = parse_tree(tree)
    engine = Engine(target, eagle(target, shape), batch=2, prefill_chunk=8)
    for tokens, result in zip(
        prompts, engine.generate(prompts, max_new_tokens=20, stop_ids=[]), strict=True
    ):
        assert result.tokens == plain_decode(target, tokens, 20)
    assert engine.drafter.n_nodes == shape.n_nodes
    assert engine.drafter.is_chain == (shape.width == 1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 5, 10), "at least"),
        ((60, -1, 10), "at least"),
        ((60, 5, 0), "at least"),
        ((12, 0, 10), "10 guesses"),
        ((MAX_NODES + 1, 9, 30), f"at most {MAX_NODES}"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DynamicTree(*sizes)


def test_a_dynamic_tree_is_read_from_text_and_files(tmp_path: Any) -> None:
    assert parse_tree("dynamic") == DynamicTree(60, 5, 10)
    assert parse_tree("dynamic-26-5-6") == DynamicTree(26, 5, 6)
    assert parse_tree(parse_tree("dynamic-26-5-6").name) == DynamicTree(26, 5, 6)
    file = tmp_path / "tree.json"
    file.write_text('{"total_tokens": 9, "depth": 2}')
    assert parse_tree(str(file)) == DynamicTree(9, 2, 10)
    file.write_text('{"total_tokens": 9, "levels": 2}')
    with pytest.raises(ValueError, match="levels"):
        parse_tree(str(file))


def test_a_tree_wider_than_the_vocabulary_is_refused() -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match="vocabulary of 20"):
        eagle(target, DynamicTree(30, 2, VOCAB + 1))
