"""Does every round repeat what the official EAGLE code did on a trained pair?"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import GOLDEN, MC_SIM

from fasteagle.assemble import load_drafter
from fasteagle.checkpoint import load_target
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer

# File, head, tree, tokens a target forward over the eight cases (tests/golden/README.md).
RECORDS = {
    "eagle1": ("eagle1", "mc_sim_7b_63", 4.89),
    "eagle2": ("eagle1", "dynamic-26-5-6", 5.15),
    "eagle3": ("eagle3", "dynamic-32-5-8", 4.86),
}
CASES = {name: json.loads((GOLDEN / f"{name}.json").read_text())["cases"] for name in RECORDS}


@pytest.fixture(scope="module")
def target() -> Transformer:
    return load_target(GOLDEN / "byte_pair" / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def drafters(target: Transformer) -> dict[str, Drafter]:
    return {
        name: load_drafter(GOLDEN / "byte_pair" / head, target, tree=tree)
        for name, (head, tree, _) in RECORDS.items()
    }


def tree_of(engine: Engine) -> Any:
    tokens, parents = (side[0].tolist() for side in engine.state.tree)
    if engine.drafter.is_static:
        assert parents == list(MC_SIM.parents)
        return tokens
    return {"tokens": tokens, "parents": parents}


@pytest.mark.parametrize("name", RECORDS)
def test_every_tree_and_every_acceptance_is_the_official_one(
    name: str, target: Transformer, drafters: dict[str, Drafter]
) -> None:
    engine, accepted = Engine(target, drafters[name]), []
    for case in CASES[name]:
        # The official output leaves out the last bonus token, which is chosen but not committed.
        limit = len(case["output"]) + 1
        rows = engine.rows([engine.request(case["prompt"], max_new_tokens=limit, stop_ids=[])])
        trees = [tree_of(engine) for _ in engine.decode(rows)]
        result = rows[0].result()
        assert result.tokens[:-1] == case["output"]
        assert result.stats.accepted == case["accepted"]
        assert trees[: len(case["trees"])] == case["trees"]
        assert len(trees) == len(case["trees"]) + 1
        accepted += case["accepted"]
    assert sum(accepted) / len(accepted) + 1 == pytest.approx(RECORDS[name][2], abs=0.01)


def test_plain_decoding_writes_the_official_output(target: Transformer) -> None:
    plain, cases = Engine(target), CASES["eagle1"]
    for case in cases:
        limit = len(case["output"])
        result = plain.generate([case["prompt"]], max_new_tokens=limit, stop_ids=[])[0]
        assert result.tokens == case["output"]


@pytest.mark.parametrize("name", RECORDS)
def test_the_golden_cases_in_one_batch_write_the_same(
    name: str, target: Transformer, drafters: dict[str, Drafter]
) -> None:
    cases = CASES[name]
    engine = Engine(target, drafters[name], batch=len(cases))
    results = engine.generate([case["prompt"] for case in cases], max_new_tokens=80, stop_ids=[])
    for result, case in zip(results, cases, strict=True):
        assert result.tokens == case["output"][:80]
        n_whole = len(result.stats.accepted) - 1  # the limit may cut the last round
        assert result.stats.accepted[:n_whole] == case["accepted"][:n_whole]
