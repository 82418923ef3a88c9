"""Does bench/peers.py drive its workers right, count right, and go on without a peer that fails?"""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import peer_venvs, peers
from bench.peer_gpt_fast import interleaved
from bench.peer_link import PASSES, PeerError, Worker
from bench.peer_table import accept_length, compare_tokens, first_difference, ratios
from bench.peer_worker import serve
from fasteagle import demo
from fasteagle.assemble import load

ROOT = Path(__file__).resolve().parents[1]

# A worker of one engine: tokens 0 1 2 ..., or what its mode makes of them.
FAKE = """
import json, sys, time
mode, calls = sys.argv[1], 0
print("chatter", file=sys.stderr)
if mode == "no_start":
    sys.exit("ImportError: no such package")
print(json.dumps({"ready": mode, "versions": {"fake": mode}}), flush=True)
for line in sys.stdin:
    calls += 1
    asked = json.loads(line)
    tokens = list(range(asked["max_new_tokens"]))
    graphs = {"compiles": min(calls, 3), "always_compiles": calls}.get(mode, 0)
    if mode == "slow":
        time.sleep(60)
    if mode == "garbage":
        print("hello", flush=True)
    if mode == "short":
        tokens.pop()
    if mode == "other":
        tokens[1] = 99
    if mode == "dies" or (mode == "dies_later" and calls == 5):
        sys.exit("RuntimeError: out of luck")
    answer = {"tokens": tokens, "seconds": {"eagle": 1.0}.get(mode, 2.0), "graphs": graphs}
    if mode == "eagle":
        answer |= {"rounds": 2, "advanced": 5}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """fake(mode, timeout) is a running worker."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made: list[Worker] = []

    def start(mode: str, timeout: float = 10) -> Worker:
        words = [sys.executable, "-S", str(script), mode]
        made.append(Worker(mode, words, variables={}, timeout=timeout))
        return made[-1]

    yield start
    for worker in made:
        worker.close()


def test_a_worker_answers_prompt_by_prompt(fake: Any) -> None:
    worker = fake("eagle")
    assert worker.versions == {"fake": "eagle"}
    for n in (3, 1, 2):
        assert worker.ask([1, 2], n)["tokens"] == list(range(n))


@pytest.mark.parametrize(
    ("mode", "timeout", "words"),
    [
        ("no_start", 10, "ended with status 1: ImportError: no such package"),
        ("dies", 10, "ended with status 1: RuntimeError: out of luck"),
        ("slow", 0.5, "no answer in 0.5 s; give it more with --timeout"),
        ("garbage", 10, "printed 'hello', not a JSON object"),
        ("short", 10, "3 tokens came back, not 4"),
    ],
)
def test_a_worker_that_fails_is_one_line(fake: Any, mode: str, timeout: float, words: str) -> None:
    with pytest.raises(PeerError) as failed:
        fake(mode, timeout).ask([1], 4)
    text = str(failed.value)
    assert text.startswith(f"{mode}: ")
    assert words in text
    assert "\n" not in text


def test_a_worker_is_warm_when_a_pass_compiles_nothing(fake: Any) -> None:
    worker = fake("compiles")  # graphs 1 2 3 3 3 3: by pairs 2, 3, 3
    asked = []
    ask = worker.ask
    worker.ask = lambda *given: asked.append(given) or ask(*given)
    worker.warm_up([[1], [2]], 4)
    assert len(asked) == 6
    with pytest.raises(PeerError, match=f"still compiles after {PASSES} passes"):
        fake("always_compiles").warm_up([[1], [2]], 4)


