"""Is a checkpoint converted all or not at all, and in the memory of one shard?"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hf_folders import (
    HEAD,
    LAYOUTS,
    TARGET,
    C,
    assert_equal,
    fused,
    fused_target,
    head_tensors,
    target_tensors,
    write,
)
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from fasteagle import hub
from fasteagle.checkpoint import convert, load_target, read_head, read_target
from fasteagle.commands import convert as command
from fasteagle.commands import run

ROOT = Path(__file__).parents[1]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts_to_what_is_read_directly(
    tmp_path: Path, layout: str, tied: bool
) -> None:
    tensors = target_tensors(tied=tied)
    folder = write(tmp_path / "hf", TARGET | {"tie_word_embeddings": tied}, tensors, layout)
    wanted = fused_target(tensors)
    config, direct = read_target(folder)
    assert_equal(dict(direct), wanted)
    out = convert(folder, tmp_path / "ours")
    assert_equal(load_file(out / "model.safetensors"), wanted)
    again, converted = read_target(out)
    assert again == config
    assert_equal(dict(converted), wanted)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_converts_to_what_is_read_directly(tmp_path: Path, layout: str, prefix: str) -> None:
    tensors = head_tensors()
    held = {prefix + name: tensor for name, tensor in tensors.items()}
    folder = write(tmp_path / "hf", HEAD, held, layout)
    out = convert(folder, tmp_path / "ours")
    assert json.loads((out / "config.json").read_text())["kind"] == "eagle"
    for source in (folder, out):
        config, read = read_head(source)
        assert_equal(dict(read), fused(tensors, ["layers.0."]))
        assert config.fc_bias


def test_companion_files_are_copied_and_others_are_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    for name in ("tokenizer.model", "tree.json", "notes.txt"):
        (folder / name).write_text(name)
    out = convert(folder)
    assert out == tmp_path / "hf-fasteagle"
    held = {file.name for file in out.iterdir()}
    assert held == {"config.json", "model.safetensors", "tokenizer.model", "tree.json"}


def test_converting_again_replaces_the_earlier_conversion(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    out = convert(folder)
    (out / "notes.txt").write_text("mine")
    assert convert(folder, dtype=torch.float16) == out
    assert read_target(out)[0].dtype == "float16"
    assert (out / "notes.txt").read_text() == "mine"


# ---- failures while converting


class FullDisk(io.FileIO):
    room = 2000

    def write(self, block: Any) -> int:
        if self.tell() + len(block) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    folder, out = write(tmp_path / "hf", TARGET, target_tensors()), tmp_path / "new" / "ours"
    if existing:
        convert(folder, out)
    before = everything(tmp_path)
    opened = Path.open

    def open_full(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        return FullDisk(path, "w") if "w" in mode else opened(path, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(OSError, match="No space left") as raised:
            convert(folder, out, dtype=torch.float16)
    assert raised.value.errno == errno.ENOSPC
    assert everything(tmp_path) == before
    assert (tmp_path / "new").exists() == existing


def test_what_fasteagle_did_not_write_is_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_text("precious")
    before = everything(tmp_path)
    for out in (folder, tmp_path / "other"):
        with pytest.raises(ValueError, match="already holds"):
            convert(folder, out)
    with pytest.raises(OSError, match="cannot write"):
        convert(folder, folder / "config.json" / "ours")
    assert everything(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_converting_takes_the_memory_of_a_shard_not_of_the_model(
    tmp_path: Path, layout: str
) -> None:
    n_shards, dim, inner = 8, 512, 4608
    config = TARGET | {"hidden_size": dim, "intermediate_size": inner, "vocab_size": 64}
    config |= {"num_hidden_layers": n_shards, "num_key_value_heads": 4, "torch_dtype": "float16"}
    rows = {
        "mlp.gate_proj": (inner, dim),
        "mlp.up_proj": (inner, dim),
        "mlp.down_proj": (dim, inner),
    }
    rows |= {f"self_attn.{name}_proj": (dim, dim) for name in "qkvo"}
    shared = {"model.embed_tokens.weight": (64, dim), "lm_head.weight": (64, dim)}
    shared |= {"model.norm.weight": (dim,)}
    weight_map = {}
    for index in range(n_shards):
        prefix = f"model.layers.{index}."
        shapes = {f"{prefix}{name}.weight": shape for name, shape in rows.items()}
        for norm in ("input", "post_attention"):
            shapes[f"{prefix}{norm}_layernorm.weight"] = (dim,)
        shapes |= shared if index == 0 else {}
        shard = {n: torch.zeros(shape, dtype=torch.float16) for n, shape in shapes.items()}
        name = f"part-{index}.{layout}"
        save = save_file if layout == "safetensors" else torch.save
        save(shard, tmp_path / name)
        weight_map |= dict.fromkeys(shapes, name)
    index_name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[layout]
    (tmp_path / f"{index_name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    shard_bytes = (tmp_path / f"part-1.{layout}").stat().st_size
    small = write(tmp_path / "small", TARGET, target_tensors(), f"one.{layout}")
    grown = peak_growth(tmp_path, warm_up=small)
    assert grown < 3 * shard_bytes, f"{grown} bytes for shards of {shard_bytes}"


def peak_growth(folder: Path, *, warm_up: Path) -> int:
    """By how many bytes converting `folder` raises the peak memory of a fresh process."""
    # Not ru_maxrss: a child begins with its parent's.
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from fasteagle.checkpoint import convert\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', status.read_text())[1])\n"
        "convert(sys.argv[1], sys.argv[1] + '-out')\n"
        "before = peak()\n"
        "convert(sys.argv[2], sys.argv[2] + '-out')\n"
        "print((peak() - before) * 1024)\n"
    )
    command_line = [sys.executable, "-c", code, str(warm_up), str(folder)]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


# ---- hub ids and the command line


def test_a_hub_id_is_downloaded_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "snapshot", TARGET, target_tensors(), "one.bin")
    calls = []

    def download(hub_id: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        calls.append((hub_id, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert convert("owner/name", revision="v2") == Path("checkpoints/owner/name")
    assert [call[:2] for call in calls] == [("owner/name", "v2")] * 2
    # Both kinds of weights are only asked for when the first is not there.
    assert [hub.SAFETENSORS[0] in calls[0][2], hub.BIN[0] in calls[0][2]] == [True, False]
    assert hub.BIN[0] in calls[1][2]
    assert read_target("checkpoints/owner/name")[0].dim == C
    assert len(calls) == 2


class GatedError(GatedRepoError):
    def __init__(self) -> None:
        pass


class UnknownError(RepositoryNotFoundError):
    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("offline"),
            "owner/name is not a path here and cannot be downloaded",
        ),
        (UnknownError(), "owner/name is neither a path here nor a model you can see"),
        (GatedError(), "owner/name is gated"),
    ],
)
def test_a_download_that_fails_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_target("owner/name")


@pytest.mark.parametrize("source", ["missing", "./owner/name", "a/b/c", "/no/such/folder"])
def test_a_path_that_is_not_there_is_never_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_target(source)


def test_the_command_converts_and_prints_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "hf", TARGET, target_tensors())
    out = tmp_path / "ours"
    assert (
        run(command, ["--checkpoint_dir", str(folder), "--out", str(out), "--dtype", "bfloat16"])
        == 0
    )
    assert capsys.readouterr().out == f"{out}\n"
    assert read_target(out)[0].dtype == "bfloat16"


def test_a_command_that_is_interrupted_returns_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert", interrupt)
    assert run(command, ["--checkpoint_dir", "x"]) == 130


@pytest.mark.parametrize("script", ["convert_hf_checkpoint", "convert_hf_checkpoint_EAGLE"])
def test_a_script_reports_one_line_and_status_2(tmp_path: Path, script: str) -> None:
    """Run from elsewhere and without the package on the path."""
    file = str(ROOT / "convert" / f"{script}.py")
    command_line = [sys.executable, file, "--checkpoint_dir", str(tmp_path)]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {tmp_path} has no config.json; expected a Hugging Face or a fasteagle folder"
    ]
