"""Is simulated acceptance what its rates say, and do the speed benches count right?"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, MC_SIM, eagle, plain_decode, prompt, tiny_target

from bench.acceptance import Level, by_rank, follow
from bench.acceptance import count as count_paths
from bench.random_pair import Pair, weigh
from bench.simulated import (
    PAPER,
    SimulatedDrafter,
    by_depth,
    draw,
    expected_accept_length,
    fair_draw,
    parse_rates,
    rehearse,
    walk,
)
from fasteagle.engine import Engine
from fasteagle.tree import DynamicTree, Tree, chain, static_tree

ROOT = Path(__file__).resolve().parents[1]
FORKED = static_tree([[0], [1], [0, 0], [1, 0], [1, 1], [1, 0, 0]])  # its first path is not longest
TREES: dict[str, Tree] = {
    "chain": chain(4), "mc_sim": MC_SIM, "forked": FORKED, "dynamic": DynamicTree(12, 3, 3),
}  # fmt: skip


def simulated(tree: Tree, rates: tuple[float, ...] = PAPER) -> Engine:
    target = tiny_target()
    size = target.config.vocab_size
    drafter = SimulatedDrafter(eagle(target, tree), rates, vocab_size=size, device=CPU)
    return Engine(target, drafter)


def drafter_of(engine: Engine) -> SimulatedDrafter:
    assert isinstance(engine.drafter, SimulatedDrafter)
    return engine.drafter


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("rates", [PAPER, (0.0,), (1.0,)], ids=["paper", "never", "always"])
def test_simulated_rounds_accept_what_was_drawn_and_change_no_token(
    name: str, rates: tuple[float, ...]
) -> None:
    engine, tokens, n = simulated(TREES[name], rates), prompt(9), 60
    depth = engine.drafter.n_path - 1
    known = plain_decode(engine.target, tokens, n + depth + 1)
    right = draw(rates, depth, 120, seed=3)
    drafter_of(engine).load(len(tokens), known, right)
    [made] = engine.generate([tokens], max_new_tokens=n, stop_ids=[])
    assert made.tokens == known[:n]
    if name != "dynamic":
        assert made.stats.accepted == walk(right, len(tokens), n)
    elif rates == (0.0,):
        assert not any(made.stats.accepted)
    else:  # such a tree may be less deep
        assert sum(made.stats.accepted) > 0
        assert max(made.stats.accepted) <= int(right.max())


def test_the_closed_form_is_the_sum_of_products() -> None:
    assert expected_accept_length([0.8, 0.5], 2) == pytest.approx(1 + 0.8 + 0.4)
    assert expected_accept_length([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.2)
    assert expected_accept_length([0.8, 0.5], 1) == pytest.approx(1.8)
    assert by_depth([0.8, 0.5], 4) == [0.8, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("rates", [PAPER, (0.9, 0.2), (0.3,)])
def test_rounds_average_the_closed_form(rates: tuple[float, ...]) -> None:
    tables = [draw(rates, 5, 500, seed) for seed in range(40)]
    rounds = [accepted + 1 for table in tables for accepted in walk(table, 10, 400)]
    error = statistics.stdev(rounds) / len(rounds) ** 0.5
    assert error < 0.05
    assert abs(statistics.mean(rounds) - expected_accept_length(rates, 5)) < 4 * error


def test_a_short_run_is_drawn_near_the_closed_form() -> None:
    prompts = [prompt(9), prompt(14)]
    tables = fair_draw(PAPER, 3, prompts, 24)
    assert not torch.equal(*tables)
    rounds = [
        accepted + 1
        for table, tokens in zip(tables, prompts, strict=True)
        for accepted in walk(table, len(tokens), 24)
    ]
    assert abs(statistics.mean(rounds) - expected_accept_length(PAPER, 3)) < 0.03


@pytest.mark.parametrize("name", TREES)
def test_the_wrapped_drafter_drafts_what_it_would_alone(name: str) -> None:
    target, tokens = tiny_target(), prompt(9)
    trees = []
    for engine in (Engine(target, eagle(target, TREES[name])), simulated(TREES[name])):
        rows = engine.rows([engine.request(tokens, max_new_tokens=4, stop_ids=[])])
        next(engine.decode(rows))
        trees.append(engine.state.tree)
    alone, changed = trees
    assert torch.equal(drafter_of(engine).guessed, alone.tokens)
    assert torch.equal(changed.parents, alone.parents)
    assert not torch.equal(changed.tokens, alone.tokens)


def test_a_text_that_the_engine_leaves_is_learned_from_it() -> None:
    engine, tokens = simulated(chain(3)), prompt(9)
    truth = plain_decode(engine.target, tokens, 30)
    size = engine.target.config.vocab_size
    wrong = [*truth[:7], *((token + 1) % size for token in truth[7:])]
    limits: dict[str, Any] = {"max_new_tokens": 30, "stop_ids": []}
    right = draw((1.0,), 3, 60, 0)
    assert rehearse(engine, tokens, wrong, right, limits) == (truth, True)
    [made] = engine.generate([tokens], **limits)
    assert set(made.stats.accepted[:-2]) == {3}


@pytest.mark.parametrize("text", ["", "0.5,", "1.1", "-0.1,0.5", "a", "nan"])
def test_rates_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give numbers from 0 to 1"):
        parse_rates(text)


def test_a_pruned_vocabulary_makes_the_levels_cheaper() -> None:
    drafter = eagle(tiny_target())
    pair = Pair(drafter.target, drafter.head)  # type: ignore[arg-type]
    full, pruned = weigh(pair), weigh(pair, torch.nn.Linear(32, 8, bias=False))
    assert full.draft_lm_head == full.lm_head
    assert pruned.draft_lm_head == 32 * 8 * 4
    assert pruned.step == full.step
    assert full.round(3) - pruned.round(3) == 3 * (full.lm_head - pruned.draft_lm_head)


def test_a_round_is_followed_down_its_tree() -> None:
    #   7 +- 4         emitted 5, 6, 9
    #     `- 5 - 6
    tree: tuple[list[int], list[int]] = ([7, 4, 5, 6], [0, 0, 0, 2])
    assert follow(*tree, [5, 6, 9]) == [Level(2, 1), Level(1, 0), Level(0, None)]
    assert follow(*tree, [8]) == [Level(2, None)]
    assert follow(*tree, [4, 3]) == [Level(2, 0), Level(0, None)]


def test_acceptance_is_counted_by_depth_and_rank() -> None:
    first, second, none = Level(2, 0), Level(2, 1), Level(2, None)
    found = count_paths([[first, second, none], [second, none], [none]], 3)
    assert found["rounds"] == 3
    assert found["accept_length"] == 2.0
    assert found["by_depth"] == [0.6667, 0.5, 0.0]
    assert found["histogram"] == [1, 1, 1, 0]
    assert found["by_rank"] == by_rank([first, second, second, none, none, none])
    assert found["by_rank"] == [0.1667, 0.3333]
    assert found["by_depth_and_rank"] == [[0.3333, 0.3333], [0.0, 0.5], [0.0, 0.0]]
    assert count_paths([], 1) == {
        "rounds": 0, "accept_length": None, "by_depth": [None], "by_rank": [],
        "by_depth_and_rank": [[]], "histogram": [0, 0],
    }  # fmt: skip


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[Any, str]]:
    """Run a script's command line here: its JSON and its table."""

    def call(line: str) -> tuple[Any, str]:
        name, *flags = line.split()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        runpy.run_path(str(ROOT / f"bench/{name}.py"), run_name="__main__")
        *table, last = capsys.readouterr().out.splitlines()
        return json.loads(last), "\n".join(table)

    return call


