"""Does a second process compile what a command does not wait for?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from eager_artifact import EagerArtifact

from fasteagle import compile as policy
from fasteagle.commands import compile_help, compiling, demo, generate

GENERATE = (
    "generate",
    "--draft",
    "none",
    "--prompt",
    "def f",
    "--max_new_tokens",
    "4",
    "--compile",
)


class Helper:
    """A process that does nothing, and what was done with it."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], str]] = []
        self.waits = self.kills = 0

    def __call__(self, call: Sequence[str], choice: str) -> Helper:
        self.calls.append((list(call), choice))
        return self

    def wait(self) -> None:
        self.waits += 1

    def poll(self) -> None:
        """It never ends by itself."""

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(policy, "artifact_of", EagerArtifact)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(compile_help, "helping", [])
    made = Helper()
    monkeypatch.setattr(compile_help, "helper", made)
    return made


def kept(tmp_path: Path) -> int:
    return len(list((tmp_path / "kept" / "steps").glob("*.json")))


def test_a_first_start_writes_its_first_token_at_once(
    helper: Helper, run: Run, tmp_path: Path
) -> None:
    out, said = run(*GENERATE)
    assert helper.calls == [(list(GENERATE), "greedy prompts")]
    assert compile_help.helping == []
    assert kept(tmp_path) == 1, "rounds; the prompt's step is the helper's to keep"
    assert "goes on behind the first token" in said
    assert "compiling for the next start" in said
    assert policy.before_tracing == []
    with_help = out
    out, said = run(*GENERATE[:-1])
    assert out == with_help, "eager and compiled text are the same"
    assert "compiling" not in said


