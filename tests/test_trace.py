"""Does `fasteagle trace` write what the official EAGLE code did, in the golden files' layout?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN

from fasteagle import demo
from fasteagle.commands import trace
from fasteagle.commands.main import main

ROOT = Path(__file__).parents[1]
PAIR = GOLDEN / "byte_pair"
BASE, HEAD = str(PAIR / "base"), str(PAIR / "eagle1")
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "eagle1.json").read_text())["cases"]
# The official runs ended with the round that made the output longer than 96 tokens.
N_TOKENS = 97


def write_prompts(folder: Path, prompts: list[list[int]]) -> str:
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts))
    return str(path)


def run_trace(folder: Path, prompts: list[list[int]], n_tokens: int, *flags: str) -> Any:
    out = folder / "trace.json"
    names = ["--prompt_ids", write_prompts(folder, prompts), "--out", str(out)]
    assert main(["trace", *names, "--max_new_tokens", str(n_tokens), *flags]) == 0
    return json.loads(out.read_text())


def assert_golden(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for case, golden in zip(found, wanted, strict=True):
        assert case["prompt"] == golden["prompt"]
        assert case["output"] == golden["output"][:N_TOKENS]
        assert case["accepted"] == golden["accepted"]
        assert case["trees"] == golden["trees"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prompts = [case["prompt"] for case in CASES]
    pair = ("--checkpoint_path", BASE, "--draft_checkpoint_path", HEAD)
    return run_trace(tmp_path_factory.mktemp("golden"), prompts, N_TOKENS, *pair)


def test_every_case_is_the_official_one(traced: Any) -> None:
    assert_golden(traced["cases"], CASES)


DYNAMIC = {
    "eagle2": ("eagle1", 26, 5, 6),
    "eagle3": ("eagle3", 32, 5, 8),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_every_case_of_a_dynamic_tree_is_the_official_one(name: str, tmp_path: Path) -> None:
    head, total_tokens, depth, top_k = DYNAMIC[name]
    golden = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    flags = ["--checkpoint_path", BASE, "--draft_checkpoint_path", str(PAIR / head)]
    flags += ["--tree", "dynamic", "--total_tokens", str(total_tokens)]
    flags += ["--depth", str(depth), "--top_k", str(top_k)]
    prompts = [case["prompt"] for case in golden]
    found = run_trace(tmp_path, prompts, N_TOKENS, *flags)
    assert (
        found["tree"]
        == f"dynamic-{total_tokens}-{depth}-{top_k} ({total_tokens} rows with the root)"
    )
    assert_golden(found["cases"], golden)


def test_the_header_says_how_it_was_made(traced: Any) -> None:
    header = {name: value for name, value in traced.items() if name != "cases"}
    assert header == {
        "checkpoint": BASE,
        "draft": HEAD,
        "drafter": "EAGLE head, tree mc_sim_7b_63",
        "tree": "mc_sim_7b_63 (26 rows with the root)",
        "dtype": "float32",
        "temperature": 0,
    }


def test_a_case_has_the_fields_of_the_golden_files(traced: Any) -> None:
    assert list(traced["cases"][0]) == list(CASES[0])


def test_the_program_writes_the_same_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    prompts = write_prompts(tmp_path, [case["prompt"] for case in CASES[:2]])
    command = [sys.executable, "-m", "fasteagle", "trace", "--checkpoint_path", BASE]
    command += ["--draft_checkpoint_path", HEAD, "--prompt_ids", prompts]
    command += ["--max_new_tokens", str(N_TOKENS), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert_golden(json.loads(out.read_text())["cases"], CASES[:2])


def test_plain_decoding_writes_the_same_output_with_roots_for_trees(
    tmp_path: Path, traced: Any
) -> None:
    prompts = [case["prompt"] for case in CASES[:3]]
    plain = run_trace(tmp_path, prompts, N_TOKENS, "--checkpoint_path", BASE, "--draft", "none")
    assert plain["draft"] is plain["tree"] is None
    for case, eagle in zip(plain["cases"], traced["cases"], strict=False):
        assert case["output"] == eagle["output"]
        assert case["accepted"] == [0] * N_TOKENS
        assert case["trees"] == [[token] for token in case["output"]]


@pytest.mark.parametrize("n_tokens", [1, 2, 7])
def test_output_is_cut_exactly_and_rounds_cover_it(tmp_path: Path, n_tokens: int) -> None:
    (case,) = run_trace(tmp_path, [[1, 100, 200]], n_tokens)["cases"]
    assert len(case["output"]) == n_tokens
    committed = [accepted + 1 for accepted in case["accepted"]]
    assert sum(committed) >= n_tokens > sum(committed[:-1])
    assert case["trees"][0][0] == case["output"][0]


@pytest.mark.parametrize(("tree", "n_nodes"), [("chain-5", 6), ("[[0], [1], [0, 0], [1, 0]]", 5)])
def test_the_tree_changes_rounds_but_not_the_output(
    tmp_path: Path, tree: str, n_nodes: int
) -> None:
    (usual,) = run_trace(tmp_path, [[1, 100, 200]], 30)["cases"]
    (other,) = run_trace(tmp_path, [[1, 100, 200]], 30, "--tree", tree)["cases"]
    assert other["output"] == usual["output"]
    assert {len(nodes) for nodes in usual["trees"]} == {4}
    assert {len(nodes) for nodes in other["trees"]} == {n_nodes}


def test_a_stop_token_ends_a_case_and_is_its_last(tmp_path: Path) -> None:
    (usual,) = run_trace(tmp_path, [[1, 100, 200]], 30)["cases"]
    stop = usual["output"][9]
    base = tmp_path / "base"
    base.mkdir()
    for file in demo.BASE.iterdir():
        (base / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": [2, stop]}
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config))
    pair = ("--checkpoint_path", str(base), "--draft_checkpoint_path", str(demo.HEAD))
    (case,) = run_trace(tmp_path, [[1, 100, 200]], 30, *pair)["cases"]
    end = usual["output"].index(stop) + 1
    assert case["output"] == usual["output"][:end]
    assert len(case["trees"]) == len(case["accepted"])


def test_output_may_fill_the_context(tmp_path: Path) -> None:
    flags = ("--max_length", "40")
    (case,) = run_trace(tmp_path, [[1, 100, 200]], 37, *flags)["cases"]
    (usual,) = run_trace(tmp_path, [[1, 100, 200]], 37)["cases"]
    assert (case["output"], case["accepted"]) == (usual["output"], usual["accepted"])
    (plain,) = run_trace(tmp_path, [[1, 100, 200]], 37, "--draft", "none", *flags)["cases"]
    assert (plain["output"], plain["accepted"]) == (usual["output"], [0] * 37)


def test_an_unwritable_file_fails_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(trace, "load_engine")
    prompts = write_prompts(tmp_path, [[1]])
    folder = tmp_path / "folder"
    folder.mkdir()
    for out in (tmp_path / "missing" / "x.json", folder, Path("/dev/null")):
        flags = ["--prompt_ids", prompts, "--max_new_tokens", "3", "--out", str(out)]
        assert main(["trace", *flags]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "prompts.json"]


def test_a_failure_leaves_an_earlier_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("halfway")

    out = tmp_path / "trace.json"
    out.write_text("earlier")
    monkeypatch.setattr(trace, "trace", fail)
    flags = ["--prompt_ids", write_prompts(tmp_path, [[1]]), "--max_new_tokens", "3"]
    assert main(["trace", *flags, "--out", str(out)]) == 2
    assert out.read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 2
