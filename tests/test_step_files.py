"""Does a kept step belong to what it is called for, and does a broken one hurt nobody?"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from eager_artifact import EagerArtifact
from torch import Tensor
from torch._dynamo.utils import counters

from fasteagle import compile as policy
from fasteagle import step_files
from fasteagle.compile import TracedStep
from fasteagle.step_files import NotKept, key_of, reach


class Pair(NamedTuple):
    counts: Tensor
    sums: list[Tensor]


class Owner:
    def __init__(self, *, width: int = 4, factor: int = 3, tied: bool = False) -> None:
        first = torch.arange(width)
        self.pair = Pair(first, [first if tied else torch.zeros(width)])
        self.factor = factor
        self.weights = torch.nn.Linear(width, 2)
        self.again = self


def step_of(owner: Owner) -> Callable[[], None]:
    def inner(x: Tensor) -> Tensor:
        return x * owner.factor

    def step() -> None:
        owner.pair.counts.add_(1)
        owner.pair.sums[0].copy_(inner(owner.pair.counts.float()))

    return step


def key(
    owner: Owner, name: str = "step", options: Mapping[str, object] = policy.STEP_OPTIONS
) -> str:
    found = key_of(name, reach(step_of(owner)), options)
    assert found is not None
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "kept" / "steps"


def test_every_tensor_is_reached_once_whatever_holds_it() -> None:
    owner = Owner()
    tensors = reach(step_of(owner)).tensors.values()
    weights = owner.weights.weight, owner.weights.bias
    wanted = [owner.pair.counts, *owner.pair.sums, *weights]
    assert sorted(map(id, tensors)) == sorted(map(id, wanted))


def test_twins_share_a_key() -> None:
    assert key(Owner()) == key(Owner())


@pytest.mark.parametrize("other", [{"width": 5}, {"factor": 4}, {"tied": True}])
def test_whatever_a_trace_can_see_makes_another_key(other: dict[str, Any]) -> None:
    assert key(Owner()) != key(Owner(**other))


def test_name_options_threads_and_variables_make_another_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = key(Owner())
    assert key(Owner(), "other") != before
    assert key(Owner(), options={"cpp_wrapper": False}) != before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert key(Owner()) != before
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_SOMETHING", "1")
    assert key(Owner()) != before


def test_code_without_a_file_is_not_kept(folder: Path) -> None:
    typed: dict[str, Any] = {"__name__": "typed_at_a_prompt"}
    exec("def half(x):\n    return x / 2\n", typed)
    half = typed["half"]
    assert isinstance(half, types.FunctionType)
    found = key_of("step", reach(lambda: half(1)), {})
    assert found is None
    step_files.write(found, reach(half), None, [])
    assert step_files.read(found, reach(half), {}) is None
    assert not folder.exists()


def test_a_kept_step_runs_on_the_tensors_of_who_reads_it(folder: Path) -> None:
    with torch.inference_mode():
        first, second = Owner(), Owner()
        TracedStep(step_of(first), "step")()
        assert len(list(folder.glob("*.bin"))) == len(list(folder.glob("*.json"))) == 1
        before = counters["stats"]["unique_graphs"]
        again = TracedStep(step_of(second), "step")
        again()
        again()
    assert counters["stats"]["unique_graphs"] == before, "it was compiled again"
    assert first.pair.counts.tolist() == [1, 2, 3, 4]
    assert second.pair.counts.tolist() == [2, 3, 4, 5]
    assert second.pair.sums[0].tolist() == [6, 9, 12, 15]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "artifact_of", EagerArtifact)


def runs(owner: Owner) -> bool:
    with torch.inference_mode():
        TracedStep(step_of(owner), "step")()
    return owner.pair.sums[0].tolist() == [3, 6, 9, 12]


def test_a_broken_file_is_compiled_anew(folder: Path, eager: None) -> None:
    assert runs(Owner())
    with pytest.warns(NotKept, match="could not be read"):
        assert runs(Owner())


def test_an_interrupted_write_is_no_step(folder: Path, eager: None) -> None:
    assert runs(Owner())
    (names,) = folder.glob("*.json")
    names.unlink()
    assert runs(Owner())  # no warning, which the suite would make an error
    assert names.is_file()


def test_a_folder_that_cannot_be_made_costs_the_file_only(folder: Path, eager: None) -> None:
    folder.parent.write_text("a file where the folder should be")
    with pytest.warns(NotKept, match="FASTEAGLE_CACHE names another folder"):
        assert runs(Owner())


def test_off_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    monkeypatch.setenv("FASTEAGLE_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert runs(Owner())
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets its own
    step_files.use_cache_folder()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("below", ["file/folder", "locked"])
def test_where_no_folder_can_be_made_torch_keeps_its_own(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container without a home, say; compiling must not fail for that."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "locked")
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / below))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert step_files.writable_folder() is None
    step_files.use_cache_folder()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_by_default_the_folder_is_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTEAGLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    step_files.use_cache_folder()
    ours = str(tmp_path / "fasteagle" / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == ours
    torchs = Path(tempfile.gettempdir()) / "torchinductor_me"  # as torch itself puts it there
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(torchs))
    step_files.use_cache_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == ours
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    step_files.use_cache_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_the_oldest_steps_go(folder: Path, monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    monkeypatch.setattr(step_files, "MAX_FILES", 2)
    for factor in (3, 4, 5):
        owner = Owner(factor=factor)
        with torch.inference_mode():
            TracedStep(step_of(owner), "step")()
        for file in folder.glob("*.bin"):  # a file system may count whole seconds
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    left = {file.stem for file in folder.glob("*.bin")}
    assert left == {file.stem for file in folder.glob("*.json")}
    assert left == {key(Owner(factor=factor)) for factor in (4, 5)}


def test_commands_count_only_where_a_step_reaches_them():
    """A new line of help is no reason to compile anew; code of theirs in a step is."""
    inside = Path(step_files.__file__).parent
    assert step_files._origin("fasteagle.rounds") == "fasteagle.rounds"
    for module, file in (
        ("fasteagle.tuning.costs", "tuning/costs.py"),
        ("fasteagle.tune", "tune.py"),
    ):
        importlib.import_module(module)
        seen = hashlib.sha256((inside / file).read_bytes()).hexdigest()
        assert step_files._origin(module) == f"{module}@{seen}"
