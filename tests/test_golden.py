"""Does every round repeat what the official EAGLE-1 code did on a trained pair?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import GOLDEN, MC_SIM

from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.engine import Engine
from fasteagle.model import Transformer

CASES = json.loads((GOLDEN / "eagle1.json").read_text())["cases"]


@pytest.fixture(scope="module")
def engine(golden_pair: tuple[Transformer, EagleHead]) -> Engine:
    target, head = golden_pair
    return Engine(target, EagleDrafter(head, target, MC_SIM))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_tree_and_every_acceptance_is_the_official_one(
    engine: Engine, case: dict[str, Any]
) -> None:
    # The official output leaves out the last bonus token, which is chosen but not committed.
    limit = len(case["output"]) + 1
    rows = engine.rows([engine.request(case["prompt"], max_new_tokens=limit, stop_ids=[])])
    trees = [engine.state.tree.tokens[0].tolist() for _ in engine.decode(rows)]
    result = rows[0].result()
    assert result.tokens[:-1] == case["output"]
    assert result.stats.accepted == case["accepted"]
    assert trees[: len(case["trees"])] == case["trees"]
    assert len(trees) == len(case["trees"]) + 1


def test_plain_decoding_writes_the_official_output(
    golden_pair: tuple[Transformer, EagleHead],
) -> None:
    plain = Engine(golden_pair[0])
    for case in CASES:
        limit = len(case["output"])
        result = plain.generate([case["prompt"]], max_new_tokens=limit, stop_ids=[])[0]
        assert result.tokens == case["output"]


def test_the_golden_cases_in_one_batch_write_the_same(
    golden_pair: tuple[Transformer, EagleHead],
) -> None:
    target, head = golden_pair
    engine = Engine(target, EagleDrafter(head, target, MC_SIM), batch=len(CASES))
    results = engine.generate([case["prompt"] for case in CASES], max_new_tokens=80, stop_ids=[])
    for result, case in zip(results, CASES, strict=True):
        assert result.tokens == case["output"][:80]
        n_whole = len(result.stats.accepted) - 1  # the limit may cut the last round
        assert result.stats.accepted[:n_whole] == case["accepted"][:n_whole]


def test_the_golden_pair_accepts_what_the_record_says(engine: Engine) -> None:
    # 4.89 tokens a target forward over the eight cases (tests/golden/README.md).
    accepted = [a for case in CASES for a in case["accepted"]]
    assert sum(accepted) / len(accepted) + 1 == pytest.approx(4.89, abs=0.01)
    results = engine.generate([case["prompt"] for case in CASES], max_new_tokens=90, stop_ids=[])
    lengths = [result.stats.accept_length for result in results]
    assert sum(lengths) / len(lengths) > 4.5