def test_rounds_are_compiled_behind_the_first_token(
    helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def artifact(*args: Any) -> EagerArtifact:
        happened.append("compiled")
        return EagerArtifact(*args)

    monkeypatch.setattr(policy, "artifact_of", artifact)
    monkeypatch.setattr(generate, "write", happened.append)
    monkeypatch.setattr(helper, "wait", lambda: happened.append("waited"))
    run(*GENERATE)
    assert happened.index("compiled") == 1, "behind the first piece"
    assert happened.count("compiled") == 1
    assert happened.index("waited") == happened.index("\n") + 1, "behind the text"


def test_where_what_prompts_need_is_kept_only_rounds_are_compiled_behind_the_first_token(
    helper: Helper, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    answers = iter((True, False))
    monkeypatch.setattr(compiling, "is_kept", lambda _: next(answers))

    def artifact(*args: Any) -> EagerArtifact:
        happened.append("compiled")
        return EagerArtifact(*args)

    monkeypatch.setattr(policy, "artifact_of", artifact)
    monkeypatch.setattr(generate, "write", happened.append)
    _, said = run(*GENERATE)
    assert helper.calls == [], "nothing is left for the next start"
    assert happened[0] == "compiled", "as the test keeps nothing, what prompts need too"
    assert happened.index("compiled", 1) == 2, "rounds, behind the first piece"
    assert "goes on behind the first token" in said


def test_who_has_enough_leaves_the_next_starts_steps_out(
    helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        monkeypatch.setattr(helper, "wait", lambda: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(helper, "wait", interrupted)
    _, said = run(*GENERATE)  # ends well
    assert "left out" in said
    assert helper.kills == 1


@pytest.mark.parametrize("at_the_end", [None, -9], ids=["meanwhile it runs", "before the end"])
def test_a_helper_that_fails_is_told(
    at_the_end: int | None, helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "poll", lambda: at_the_end)
    monkeypatch.setattr(helper, "wait", lambda: -9)
    _, said = run(*GENERATE)
    assert "failed, so that it is as slow" in said


@pytest.mark.parametrize(
    "words", [("--temperature", "0.7", "--seed", "3"), ("--prompt", "def f(x):\n" * 40)]
)
def test_prompts_run_eagerly_when_they_are_sampled_or_long(
    words: tuple[str, ...], helper: Helper, run: Run, tmp_path: Path
) -> None:
    eager, _ = run(*GENERATE[:-1], *words)
    compiled, _ = run(*GENERATE, *words)
    assert compiled == eager
    assert kept(tmp_path) == 1, "rounds"


def test_a_step_that_is_not_kept_is_not_compiled_to_see_that() -> None:
    built: list[str] = []

    def build() -> None:
        built.append("reads")
        while policy.before_tracing:
            policy.before_tracing.pop()()
        built.append("traces")

    assert not compile_help.is_kept(build)
    assert built == ["reads"]
    assert compile_help.is_kept(lambda: None)
    assert policy.before_tracing == []


@pytest.mark.parametrize(
    "words", [("--dtype", "bfloat16"), ("--profile", "trace.json"), ("--num_samples", "2")]
)
def test_where_eager_prompts_would_differ_or_show_all_is_compiled_first(
    words: tuple[str, ...],
    helper: Helper,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(*GENERATE, *words)
    assert [part for _, part in helper.calls] == ["greedy"]
    assert helper.kills == 1, "it is cleared away"
    assert kept(tmp_path) == 2, "what the helper did not do is done here"


def test_rounds_that_cannot_be_compiled_are_one_error(
    helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(policy, "artifact_of", fails)
    _, said = run(*GENERATE, status=2)
    assert "error: compiling failed (no space left); leave out --compile" in said
    assert helper.kills == 1
    assert compile_help.helping == []


def test_seconds_of_a_request_leave_out_what_it_waited_for(
    helper: Helper, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*args: Any) -> EagerArtifact:
        time.sleep(3)
        return EagerArtifact(*args)

    monkeypatch.setattr(policy, "artifact_of", slowly)
    report = tmp_path / "report.json"
    _, said = run(*GENERATE, "--json", report)
    value = json.loads(report.read_text())
    assert value["compile_seconds"] >= 3
    assert 0 < value["results"][0]["stats"]["seconds"] < 3
    assert float(said.partition("Time for inference 1: ")[2].split()[0]) < 3


def test_warmup_waits_until_all_is_there(helper: Helper, run: Run) -> None:
    _, said = run("warmup", "--draft", "none", "--n_tokens", 8)
    assert helper.waits >= 1
    assert helper.kills == len(helper.calls) == 1, "it is cleared away"
    assert policy.before_tracing == []
    assert "behind" not in said


def test_a_warm_start_gets_none(helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def was_read() -> None:
        raise EOFError

    monkeypatch.setattr(policy.step_files, "read", lambda *_: (was_read, []))
    with pytest.raises(EOFError):
        run(*GENERATE)
    assert helper.calls == []


def test_a_text_of_one_token_needs_no_rounds(helper: Helper, run: Run, tmp_path: Path) -> None:
    words = [word if word != "4" else "1" for word in GENERATE]
    run(*words, "--dtype", "bfloat16")
    assert helper.calls == []
    assert kept(tmp_path) == 1


def test_no_help_for_a_prompt_that_comes_once(helper: Helper, run: Run) -> None:
    run("generate", "--draft", "none", "--prompt", "-", "--compile", typed="def f")
    assert helper.calls == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the child in /proc")
def test_a_helper_that_is_stopped_leaves_no_compiler(tmp_path: Path) -> None:
    words = ["sh", "-c", f"sleep 100 & echo $! > {tmp_path}/child; wait"]
    process = compile_help.Process(words, process_group=0)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
        time.sleep(0.01)
    child = int((tmp_path / "child").read_text())
    compile_help.end([process])
    for _ in range(500):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("its child runs on")


@pytest.mark.parametrize("lacks", ["core", "memory", "folder", "compile"])
def test_no_help_where_it_cannot_be(
    lacks: str, helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "core":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    if lacks == "memory":
        monkeypatch.setattr(compile_help, "MOST_BYTES", 1000)
    if lacks == "folder":
        monkeypatch.setenv("FASTEAGLE_CACHE", "off")
    run(*(GENERATE[:-1] if lacks == "compile" else GENERATE))
    assert helper.calls == []
    assert policy.before_tracing == []


def test_the_helper_ends_with_a_failure_here(
    helper: Helper, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(policy, "artifact_of", fails)
    _, said = run("warmup", "--draft", "none", "--n_tokens", 8, status=2)
    assert "compiling failed" in said
    assert helper.kills == 1
    assert policy.before_tracing == []


@pytest.mark.parametrize(
    ("choice", "files"), [("greedy", 1), ("greedy prompts", 1), ("sampled", 0)]
)
def test_the_helper_keeps_its_part_and_writes_nothing(
    choice: str,
    files: int,
    helper: Helper,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(compile_help.HELPS, choice)
    report = tmp_path / "report.json"
    if files:
        with pytest.raises(SystemExit) as end:
            run(*GENERATE, "--json", report)
        assert end.value.code == 0
        assert not report.exists()
        assert {path.name for path in tmp_path.iterdir()} == {"kept"}
    else:
        run("warmup", "--draft", "none", "--n_tokens", 8)
    assert kept(tmp_path) == files


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("PROMPTS", ("def f",)),
        ("BENCH_TOKENS", 4),
        ("TEXT_TOKENS", 4),
        ("REPEATS", 1),
    ):
        monkeypatch.setattr(demo, name, value)


def test_the_demo_compiles_its_engines_side_by_side(
    short_demo: None, helper: Helper, run: Run, tmp_path: Path
) -> None:
    out, _ = run("demo")
    assert helper.calls == [(["demo"], "demo")]
    assert helper.waits >= 1
    assert policy.before_tracing == []
    assert kept(tmp_path) == 4
    assert "identical: yes" in out


def test_the_demos_helper_compiles_eagle_and_writes_nothing(
    short_demo: None, helper: Helper, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compile_help.HELPS, "demo")
    out, said = run("demo")
    assert out == ""
    assert "compiling EAGLE" in said
    assert "plain" not in said
    assert kept(tmp_path) == 2
    monkeypatch.delenv(compile_help.HELPS)
    run("demo")
    assert kept(tmp_path) == 4, "what it kept is found"


def test_a_helper_is_this_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = compile_help.helper(["generate", "--no_such_flag"], "greedy")
    assert done.wait() == 2
    assert isinstance(done, subprocess.Popen)
    words = list(map(str, done.args))  # type: ignore[arg-type]
    assert words[-5:] == [sys.executable, "-m", "fasteagle", "generate", "--no_such_flag"]
