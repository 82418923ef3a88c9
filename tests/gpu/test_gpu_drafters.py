"""On a GPU: is a captured round of any drafter the eager one, and are dynamic trees EAGLE's own?"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import DRAFTS, GOLDEN, prompt, tiny_target
from torch._dynamo.utils import counters

from fasteagle.assemble import load_drafter
from fasteagle.checkpoint import load_target
from fasteagle.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("kind", DRAFTS)
def test_captured_rounds_of_any_drafter_are_the_eager_ones(kind: str) -> None:
    target = copy.deepcopy(tiny_target()).to("cuda")
    eager, captured = (
        Engine(target, DRAFTS[kind](target), compiled=compiled, batch=2, prefill_chunk=16)
        for compiled in (False, True)
    )
    prompts = [prompt(5), prompt(30)]
    wanted, found = (e.generate(prompts, max_new_tokens=40, stop_ids=[]) for e in (eager, captured))
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert [one.stats.accepted for one in found] == [one.stats.accepted for one in wanted]
    assert not counters["graph_break"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for step in captured.steps.values():
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("name", "head", "tree"),
    [("eagle2", "eagle1", "dynamic-26-5-6"), ("eagle3", "eagle3", "dynamic-32-5-8")],
)
def test_the_golden_rounds_come_out_captured(name: str, head: str, tree: str) -> None:
    pair = GOLDEN / "byte_pair"
    target = load_target(pair / "base", dtype=torch.float32, device="cuda")
    engine = Engine(target, load_drafter(pair / head, target, tree=tree), compiled=True)
    for case in json.loads((GOLDEN / f"{name}.json").read_text())["cases"]:
        limit = len(case["output"]) + 1
        (result,) = engine.generate([case["prompt"]], max_new_tokens=limit, stop_ids=[])
        assert result.tokens[:-1] == case["output"]
        assert result.stats.accepted == case["accepted"]