Run = Callable[[str], tuple[Any, str]]
EAGER = "--device cpu --no-compile --repeats 1 --rounds 1"


def test_speed_of_random_weights_is_labelled_and_adds_up(run: Run) -> None:
    line = f"speed --size tiny {EAGER} --precisions float32,int4 --max_new_tokens 20 --accept .9,.5"
    result, table = run(f"{line} --draft_vocab 32 --tree chain-3 --context 20")
    assert result["acceptance"] == "simulated"
    assert result["rates"] == [0.9, 0.5]
    assert "SIMULATED acceptance 0.9, 0.5" in table.splitlines()[0]
    assert list(result["precisions"]) == ["float32", "int4"]
    row = result["precisions"]["float32"]
    assert row["identical_tokens"]
    assert row["known_text_is_stable"]
    assert "draft vocabulary 32 of 128" in row["draft"]
    assert row["expected_accept_length"] == pytest.approx(1 + 0.9 + 0.45 + 0.225, rel=1e-3)
    eagle = row["engines"]["eagle"]
    assert eagle["accept_length"] == pytest.approx(row["expected_accept_length"], abs=0.1)
    assert row["engines"]["plain"]["accept_length"] == 1
    assert set(row["round"]["ms"]) == {"plain", "eagle", "draft", "verify", "settle"}
    ceiling = row["ceiling"]["eagle"]
    limit = 1000 * eagle["accept_length"] / ceiling["ms"]
    assert eagle["ceiling_tokens_per_s"] == pytest.approx(limit, rel=2e-3)
    total = (ceiling["weight_bytes"] + ceiling["kv_bytes"]) / result["copy_gb_per_s"] / 1e6
    assert ceiling["ms"] == pytest.approx(total, rel=2e-3)
    assert result["precisions"]["int4"]["ceiling"]["plain"]["ms"] < row["ceiling"]["plain"]["ms"]
    assert row["launches"] is None


