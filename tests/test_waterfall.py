"""bench/waterfall.py: what does each idea add?"""

import json
import sys

import pytest
import torch

from bench import waterfall
from bench.waterfall import PartByPart, plain, rows_of
from fasteagle.compile import Compiler
from fasteagle.metrics import Stats
from fasteagle.request import Generation


def made(seconds, n_tokens=11, rounds=10):
    stats = Stats(
        prompt_tokens=4,
        new_tokens=n_tokens,
        ttft=1.0,
        seconds=1.0 + seconds,
        accepted=[(n_tokens - 1) // rounds - 1] * rounds,
    )
    return [Generation([0] * n_tokens, "", "length", stats)]


def test_a_step_is_compared_with_the_one_before_and_with_the_first():
    rows = rows_of({"eager": [made(10.0)], "compile": [made(5.0)], "tree": [made(4.0, rounds=5)]})
    assert [row["decode_tokens_per_s"]["median"] for row in rows.values()] == [1.0, 2.0, 2.5]
    assert [row["times_before"] for row in rows.values()] == [1.0, 2.0, 1.25]
    assert [row["times_first"] for row in rows.values()] == [1.0, 2.0, 2.5]
    assert rows["tree"]["tokens_a_round"] == 2.0


def test_the_plain_engine_reads_all_of_its_cache(engine):
    whole = plain(engine.target, 256)
    assert whole.buckets == [whole.n_slots]
    assert whole.compiler.mode == "eager"


def test_part_by_part_compiles_parts_and_no_step():
    policy = PartByPart(enabled=True, device=torch.device("cuda"))
    assert policy.captures

    def step():
        return None

    assert policy.step(step, "round", [], None) is step
    assert policy.part(step, "round") is not step


@pytest.fixture
def eager_only(monkeypatch):
    """The script as it is, except that nothing is compiled: that takes minutes."""
    monkeypatch.setattr(
        waterfall, "Compiler", lambda *, enabled, device: Compiler(enabled=False, device=device)
    )
    made = waterfall.make

    def make(precision, args):
        args.compile = False
        return made(precision, args)

    monkeypatch.setattr(waterfall, "make", make)


def test_all_steps_write_the_same_text(eager_only, tmp_path, monkeypatch, capsys):
    out = tmp_path / "waterfall.json"
    flags = "--size tiny --prompts 1 --context 8 --max_new_tokens 8 --repeats 1 --tree chain-2"
    flags += f" --precisions float32,int4 --plot --out {out}"
    monkeypatch.setattr(sys, "argv", ["waterfall.py", *flags.split()])
    waterfall.main(waterfall.parse())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["steps"]) == ["eager", "compile", "panels", "bucket", "tree", "int4"]
    assert result["identical_tokens"]
    assert result["acceptance"] == "simulated"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result == json.loads(out.read_text())


def test_other_second_precisions_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["waterfall.py", "--precisions", "float32,bfloat16"])
    with pytest.raises(SystemExit) as end:
        waterfall.parse()
    assert end.value.code == 2
    assert "int4 after it" in capsys.readouterr().err
