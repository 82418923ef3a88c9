"""Is the accepted path the one that the target's choices spell?"""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasteagle.accept import Verdict, accept
from fasteagle.tree import DraftTree, ancestors


def verdict(
    tokens: list[list[int]], parents: list[list[int]], chosen: list[list[int]], n_path: int
) -> Verdict:
    tree = DraftTree(torch.tensor(tokens), torch.tensor(parents))
    return accept(tree, ancestors(tree.parents, n_path), torch.tensor(chosen), n_path=n_path)


def walk_down(tokens: list[int], parents: list[int], chosen: list[int]) -> list[int]:
    """The slow twin: from the root on to the child that carries the chosen token."""
    path = [0]
    while True:
        node = path[-1]
        children = [n for n in range(1, len(tokens)) if parents[n] == node]
        hits = [n for n in children if tokens[n] == chosen[node]]
        if not hits:
            return path
        assert len(hits) == 1, "siblings carry distinct tokens"
        path += hits


def test_accepted_path_follows_target() -> None:
    #   0 +- 1 - 3      target picks 5 after 0, 7 after 1, 9 after 3:  path [0, 1, 3], bonus 9
    #     `- 2
    found = verdict([[4, 5, 6, 7]], [[0, 0, 0, 1]], [[5, 7, 8, 9]], 3)
    assert found.path.tolist() == [[0, 1, 3]]
    assert found.n_accepted.tolist() == [3]
    assert found.emitted.tolist() == [[5, 7, 9]]


def test_a_right_token_under_a_wrong_parent_is_not_accepted() -> None:
    #   0 +- 1 - 3      target picks 6 after 0 and 1 after 2; node 3 matches its own parent only
    #     `- 2
    found = verdict([[4, 5, 6, 7]], [[0, 0, 0, 1]], [[6, 7, 1, 9]], 3)
    assert found.path[0, :2].tolist() == [0, 2]
    assert found.n_accepted.tolist() == [2]
    assert found.emitted[0, :2].tolist() == [6, 1]


def test_nothing_accepted_leaves_the_bonus() -> None:
    found = verdict([[4, 5, 6]], [[0, 0, 0]], [[8, 5, 6]], 2)
    assert found.path[0, 0] == 0
    assert found.n_accepted.tolist() == [1]
    assert found.emitted[0, 0] == 8


def test_token_zero_is_a_token_like_any_other() -> None:
    found = verdict([[3, 0, 0]], [[0, 0, 1]], [[0, 0, 0]], 3)
    assert found.n_accepted.tolist() == [3]
    assert found.emitted.tolist() == [[0, 0, 0]]


def test_a_lone_root_emits_the_choice() -> None:
    found = verdict([[3]], [[0]], [[9]], 1)
    assert (found.path.tolist(), found.emitted.tolist()) == ([[0]], [[9]])


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10**6), n_nodes=st.integers(1, 20), vocab=st.integers(2, 6))
def test_acceptance_equals_walking_down(seed: int, n_nodes: int, vocab: int) -> None:
    # Few tokens, so that paths match by chance; the rows of a batch have trees of their own.
    rng = random.Random(seed)
    rows = []
    for _ in range(3):
        tokens, parents = [0], [0]
        while len(tokens) < n_nodes:
            parent = rng.randrange(len(tokens))
            used = {tokens[n] for n in range(1, len(tokens)) if parents[n] == parent}
            if len(used) < vocab:
                tokens.append(rng.choice([t for t in range(vocab) if t not in used]))
                parents.append(parent)
        rows.append((tokens, parents, [rng.randrange(vocab) for _ in tokens]))
    found = verdict(*([row[part] for row in rows] for part in range(3)), n_nodes)
    for row, (tokens, parents, chosen) in enumerate(rows):
        path = walk_down(tokens, parents, chosen)
        count = int(found.n_accepted[row])
        assert found.path[row, :count].tolist() == path
        bonus = chosen[path[-1]]
        assert found.emitted[row, :count].tolist() == [*(tokens[n] for n in path[1:]), bonus]
        assert (found.path[row] < n_nodes).all()
        assert (found.path[row, count:] == 0).all()