def test_a_run_goes_on_without_the_peers_that_fail(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    modes = {
        "plain": "plain",
        "eagle": "eagle",
        "transformers": "no_start",
        "transformers_compiled": "other",
        "eagle_llm": "dies_later",  # two prompts to warm up, two of the first repeat
    }
    monkeypatch.setattr(peers, "start", lambda name, args: fake(modes[name]))
    out = tmp_path / "out.json"
    call = ["peers.py", "--engines", *modes, "--prompts", "2", "--repeats", "2"]
    call += ["--max_new_tokens", "6", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", call)
    peers.main(peers.parse())
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["left_out"] == ["transformers", "eagle_llm"]
    assert said.err.count("left out: ") == 2
    assert set(result["engines"]) == {"plain", "eagle", "transformers_compiled"}
    found = {name: ratio for name, ratio in result["ratios"].items() if ratio is not None}
    assert found == {
        "eagle_over_plain": 2.0,
        "eagle_over_transformers_compiled": 2.0,
        "plain_over_transformers_compiled": 1.0,
    }
    eagle, other = (result["engines"][name] for name in ("eagle", "transformers_compiled"))
    assert eagle["tokens_per_s"] == {"median": 6.0, "min": 6.0, "max": 6.0}
    assert eagle["accept_length"] == 2.5
    assert eagle["same_tokens"]
    assert not other["same_tokens"]
    assert other["prompts_that_differ"] == 2
    assert other["first_difference"] == {"prompt": 0, "token": 1, "plain": 1, "found": 99}


def test_the_run_ends_without_our_own_engines(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "start", lambda name, args: fake("dies"))
    monkeypatch.setattr(sys, "argv", ["peers.py", "--engines", "plain", "--prompts", "1"])
    with pytest.raises(SystemExit, match="error: dies: its worker ended"):
        peers.main(peers.parse())


def test_our_engines_must_agree(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "start", lambda name, args: fake({"eagle": "other"}.get(name, name)))
    call = "peers.py --engines plain eagle --prompts 1 --repeats 1 --max_new_tokens 4"
    monkeypatch.setattr(sys, "argv", call.split())
    with pytest.raises(SystemExit, match="disagree"):
        peers.main(peers.parse())


def test_a_ratio_is_the_median_of_neighbours() -> None:
    # Repeat by repeat 2, 3, 1; the ratio of the medians would be 1.5.
    found = ratios({"eagle": [1.0, 2.0, 4.0], "plain": [2.0, 6.0, 4.0]})
    assert found["eagle_over_plain"] == 2.0
    assert found["eagle_over_gpt_fast"] is None


def test_tokens_are_compared_up_to_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) == []
    assert first_difference([1, 5, 6], [1, 2, 3]) == [(1, 5, 2)]
    assert compare_tokens([{"tokens": [1]}], None)["same_tokens"] is None
    assert accept_length([{"tokens": [1]}]) is None


def test_bytes_stand_for_a_missing_tokenizer() -> None:
    assert peers.Bytes().encode("a\u00fc") == [1, 97 + 3, 0xC3 + 3, 0xBC + 3]


def test_what_is_past_the_limit_is_not_counted() -> None:
    answers = io.StringIO()
    line = json.dumps({"prompt": [7], "max_new_tokens": 2})
    serve(lambda prompt, n: {"tokens": [*prompt, 8, 9], "rounds": 1}, [line], answers)
    answer = json.loads(answers.getvalue())
    assert answer["tokens"] == [7, 8]
    assert answer["rounds"] == 1
    assert answer["seconds"] > 0


def test_a_real_worker_makes_the_tokens_of_our_engine() -> None:
    pytest.importorskip("transformers")
    prompt, n = [1, 50, 60, 70, 80], 6
    words = [sys.executable, "-P", str(ROOT / "bench/peer_worker.py"), "transformers"]
    words += ["--engine", "transformers", "--base", str(demo.BASE)]
    line = json.dumps({"prompt": prompt, "max_new_tokens": n})
    done = subprocess.run(words, input=line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ready, answer = map(json.loads, done.stdout.splitlines())
    assert set(ready["versions"]) == {"torch", "transformers"}
    [wanted] = load(None, "none").generate([prompt], max_new_tokens=n, stop_ids=[])
    assert answer["tokens"] == wanted.tokens


def test_rows_of_heads_go_from_halves_to_neighbours() -> None:
    rows = torch.arange(8.0).view(8, 1)  # two heads of four
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--base x", "--base and --head make a pair"),
        ("--engines gpt_fast", "needs --gpt_fast, a checkout"),
        ("--gpt_fast nowhere", "--gpt_fast nowhere has no generate.py"),
        ("--engines plane", "invalid choice: 'plane'"),
        ("--max_new_tokens 500", "--max_new_tokens 500; a prompt leaves room for 192"),
        ("--base nowhere --head nowhere", "nowhere does not exist"),
    ],
)
def test_a_wrong_flag_ends_in_a_line(
    flags: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "bench/peers.py"), run_name="__main__")
    assert end.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_keeps_our_pins_but_its_own() -> None:
    pins = peer_venvs.constraints(peer_venvs.ENVIRONMENTS["eagle_llm"])
    names = {peer_venvs.normal(pin) for pin in pins}
    assert {"torch", "numpy", "safetensors"} <= names
    assert not names & {"transformers", "tokenizers", "huggingface-hub"}
    assert peer_venvs.normal("Jinja_2[x]>=3") == "jinja-2"


def test_an_environment_is_made_once_and_again_when_its_packages_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def call(name: str, words: list[str]) -> None:
        calls.append(words)
        python = tmp_path / "transformers/bin/python"
        python.parent.mkdir(exist_ok=True)
        python.touch()

    monkeypatch.setattr(peer_venvs, "call", call)
    monkeypatch.setattr(peer_venvs, "os", SimpleNamespace(name="posix", environ={"PIP_ARGS": "-v"}))
    for _ in range(2):
        python = peer_venvs.interpreter("transformers", tmp_path)
        assert python == str(tmp_path / "transformers/bin/python")
        assert len(calls) == 2  # venv, pip
    assert "-v" in calls[1]
    changed = peer_venvs.Environment(("torch",), alone=("one==1",))
    monkeypatch.setitem(peer_venvs.ENVIRONMENTS, "transformers", changed)
    peer_venvs.interpreter("transformers", tmp_path)
    assert [words[-1] for words in calls[3:]] == ["torch", "one==1"]
    assert "--no-deps" in calls[4]


def test_a_failed_installation_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="WARNING: x\nERROR: no torch here\n")
    monkeypatch.setattr(peer_venvs.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(PeerError, match="status 1: ERROR: no torch here; see to it"):
        peer_venvs.interpreter("transformers", tmp_path)
    assert not (tmp_path / "transformers" / peer_venvs.MADE).exists()
