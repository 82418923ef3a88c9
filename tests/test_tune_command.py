"""Does `fasteagle tune` write what it found, does loading obey it, and are wrong calls refused?"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused, Run, tiny_target

from fasteagle import demo, load
from fasteagle.commands import one_line_warning
from fasteagle.commands.tune_report import draw, file_text
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.draft.none import NoDrafter
from fasteagle.tree import DynamicTree, Tree, chain, parse_tree, static_tree
from fasteagle.tree_file import TreeWarning, conditions, read_tuned
from fasteagle.tuning.candidates import Candidate
from fasteagle.tuning.costs import Costs
from fasteagle.tuning.race import Speed
from fasteagle.tuning.result import PLAIN, Tuning, label
from fasteagle.tuning.setting import Settings

CHAIN = chain(2)
TABLE = [[0.6, 0.3, 0.05], [0.7, 0.1, 0.1]]
COSTS = Costs({1: 5.0, 4: 8.0}, {0: 1.0, 2: 3.0}, 1.0, {1: 1.0, 8: 2.0}, 0.5)


def tuning(plain: float, tree: Tree = CHAIN) -> Tuning:
    """What a race of chain-2 with plain decoding might find."""
    best = Candidate(tree, 2.0, 10.0)
    speeds = {PLAIN: Speed([plain] * 3, [1.0], 1.0), label(tree): Speed([190.0], [10.5], 2.0)}
    candidates = [best, Candidate(chain(1), 1.5, 9.0), Candidate(static_tree([[0], [1]]), 1.6, 9.5)]
    raced, parts = {label(tree): best}, {label(tree): best._replace(ms=8.0)}
    return Tuning(TABLE, COSTS, candidates, label(tree), speeds, raced, parts, 1.0, 0.5, True, 64)


TREES = (chain(2), static_tree([[0], [1], [0, 0]]), DynamicTree(9, 2, 3))


@pytest.mark.parametrize("tree", TREES, ids=label)
def test_the_file_keeps_the_tree_and_its_figures(tree: Tree, tmp_path: Path) -> None:
    place = conditions(tiny_target())
    file = tmp_path / "tree.json"
    file.write_bytes(file_text(tuning(150.0, tree), place, Settings(), [[1, 2]]))
    assert parse_tree(str(file)) == tree
    found = read_tuned(file)
    assert found == (file, tree, False, 150.0, 190.0, place, True)
    whole = json.loads(file.read_text())
    assert whole["predicted_tokens_per_s"] == 200
    assert whole["by_parts_tokens_per_s"] == 250
    assert whole["acceptance"] == TABLE
    assert whole["race"][label(tree)]["measured"] == 190


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A copy of the embedded head, whose tree.json a test writes."""
    return Path(shutil.copytree(demo.HEAD, tmp_path / "head"))


def write_file(head: Path, plain: float, *, compiled: bool = False, **changes: str | int) -> None:
    target = load(draft="none", device="cpu", dtype="float32").target
    place, settings = conditions(target) | changes, Settings(compiled=compiled)
    (head / "tree.json").write_bytes(file_text(tuning(plain), place, settings, [[1]]))


def drafter_of(head: Path, **asked: Any) -> object:
    return load(demo.BASE, head, device="cpu", dtype="float32", **asked).drafter


def test_a_tuned_tree_is_used_in_silence(head: Path) -> None:
    write_file(head, 150.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafter = drafter_of(head)
    assert isinstance(drafter, EagleDrafter)
    assert drafter.tree == chain(2)


def test_where_plain_decoding_is_faster_it_is_what_load_gives(head: Path) -> None:
    write_file(head, 250.0)
    with pytest.warns(TreeWarning, match="plain decoding is faster here: 250 .* against 190"):
        assert isinstance(drafter_of(head), NoDrafter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in ({"tree": "chain-4"}, {"draft": "eagle"}):
            assert isinstance(drafter_of(head, **asked), EagleDrafter)
    write_file(head, 250.0, compiled=True)
    with pytest.warns(TreeWarning, match="plain decoding is faster here"):
        assert isinstance(drafter_of(head, compiled=True), NoDrafter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "another card"}, "another card"),
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"threads": 64}, "64 threads"),
        ({"compiled": True}, "compiled steps .here not"),
    ],
)
def test_a_tree_from_elsewhere_is_used_with_a_notice(
    head: Path, changes: dict[str, Any], words: str
) -> None:
    write_file(head, 250.0, **changes)  # plain decoding may have been faster there, not here
    with pytest.warns(TreeWarning, match=words):
        assert isinstance(drafter_of(head), EagleDrafter)


