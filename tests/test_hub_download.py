"""Does a hub id come over HTTP whole, at its revision, and end in one clear line when it cannot?

The hub is tests/fake_hub.py. Each call is a process, because HF_ENDPOINT is read at import.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
import torch
from conftest import Run
from fake_hub import Ask, FakeHub, Fault, fake_hub
from safetensors.torch import load_file, save_file
from test_medusa import medusa_tensors
from test_medusa import write as write_medusa

from fasteagle import demo
from fasteagle.checkpoint import read_target

SCRIPT = Path(__file__).parents[1] / "convert" / "convert_hf_checkpoint.py"
WEIGHTS = "model.safetensors"
CHUNK = 10 * 2**20  # huggingface_hub writes this much at once; a retry goes on from what it wrote


class Call(NamedTuple):
    """A run of the converter."""

    status: int
    stdout: str
    stderr: str
    out: Path
    asks: list[Ask]

    def ranges(self, name: str) -> list[str | None]:
        """The Range of every GET of a file, in turn; None asks for all of it."""
        return [ask.range for ask in self.asks if (ask.method, ask.name) == ("GET", name)]


def convert(hub: FakeHub, folder: Path, *flags: str) -> Call:
    """Convert to folder/out with the cache folder/home; without the tester's tokens or proxies."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    out, n_asks = folder / "out", len(hub.asks)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--checkpoint_dir", *flags, "--out", str(out)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Call(done.returncode, done.stdout, done.stderr, out, hub.asks[n_asks:])


def write_base(folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """The embedded base, its weights stored in another dtype if one is given."""
    shutil.copytree(demo.BASE, folder)
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in float32, more than a chunk long; float16 to float32 and back is exact."""
    folder = write_base(tmp_path_factory.mktemp("large") / "main", dtype=torch.float32)
    assert (folder / WEIGHTS).stat().st_size > CHUNK + 2**20
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, large: Path) -> Iterator[FakeHub]:
    """owner/name holds second copies of its weights, and its v1 a generation_config.json."""
    folder = tmp_path_factory.mktemp("hub")
    main, v1 = write_base(folder / "main"), write_base(folder / "v1")
    (main / "original").mkdir()
    for copy in ("original/consolidated.00.pth", "pytorch_model.bin"):
        (main / copy).write_bytes(b"not asked for")
    (v1 / "generation_config.json").write_text('{"eos_token_id": 7}')
    medusa = write_medusa(folder / "medusa", medusa_tensors())
    repositories = {
        "owner/name": {"main": main, "v1": v1},
        "owner/large": {"main": large},
        "owner/gated": {"main": main},
        "owner/medusa": {"main": medusa},
    }
    with fake_hub(repositories, gated=frozenset({"owner/gated"})) as hub:
        yield hub


@pytest.fixture(scope="module")
def converted(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """owner/name, downloaded and converted."""
    return convert(hub, tmp_path_factory.mktemp("converted"), "owner/name")


def test_medusa_heads_come_under_their_own_file_name(hub: FakeHub, tmp_path: Path) -> None:
    call = convert(hub, tmp_path, "owner/medusa")
    assert call.status == 2
    assert "owner/medusa is a set of Medusa heads, not a target model" in call.stderr
    assert call.ranges("medusa_lm_head.pt")


def assert_is_the_base(call: Call) -> None:
    assert call.status == 0, call.stderr
    assert call.stdout == f"{call.out}\n"
    ours, theirs = dict(read_target(call.out)[1]), dict(read_target(demo.BASE)[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_one_error_line(call: Call, words: str) -> None:
    """The last line is the only error; no traceback, and nothing beside the cache."""
    assert (call.status, call.stdout) == (2, "")
    *before, last = call.stderr.splitlines()
    assert last.startswith("error: ")
    assert words in last
    assert not any(line.startswith(("error:", "Traceback")) for line in before)
    assert {path.name for path in call.out.parent.iterdir()} <= {"home"}


def test_a_hub_id_becomes_the_folder_that_its_local_copy_does(converted: Call) -> None:
    assert_is_the_base(converted)
    assert read_target(converted.out)[0] == read_target(demo.BASE)[0]
    assert (converted.out / "tokenizer.model").read_bytes() == demo.BASE.joinpath(
        "tokenizer.model"
    ).read_bytes()


def test_a_second_copy_of_the_weights_is_never_asked_for(converted: Call) -> None:
    assert {ask.name for ask in converted.asks} == {"config.json", "tokenizer.model", WEIGHTS}
    assert converted.ranges(WEIGHTS) == [None]


def test_a_pipe_gets_no_progress_bar(converted: Call) -> None:
    assert converted.stderr == ""


def test_a_revision_gives_its_own_files(hub: FakeHub, tmp_path: Path, converted: Call) -> None:
    call = convert(hub, tmp_path, "owner/name", "--revision", "v1")
    assert_is_the_base(call)
    assert read_target(call.out)[0].eos_ids == (7, 2)
    assert read_target(converted.out)[0].eos_ids == (2,)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    hub: FakeHub, tmp_path: Path, large: Path
) -> None:
    # First call: all -> cut in the second chunk, the rest -> the server is down.
    # Second call: all -> cut again, the rest -> comes.
    cut, down = Fault(n_bytes=CHUNK + 2**20), Fault(HTTPStatus.SERVICE_UNAVAILABLE)
    resumed = [None, f"bytes={CHUNK}-"]
    hub.faults = [cut, down]
    failed = convert(hub, tmp_path, "owner/large")
    assert failed.ranges(WEIGHTS) == resumed
    assert_one_error_line(failed, "owner/large is not a path here and cannot be downloaded")

    hub.faults = [cut]
    call = convert(hub, tmp_path, "owner/large")
    assert call.ranges(WEIGHTS) == resumed
    assert not call.ranges("config.json"), "a file that came whole is not fetched again"
    cached = next((tmp_path / "home").rglob(f"snapshots/*/{WEIGHTS}"))
    assert cached.read_bytes() == (large / WEIGHTS).read_bytes()
    assert_is_the_base(call)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["owner/unknown"], "owner/unknown is neither a path here nor a model you can see"),
        (["owner/gated"], "owner/gated is gated: accept its licence"),
        (["owner/name", "--revision", "v9"], "owner/name has no revision v9"),
    ],
)
def test_a_refusal_is_one_line(hub: FakeHub, tmp_path: Path, flags: list[str], words: str) -> None:
    call = convert(hub, tmp_path, *flags)
    assert_one_error_line(call, words)
    assert not call.ranges(WEIGHTS)


def test_a_revision_is_the_only_one_that_is_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(hub_id: str, *, revision: str | None, **_: object) -> str:
        asked.append(revision)
        return str(demo.BASE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    flags = ("--revision", "v1", "--prompt", "x = ", "--max_new_tokens", "1")
    run("generate", "--checkpoint_path", "owner/name", *flags)
    assert set(asked) == {"v1"}