def test_speed_of_the_embedded_pair_is_real(run: Run) -> None:
    line = f"speed --size demo {EAGER} --no-parts --prompts 1 --max_new_tokens 12"
    result, table = run(f"{line} --prompt_lengths 8,64")
    assert result["acceptance"] == "real"
    assert "real acceptance" in table
    assert "SIMULATED" not in table
    row = result["precisions"]["float32"]
    assert row["identical_tokens"]
    assert row["engines"]["eagle"]["accept_length"] > 1.3
    assert set(row["ttft_ms"]) == {"8", "64"}
    assert set(row["round"]["ms"]) == {"plain", "eagle"}


def test_acceptance_is_told_apart_by_text_and_temperature(run: Run) -> None:
    result, table = run("acceptance --prompts 1 --max_new_tokens 80")
    assert "real acceptance" in table
    assert set(result["temperatures"]) == {"0", "1"}
    for groups in result["temperatures"].values():
        rounds = {name: found["rounds"] for name, found in groups.items()}
        assert rounds["all"] == rounds["novel"] + rounds["looping"]
        for found in groups.values():
            assert sum(found["histogram"]) == found["rounds"]
            n = max(1, found["rounds"])
            mean = sum(a * times for a, times in enumerate(found["histogram"])) / n
            assert not found["rounds"] or found["accept_length"] == pytest.approx(mean + 1, 1e-3)
    greedy, warm = (result["temperatures"][t]["all"] for t in "01")
    assert greedy["accept_length"] > warm["accept_length"] > 1
    assert len(greedy["by_rank"]) == 4
    assert max(greedy["by_rank"]) == greedy["by_rank"][0]


def test_cost_is_swept_along_every_axis_and_drawn(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "scaling.png"
    axes = "--contexts 32 600 --rows 1 3 --batches 1 2 --sizes --size tiny"
    line = f"scaling {axes} --device cpu --repeats 1 --rounds 1"
    result, _ = run(f"{line} --plot {out}")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert result["out_of_time"] == []
    found = [(p["axis"], p["context"], p["rows"], p["batch"]) for p in result["points"]]
    assert found == [
        ("context", 32, 6, 1), ("context", 600, 6, 1), ("rows", 32, 1, 1), ("rows", 32, 3, 1),
        ("batch", 32, 6, 1), ("batch", 32, 6, 2), ("size", 32, 6, 1),
    ]  # fmt: skip
    short, long, one, three, *_ = result["points"]
    assert long["bytes"]["plain"] > short["bytes"]["plain"]
    assert set(one["ms"]) == {"plain"}
    assert set(three["ms"]) == {"plain", "round", "verify"}
    assert len({p["batch"] for p in result["points"]}) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("speed --accept 2", "'2' is no list of acceptance rates by depth"),
        ("speed --precisions float32,int3", "'int3' is no precision; give some of float32"),
        ("speed --base x", "--base and --head make a pair; give both, or a --size"),
        ("speed --base x --head y --size tiny", "give one of them"),
        ("speed --size tiny --draft_vocab 999", "a number of tokens, 1 to 128"),
        ("speed --size tiny --tree ladder", "--tree 'ladder' is neither"),
        ("speed --size demo --context 300", "but the base has 256; lower --context"),
        ("speed --base nope --head nope", "nope does not exist"),
        ("acceptance --temperatures -1", "'-1' is no temperature"),
        ("acceptance --head x", "--base and --head make a pair"),
        ("acceptance --tree ladder", "--tree 'ladder' is neither"),
        ("acceptance --max_new_tokens 500", "--max_new_tokens 500; a prompt leaves room for 192"),
        ("scaling --tree dynamite", "--tree 'dynamite' is neither"),
        ("scaling --rows 0", "'0' is not a whole number above 0"),
        ("scaling --rows 300", "--rows asks for 300 rows; a tree has at most 256"),
    ],
)
def test_what_cannot_be_measured_ends_in_a_line(
    line: str, words: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(line)
    assert end.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
