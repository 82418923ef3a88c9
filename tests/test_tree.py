"""Do trees say who follows whom, do masks say who sees whom, and are bad trees refused?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import MC_SIM, tree_choices
from hypothesis import given, settings
from hypothesis import strategies as st

from fasteagle.tree import (
    MAX_NODES,
    MC_SIM_7B_63,
    StaticTree,
    ancestors,
    causal_mask,
    chain,
    parse_tree,
    static_tree,
    tree_mask,
)


def random_parents(rng: random.Random, n_nodes: int) -> list[int]:
    return [0, *(rng.randrange(n) for n in range(1, n_nodes))]


def walk_up(parents: list[int], node: int) -> set[int]:
    """The slow twin of `ancestors`: one node at a time."""
    seen = {node}
    while node:
        node = parents[node]
        seen.add(node)
    return seen


def test_mc_sim_is_the_published_table() -> None:
    # Derived from figure 7 of arXiv 2401.15077 by the official code, node by node.
    parents = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5, 6, 6, 7, 7, 8, 13, 13, 13, 21, 21]
    rank = [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 2, 0, 1]
    assert list(MC_SIM.parents[1:]) == parents
    assert list(MC_SIM.rank[1:]) == rank
    assert list(MC_SIM.depth) == [0] + [1] * 4 + [2] * 8 + [3] * 8 + [4] * 3 + [5] * 2
    assert (MC_SIM.n_nodes, MC_SIM.n_path) == (26, 6)
    assert [len(MC_SIM.internal(depth)) for depth in range(6)] == [1, 4, 4, 1, 1, 0]


@settings(deadline=None, max_examples=60)
@given(choices=tree_choices())
def test_a_static_tree_holds_exactly_its_choices(choices: list[list[int]]) -> None:
    tree = static_tree(choices)
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.n_nodes):
        assert tree.parents[node] < node
        paths.append((*paths[tree.parents[node]], tree.rank[node]))
        assert tree.depth[node] == len(paths[-1])
    assert sorted(paths[1:]) == sorted(map(tuple, choices))
    assert paths == sorted(paths, key=lambda path: (len(path), path))
    assert tree.n_path == max(map(len, choices)) + 1


@settings(deadline=None, max_examples=30)
@given(choices=tree_choices(), seed=st.integers(0, 99))
def test_the_order_of_the_choices_does_not_matter(choices: list[list[int]], seed: int) -> None:
    assert static_tree(random.Random(seed).sample(choices, len(choices))) == static_tree(choices)


@pytest.mark.parametrize("length", range(1, 8))
def test_a_chain_is_a_row(length: int) -> None:
    tree = chain(length)
    assert tree.parents == (0, *range(length))
    assert (tree.n_nodes, tree.n_path, set(tree.rank)) == (length + 1, length + 1, {0})


@settings(deadline=None, max_examples=40)
@given(n_nodes=st.integers(1, 40), seed=st.integers(0, 999))
def test_ancestors_equal_walking_up(n_nodes: int, seed: int) -> None:
    rng = random.Random(seed)
    trees = [random_parents(rng, n_nodes) for _ in range(3)]
    found = ancestors(torch.tensor(trees), n_nodes)
    for parents, above in zip(trees, found, strict=True):
        for node in range(n_nodes):
            assert set(above[node].nonzero()[:, 0].tolist()) == walk_up(parents, node)


def test_ancestors_reach_the_root_for_any_depth() -> None:
    # The number of doublings changes at 1, 2, 4, 8, ...: a chain shows an early end.
    for n_path in range(1, 20):
        parents = torch.tensor([[0, *range(n_path - 1)]])
        assert ancestors(parents, n_path)[0, -1].all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), n_slots=st.integers(8, 40), n_nodes=st.integers(1, 8))
def test_tree_rows_see_the_past_and_their_ancestors(seed: int, n_slots: int, n_nodes: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randrange(n_slots - n_nodes + 1) for _ in range(2)]
    parents = [random_parents(rng, n_nodes) for _ in range(2)]
    above = ancestors(torch.tensor(parents), n_nodes)
    mask = tree_mask(torch.tensor(lengths), above, n_slots)
    for row, length in enumerate(lengths):
        for node in range(n_nodes):
            seen = set(range(length)) | {length + n for n in walk_up(parents[row], node)}
            assert set(mask[row, node].nonzero()[:, 0].tolist()) == seen


def test_causal_rows_see_up_to_themselves() -> None:
    mask = causal_mask(torch.tensor([[0, 1, 4]]), 6)[0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def test_trees_are_read_as_users_write_them(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps([[0], [0, 1]]))
    assert parse_tree("mc_sim_7b_63") == MC_SIM
    assert parse_tree("chain-5") == parse_tree("chain5") == parse_tree("chain_5") == chain(5)
    assert parse_tree(" [[0], [0, 1]]") == parse_tree(str(file)) == static_tree([[0], [0, 1]])
    assert parse_tree(json.dumps(MC_SIM_7B_63)) == MC_SIM


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0], [0, 0]", "not JSON"),
        ("[]", "list of paths"),
        ("[0]", "list of ranks"),
        ("[[]]", "list of ranks"),
        ("[[0], [-1]]", "list of ranks"),
        ("[[0], [0.0]]", "list of ranks"),
        ("[[0], [true]]", "list of ranks"),
        ('[["0"]]', "list of ranks"),
        ("[[0], [null]]", "list of ranks"),
        ("[[0], [0]]", "twice"),
        ("[[0], [1, 0]]", "without its parent"),
        ("[[0, 0]]", "without its parent"),
        (json.dumps([[0] * n for n in range(1, MAX_NODES + 1)]), "at most"),
        ("chain-0", "a chain has 1 to 255 tokens"),
        (f"chain-{MAX_NODES}", "a chain has 1 to 255 tokens"),
        ("chain-", "neither"),
        ("chain-1.5", "neither"),
        ("missing/tree.json", "neither"),
        ("", "neither"),
        ("x" * 5000, "neither"),  # too long for a file name
        ("[" * 100_000, "not JSON"),  # too deep for the parser
    ],
    ids=lambda text: text[:20],
)
def test_a_malformed_tree_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_tree(text)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "7", "[[1], [0, 0]]", "[[0], [0]]"])
def test_a_malformed_tree_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"tree\.json"):
        parse_tree(str(file))


def test_a_tree_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_bytes(b"[[0], [\xff]]")
    with pytest.raises(ValueError, match=r"tree\.json|utf-8"):
        parse_tree(str(file))


def test_the_largest_tree_is_accepted() -> None:
    assert chain(MAX_NODES - 1).n_nodes == MAX_NODES
    wide = static_tree([[rank] for rank in range(MAX_NODES - 1)])
    assert isinstance(wide, StaticTree)
    assert wide.n_path == 2