def test_the_notice_is_one_line_of_a_command(head: Path, run: Run) -> None:
    write_file(head, 250.0)
    call = ["generate", "--checkpoint_path", demo.BASE, "--draft_checkpoint_path", head]
    with pytest.warns(TreeWarning) as told:
        _, error = run(*call, "--device", "cpu", "--max_new_tokens", "2", "--prompt", "x")
    assert "no draft" in error
    [shown] = [one_line_warning(w.message, w.category, w.filename, w.lineno) for w in told]
    assert shown.startswith("note: plain decoding is faster here: ")
    assert shown.index("\n") == len(shown) - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"tree": [[0, 0]]}', "without its parent"),
        ('{"tree": [[0]], "plain_is_faster": 1}', "plain_is_faster and compiled true or false"),
        ('{"tree": [[0]], "compiled": "yes"}', "plain_is_faster and compiled true or false"),
        ('{"tree": [[0]], "measured_on": "here"}', "measured_on an object"),
        ('{"tree": [[0]], "plain_tokens_per_s": "9"}', "numbers"),
    ],
)
def test_a_wrong_file_is_an_error(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "tree.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_tuned(file)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tree", "chain-3"], "is what tuning finds out"),
        (["--lookup", "3"], "no part of a tree"),
        (["--max_length", "100"], "--max_length is as long as the texts need"),
        (["--draft", "lookup"], "no tree to tune"),
        (["--checkpoint_path", demo.BASE], "give --draft_checkpoint_path"),
        (["--max_nodes", "65"], "give 2 to 64"),
        (["--max_nodes", "1"], "give 2 to 64"),
        (["--temperature", "-1"], "temperature"),
        (["--prompts", "absent.txt"], "--prompts absent.txt does not exist"),
        (["--prompt_ids", "absent.json"], "--prompt_ids absent.json cannot be read"),
        (["--out", "absent/tree.json"], "create it first"),
        (["--plot", "x.json", "--out", "x.json"], "both name"),
        (["--draft_checkpoint_path", "own/er"], "own/er"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else None,
)
def test_a_wrong_call_changes_nothing(flags: list[str], words: str, refused: Refused) -> None:
    refused("tune", "--no_compile", *flags, words=words)


def test_prompts_are_needed_for_a_pair_of_ones_own(refused: Refused) -> None:
    pair = ["--checkpoint_path", demo.BASE, "--draft_checkpoint_path", demo.HEAD]
    refused("tune", "--no_compile", "--out", "t.json", *pair, words="give --prompts FILE")


def test_a_prompt_that_does_not_fit_is_named(tmp_path: Path, run: Run) -> None:
    ids = tmp_path / "ids.json"
    for prompts, words in (([[1] * 250], "prompt 1 has 250"), ([[1], [9999]], "prompt 2 holds")):
        ids.write_text(json.dumps(prompts))
        out = tmp_path / "t.json"
        _, error = run("tune", "--no_compile", "--prompt_ids", ids, "--out", out, status=2)
        assert words in error
        assert not out.exists()


def test_tuning_writes_a_tree_that_loads(head: Path, tmp_path: Path, run: Run) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([[1, 300, 301, 302]]))
    before = torch.get_num_threads()
    out, error = run(
        *("tune", "--no_compile", "--prompt_ids", ids, "--max_new_tokens", "10", "--device", "cpu"),
        *("--checkpoint_path", demo.BASE, "--draft_checkpoint_path", head, "--seconds", "1"),
        *("--repeats", "1", "--racers", "1", "--max_nodes", "6", "--threads", "1"),
    )
    assert torch.get_num_threads() == before
    value = json.loads((head / "tree.json").read_text())
    assert value["same_tokens"]
    assert set(value["race"]) >= {"plain", "chain-3"}  # the tree that was there races too
    assert {"1", "2"} <= set(value["verify_ms"]) <= {"1", "2", "4", "6"}
    trees = [row for name, row in value["race"].items() if name != "plain"]
    best = max(row["over_plain"] for row in trees)
    plain = value["plain_tokens_per_s"]
    assert value["measured_tokens_per_s"] == max(row["measured"] for row in trees)
    assert value["measured_tokens_per_s"] == pytest.approx(best * plain, rel=2e-3)
    assert value["plain_is_faster"] == (best <= 1)
    assert "wrote" in error
    assert "plain" in out
    assert parse_tree(str(head / "tree.json")).n_nodes <= 6


def test_what_was_found_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "t.png"
    with file.open("wb") as picture:
        draw(tuning(150.0), conditions(tiny_target()), picture)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
