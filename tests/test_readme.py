"""Do README and docs hold what they promise? Commands parse, code runs, numbers are measured."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import prompt, tiny_target

import fasteagle
from bench.published import PUBLISHED
from fasteagle import demo
from fasteagle.commands.main import COMMANDS, module_of
from fasteagle.draft.kinds import DRAFTERS, Options
from fasteagle.engine import Engine

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "bench/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "generate.py": "generate",
    "convert/convert_hf_checkpoint.py": "convert",
    "convert/convert_hf_checkpoint_EAGLE.py": "convert",
}


def fences(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[str]:
    lines = "\n".join(fences(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


ALL = [(page, line) for page in PAGES for line in commands_of(page)]


def parses(command: str, arguments: list[str]) -> None:
    """Parse a command's line as the program would; an unknown flag raises."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    module_of(command).add_arguments(parser)
    _, unknown = parser.parse_known_args(arguments)
    assert not unknown, f"{command} does not know {unknown}"


@cache
def help_of(script: str) -> str:
    run = [sys.executable, script, "--help"] if script.endswith(".py") else ["bash", script, "-h"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check(line: str) -> None:
    words = shlex.split(line)
    while "=" in words[0]:  # OUT=results bash ...
        words.pop(0)
    match words:
        case ["make", *targets]:
            rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(rules)
        case ["fasteagle", command, *arguments]:
            assert command in COMMANDS
            parses(command, arguments)
        case ["python", script, *arguments] if script in SCRIPTS:
            assert f"commands.run({SCRIPTS[script]}" in (ROOT / script).read_text()
            parses(SCRIPTS[script], arguments)
        case ["python", "-m", "pytest", *paths]:
            assert all((ROOT / path).is_file() for path in paths)
        case ["python" | "bash", script, *arguments]:
            assert (ROOT / script).is_file()
            flags = [word for word in arguments if word.startswith("--")]
            assert all(flag in help_of(script) for flag in flags)
        case ["pip", "install", "-c", constraints, "-e", "."]:
            assert (ROOT / constraints).is_file()
        case _:
            raise AssertionError(f"what is {line!r}?")


@pytest.mark.parametrize(("page", "line"), ALL, ids=[line[:60] for _, line in ALL])
def test_every_command_exists_and_knows_its_flags(page: str, line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "wrong", ["make coffee", "fasteagle demo --loud", "python absent.py", "ls"]
)
def test_a_wrong_command_would_be_found(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def test_the_readme_is_long_enough_to_help_and_short_enough_to_read() -> None:
    assert 150 <= len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_links_point_at_files(page: str) -> None:
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert all((folder / target).exists() for target in targets)


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(fences("README.md", "python"))
    for path, real in (("checkpoints/vicuna-eagle", demo.HEAD), ("checkpoints/vicuna", demo.BASE)):
        assert path in code
        code = code.replace(path, str(real))
    exec(code.replace("compiled=True", "compiled=False"), {})
    assert "length" in capsys.readouterr().out


def test_a_drafter_is_added_as_the_docs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAFTERS, "repeat", DRAFTERS["none"])  # so that it goes away again
    space: dict[str, Any] = {}
    for code in fences("docs/add_a_drafter.md", "python"):
        exec(code, space)
    target = tiny_target()
    added = DRAFTERS["repeat"].drafter(None, target, Options())
    assert isinstance(added, space["RepeatDrafter"])
    plain, repeated = (
        Engine(target, drafter).generate([prompt(9)], max_new_tokens=40, stop_ids=[])[0]
        for drafter in (None, added)
    )
    assert repeated.tokens == plain.tokens
    # What it guesses is what it says: the last three tokens again.
    engine = Engine(target, space["RepeatDrafter"]())
    rows = engine.rows([engine.request([1, 2, 3, 4, 5], max_new_tokens=4, stop_ids=[])])
    next(engine.decode(rows))
    root = rows[0].tokens[0]
    assert engine.state.tree.tokens[0].tolist() == [root, 4, 5, root]


def result_rows() -> list[list[str]]:
    """The rows of the README's results table that name a JSON file, as stripped cells."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split("|") for line in lines if line.startswith("|")]
    return [[c.strip() for c in row] for row in rows if "bench/results/" in row[-1]]


def test_numbers_in_the_readme_are_those_of_the_results() -> None:
    rows = result_rows()
    assert rows
    for machine, _, plain, eagle, ratio, accepted, link in rows:
        path = re.search(r"\((bench/results/[^)]+)\)", link)
        assert path
        result = json.loads((ROOT / path[1]).read_text())
        engines = result["engines"]
        assert plain == f"{engines['plain']['tokens_per_s']['median']:.0f}"
        assert eagle == f"{engines['eagle']['tokens_per_s']['median']:.0f}"
        assert ratio == f"{result['eagle_over_plain']:.2f}"
        assert accepted == f"{engines['eagle']['accept_length']:.2f}"
        seen = result["environment"]
        name = seen["gpu"]["name"] if seen["device"] == "cuda" else seen["machine"]["processor"]
        assert machine.startswith(name.split("(")[0])


def test_the_rounds_on_a_gpu_in_the_readme_are_the_measured_ones() -> None:
    found = json.loads((ROOT / "bench/results/drafters_7b_h200.json").read_text())
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| draft | nodes |")) + 2
    shown = [line.strip("| ").split(" | ") for line in lines[start : start + len(found["rounds"])]]
    for (_, *cells), (name, row) in zip(shown, found["rounds"].items(), strict=True):
        tau, guess = PUBLISHED[name][0], found["simulated"][name]
        assert guess["tokens_per_s"] == pytest.approx(1000 * tau / row["round_ms"]["median"], 1e-3)
        numbers = (row["nodes"], row["round_ms"]["median"], tau)
        assert cells == [str(n) for n in (*numbers, guess["tokens_per_s"], guess["over_plain"])]
    assert found["simulated"]["eagle2"]["over_plain"] > 2.8


def test_what_the_readme_says_of_a_round_on_a_gpu_was_seen() -> None:
    found = json.loads((ROOT / "bench/results/rounds_7b_bfloat16_h200.json").read_text())
    share = found["contexts"][0]["plain"]["share_of_copy_bandwidth"]
    text = (ROOT / "README.md").read_text()
    assert f"plain decoding reaches {100 * share:.0f} % of" in text
    narrow = json.loads((ROOT / "bench/results/rounds_7b_int4_h200.json").read_text())
    share = narrow["contexts"][0]["plain"]["share_of_copy_bandwidth"]
    assert f"int4 {100 * share:.0f} %" in text
    for launches in found["launches"].values():
        assert launches["graph_launches"] == 1
        assert launches["blocking_syncs_in_step"] == launches["kernel_launches"] == 0


def test_the_wait_in_the_readme_is_the_measured_one() -> None:
    result = json.loads((ROOT / "bench/results/newcomer_cpu.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"first token {result['clone_to_first_token']:.0f} s after `git clone`" in text
    assert f"`make demo` comes after {result['clone_to_table']:.0f} s" in text


def test_every_result_says_where_it_came_from() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert environment["command"].startswith(("python bench/", "bash bench/"))
        assert environment["torch"] and environment["commit"]["sha"], path  # noqa: PT018
        assert environment["machine"]["cores"]


def test_no_page_is_about_another_version() -> None:
    assert f"## {fasteagle.__version__}" in (ROOT / "CHANGELOG.md").read_text()
