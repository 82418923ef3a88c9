"""Does `fasteagle warmup` keep what a later start asks for?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Refused, Run
from eager_artifact import EagerArtifact

from fasteagle import compile as policy
from fasteagle import step_files
from fasteagle.commands import compile_help

PLAIN = ("--draft", "none")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(policy, "artifact_of", EagerArtifact)
    monkeypatch.setattr(compile_help, "MOST_BYTES", 0)  # no second process, which would compile
    return tmp_path / "kept" / "steps"


def test_what_warmup_keeps_is_what_generate_asks_for(
    kept: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = run("warmup", *PLAIN, "--n_tokens", 40)
    assert "greedy: compiling" in said
    assert f"kept in {kept.parent}" in said
    assert "temperature" not in said
    files = {file.stem for file in kept.glob("*.json")}
    assert len(files) == 3  # extend, prefill, round

    asked: list[str | None] = []

    def read(key: str | None, *_: Any) -> None:
        asked.append(key)

    monkeypatch.setattr(step_files, "read", read)
    run("generate", *PLAIN, "--prompt", "def f", "--max_new_tokens", 4, "--compile")
    assert len(asked) == 2, "a short prompt has no chunk that is not its last"
    assert set(asked) < files


def test_warmup_for_sampling_keeps_two_steps_more(kept: Path, run: Run) -> None:
    _, said = run("warmup", *PLAIN, "--n_tokens", 40, "--sampled")
    assert said.index("greedy: compiling") < said.index("temperature above 0: compiling")
    assert len(list(kept.glob("*.json"))) == 5  # extend chooses nothing


def test_warmup_without_a_folder_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused("warmup", words="FASTEAGLE_CACHE is off")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "file" / "folder"))
    refused("warmup", words="cannot be made")
