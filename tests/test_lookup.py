"""Does lookup guess what followed the longest, newest match, and does it add that to a tree?

B batch  T cache slots  N tree nodes
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CPU,
    SMALL,
    VOCAB,
    Run,
    decode,
    eagle,
    plain_decode,
    prompt,
    tiny_drafter,
    tiny_target,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_drafters import RandomDrafter

from fasteagle import load
from fasteagle.commands import doctor
from fasteagle.draft.base import Accepted, Drafter
from fasteagle.draft.choice import BY_NAME
from fasteagle.draft.history import History
from fasteagle.draft.hybrid import HybridDrafter
from fasteagle.draft.kinds import DRAFTERS as KINDS
from fasteagle.draft.lookup import LookupDrafter, look_up
from fasteagle.engine import Engine
from fasteagle.tree import DraftTree, DynamicTree, Tree, chain, static_tree

REPETITIVE = "class Reader:\n    def __init__(self, name):\n"  # the embedded base goes on so


def twin(tokens: Sequence[int], ngram: int, n_guesses: int) -> list[int]:
    """The slow twin: a dictionary of all n-grams and of what came after their newest occurrence."""
    text = list(tokens)
    for n in range(ngram, 0, -1):
        after = {tuple(text[i : i + n]): i + n for i in range(len(text) - n)}
        if tuple(text[-n:]) in after and n <= len(text):
            at = after[tuple(text[-n:])]
            for index in range(at, at + n_guesses):
                text.append(text[index])  # past the end it reads what it just wrote
            return text[-n_guesses:]
    return [text[-1]] * n_guesses


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    rest=st.lists(st.integers(0, 3), max_size=6),
    ngram=st.integers(1, 5),
    n_guesses=st.integers(1, 9),
)
def test_a_guess_follows_the_longest_and_then_newest_match(
    text: list[int], rest: list[int], ngram: int, n_guesses: int
) -> None:
    # What lies behind the text is junk, and the rows of a batch do not see each other.
    rows = torch.tensor([text + rest, [1] * len(text + rest)])
    length = torch.tensor([len(text) - 1, 0])
    guesses = look_up(rows, length, ngram=ngram, n_guesses=n_guesses)
    assert guesses.tolist() == [twin(text, ngram, n_guesses), [1] * n_guesses]


def test_the_example_of_the_docstring() -> None:
    rows, length = torch.tensor([[5, 6, 7, 8, 5, 6]]), torch.tensor([5])
    assert look_up(rows, length, ngram=3, n_guesses=5).tolist() == [[7, 8, 5, 6, 7]]


def test_history_is_the_text_and_a_row_without_news_keeps_it() -> None:
    history = History(2, 8, CPU)
    history.tokens.fill_(9)
    pieces = [  # tokens, following, start, n_valid; what is past n_valid is junk
        ([[1, 2, 7], [7, 7, 7]], [[2, 3, 7], [7, 7, 7]], [0, 4], [2, 0]),
        ([[3, 7, 7], [7, 7, 7]], [[4, 7, 7], [7, 7, 7]], [2, 4], [1, 0]),
        ([[4, 5, 6], [7, 7, 7]], [[5, 6, 0], [7, 7, 7]], [3, 7], [3, 0]),
    ]
    for piece in pieces:
        history.write(Accepted(torch.zeros(2, 3, 1), *map(torch.tensor, piece)))
    assert history.tokens[0, :7].tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert history.tokens[1, :5].tolist() == [9] * 5


def rounds_of(
    drafter: Drafter, prompts: list[list[int]], n: int
) -> list[tuple[list[int], DraftTree]]:
    """The text so far, root included, and the tree on it, for every row and round."""
    engine = Engine(tiny_target(), drafter, batch=len(prompts), prefill_chunk=8)
    rows = engine.rows([engine.request(p, max_new_tokens=n, stop_ids=[]) for p in prompts])
    found = []
    for _ in engine.decode(rows):
        for index, row in enumerate(rows):
            if not row.done:
                tree = DraftTree(*(side[index].clone() for side in engine.state.tree))
                found.append(([*row.request.prompt, *row.tokens], tree))
    texts = [plain_decode(tiny_target(), tokens, n) for tokens in prompts]
    assert [row.tokens for row in rows] == texts
    return found


PROMPTS = [prompt(1), prompt(20), [3, 1, 4, 1, 5] * 5]


@pytest.mark.parametrize("ngram", [1, 3])
def test_every_round_drafts_what_the_whole_text_gives(ngram: int) -> None:
    for text, tree in rounds_of(LookupDrafter(CPU, n_guesses=6, ngram=ngram), PROMPTS, 40):
        assert tree.tokens.tolist() == [text[-1], *twin(text, ngram, 6)]
        assert tree.parents.tolist() == [0, 0, 1, 2, 3, 4, 5]


#   a model's tree     lookup says 5 6 7 8     the hybrid, k 2
#   r +- 5 - 6                                 r +- 5 - 6 - 7 - 8
#     `- 9                                       `- 9
@pytest.mark.parametrize(
    "tree", [chain(2), static_tree([[0], [1], [0, 0], [1, 0], [1, 1]]), DynamicTree(12, 3, 4)]
)
def test_lookup_goes_on_where_the_models_tree_ends(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = eagle(tiny_target(), tree), []
    propose = model.propose

    def recorded(*args: object) -> DraftTree:
        made.append(propose(*args))
        return made[-1]

    monkeypatch.setattr(model, "propose", recorded)
    n, depths = tree.n_nodes, set()
    found = rounds_of(HybridDrafter(model, CPU, n_guesses=3), [PROMPTS[2]], 60)
    for (text, whole), alone in zip(found, made, strict=False):
        tokens, parents = whole.tokens.tolist(), whole.parents.tolist()
        assert (tokens[:n], parents[:n]) == (alone.tokens[0].tolist(), alone.parents[0].tolist())
        guesses, node, depth = twin(text, 3, tree.n_path + 2), 0, 0
        while True:
            edges = zip(parents[1:n], tokens[1:n], strict=True)
            below = [m for m, edge in enumerate(edges, 1) if edge == (node, guesses[depth])]
            if not below:
                break
            node, depth = below[0], depth + 1
        assert tokens[n:] == guesses[depth : depth + 3]
        assert parents[n:] == [node, n, n + 1]
        depths.add(depth)
    assert len(depths) > 1, "lookup and the model always or never agreed"


@pytest.mark.parametrize("kind", ["lookup", "lookahead", "hybrid"])
def test_a_row_that_ended_beyond_what_is_read_disturbs_nothing(kind: str) -> None:
    # Rounds go on in the bucket of the short row; the long one is as long as it ended.
    target = tiny_target()
    drafter = tiny_drafter(kind, target, **SMALL[kind])
    engine, prompts, limits = Engine(target, drafter, batch=2), [prompt(120), prompt(3)], [2, 30]
    requests = [
        engine.request(tokens, max_new_tokens=limit, stop_ids=[])
        for tokens, limit in zip(prompts, limits, strict=True)
    ]
    texts = [plain_decode(target, tokens, n) for tokens, n in zip(prompts, limits, strict=True)]
    assert tokens_of(decode(engine, requests)) == texts
    assert min(n_slots for name, n_slots, _ in engine.steps if name == "round") < 120


def test_repetitive_text_is_guessed_in_long_pieces(engine: Engine) -> None:
    target, head = engine.target, engine.drafter
    drafters = [head, LookupDrafter(CPU), HybridDrafter(head, CPU, n_guesses=4)]
    limits = {"max_new_tokens": 60, "stop_ids": []}
    results = [
        Engine(target, drafter, tokenizer=engine.tokenizer).generate([REPETITIVE], **limits)[0]
        for drafter in drafters
    ]
    assert len({tuple(result.tokens) for result in results}) == 1
    alone, lookup, hybrid = (result.stats.accept_length for result in results)
    assert lookup > 4
    assert hybrid > max(lookup, alone)


# ---------------------------------------------------------------- names and flags


def test_a_draft_without_weights_is_a_row_of_both_tables() -> None:
    assert all(KINDS[name].module is None for name in BY_NAME)
    assert {name for name, flags in BY_NAME.items() if flags} == {"lookup", "lookahead"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lookup": 256}, "lookup of 256 tokens; give 1 to 255"),
        ({"lookup": -1}, "lookup of -1 tokens"),
        ({"ngram": 0}, "give an --ngram of 1 to 64"),
    ],
)
def test_sizes_of_lookup_that_cannot_be(options: dict[str, int], words: str) -> None:
    for kind in ("lookup", "hybrid"):
        with pytest.raises(ValueError, match=re.escape(words)):
            tiny_drafter(kind, tiny_target(), **options)


def test_a_tree_without_room_for_lookup_is_refused() -> None:
    with pytest.raises(ValueError, match="256 nodes and --lookup 1 exceed the 256"):
        HybridDrafter(RandomDrafter(256, 9, VOCAB), CPU, n_guesses=1)


@pytest.mark.parametrize(
    ("options", "words", "n_nodes"),
    [
        ({"draft": "none"}, "none", 1),
        ({"draft": "lookup", "lookup": 5, "ngram": 2}, "prompt lookup of 5 tokens after 2", 6),
        ({"draft": "lookahead", "window": 3}, "Lookahead, window 3, n-grams of 5, 7 guesses", 40),
        ({"draft": "eagle", "lookup": 2}, "EAGLE head, tree chain-3, and 2 tokens of prompt", 6),
        ({"lookup": 2, "tree": "dynamic-9-2-3"}, "tree dynamic-9-2-3, and 2 tokens of prompt", 11),
    ],
)
def test_load_makes_the_draft_that_is_asked_for(
    options: dict[str, Any], words: str, n_nodes: int
) -> None:
    drafter = load(device="cpu", **options).drafter
    assert words in drafter.words
    assert drafter.n_nodes == n_nodes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "medium"}, "draft 'medium' is unknown; give one of eagle, none, lookup"),
        ({"draft": "lookup", "tree": "chain-3"}, "--draft lookup has no tree"),
        ({"draft_checkpoint_path": "none", "lookup": 3}, "--draft none guesses nothing"),
        ({"window": 3}, "add --draft lookahead"),
    ],
)
def test_load_refuses_what_a_draft_cannot_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load(device="cpu", **options)


def test_doctor_and_trace_say_what_drafts(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "try_compile", lambda device: "not tried")
    plan, _ = run("doctor", "--draft", "lookahead", "--device", "cpu")
    assert "Lookahead, window 7, n-grams of 5, 7 guesses a round: 56 nodes with the root" in plan
    assert "the draft's memory" in plan
    plan, _ = run("doctor", "--lookup", 4, "--device", "cpu")
    assert "and 4 tokens of prompt lookup: 8 nodes with the root" in plan
    ids, out = tmp_path / "ids.json", tmp_path / "out.json"
    ids.write_text("[[5, 6, 7, 5, 6]]")
    flags = ("--draft", "lookup", "--lookup", 3, "--max_new_tokens", 2, "--out", out)
    run("trace", "--prompt_ids", ids, *flags, "--device", "cpu")
    traced = json.loads(out.read_text())
    assert traced["drafter"] == "prompt lookup of 3 tokens after 3 or fewer"
    assert traced["tree"] is None
    assert [len(tree) for tree in traced["cases"][0]["trees"]][:1] == [4]
