"""Is what cannot be quantized one clear line and status 2, with every file as it was?"""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import GOLDEN, Refused, Run

from fasteagle import demo, quantize, quantize_gptq
from fasteagle.commands.main import main
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from tests.gptfast_files import Mode, write_gptfast
from tests.hf_folders import HEAD, TARGET, Tensors, everything, head_tensors, target_tensors, write
from tests.quant_files import write_awq_folder, write_gptq_folder

ROOT = Path(__file__).parents[1]
TEXT = "The eagle looks down on the river, and the river does not look up. " * 60


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", TARGET, target_tensors())


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return write(tmp_path / "head", HEAD, head_tensors())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def embedded(folder: Path) -> Path:
    """A model that has a tokenizer."""
    shutil.copytree(demo.BASE, folder)
    return folder


# -------------------------------------------------------------------------------------- recipes


def test_a_group_size_that_does_not_divide(base: Path, refused: Refused) -> None:
    flags = ("quantize", "--checkpoint_path", base, "--mode", "int4")
    words = "group size 32 does not divide the 16 inputs of layers.0.self_attn.qkv_proj (12 such"
    refused(*flags, words=words)
    cures = "give --pad to fill up the last group, or --keep '*.qkv_proj' to"
    refused(*flags, words=cures)
    wider = ("quantize", "--checkpoint_path", GOLDEN / "byte_pair" / "base", "--groupsize", "64")
    refused(*wider, words="give --pad to fill up the last group, --groupsize 32, or --keep")
    more = [f"--keep=*.{name}" for name in ("qkv_proj", "o_proj", "gate_up_proj")]
    refused(*flags, *more, words="the 20 inputs of layers.0.mlp.down_proj (3 such matrices)")
    refused(*flags, "--lm_head", "4", "--keep", "layers.*", words="16 inputs of lm_head (1 such")


@pytest.mark.parametrize("size", [0, -32, 48, 512])
def test_a_group_size_of_no_kernel(size: int, base: Path, refused: Refused) -> None:
    with pytest.raises(ValueError, match=f"group size {size} is not supported; expected 32, 64"):
        plan_quantization(base, Recipe(4, size, pad=True))
    words = f"argument --groupsize: invalid choice: {size} (choose from 32, 64, 128, 256)"
    refused("quantize", "--checkpoint_path", base, f"--groupsize={size}", words=words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--keep layers.7.*", "--keep layers.7.* matches no matrix; there are layers.0.self_attn"),
        ("--keep *norm", "--keep *norm matches no matrix"),
        ("--keep *", "--keep leaves nothing to quantize; keep fewer matrices"),
        ("--keep layers.* --lm_head 16", "--keep leaves nothing to quantize"),
        ("--mode int3", "invalid choice: 'int3' (choose from 'int8', 'int4', 'int4-gptq')"),
        ("--mode int4-gptq", "--mode int4-gptq needs --calibration FILE"),
        ("--calibration a.txt", "--mode int4 needs no --calibration; drop it, or use int4-gptq"),
        ("--target_checkpoint_path x", "--mode int4 needs no --target_checkpoint_path; drop it"),
        ("--seed 1", "--mode int4 needs no --seed; drop it"),
        ("--mode int8 --groupsize 64", "--mode int8 has one scale a row; drop --groupsize"),
        ("--kind eagle", "is a target model; expected an EAGLE head, which holds fc.weight"),
    ],
)
def test_flags_that_cannot_be(flags: str, words: str, base: Path, refused: Refused) -> None:
    refused("quantize", "--checkpoint_path", base, "--pad", *flags.split(), words=words)


def test_a_head_has_no_lm_head(refused: Refused) -> None:
    head = GOLDEN / "byte_pair" / "eagle1"
    words = "an EAGLE head uses its model's lm_head; drop --lm_head"
    refused("quantize", "--checkpoint_path", head, "--lm_head", "4", words=words)


@pytest.mark.parametrize(
    ("script", "source", "words"),
    [
        ("quantize_EAGLE.py", "base", "is a target model; expected an EAGLE head"),
        ("quantize_llama.py", "eagle1", "is an EAGLE-1 head, not a target model"),
    ],
)
def test_a_script_refuses_the_other_kind(
    script: str,
    source: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(GOLDEN / "byte_pair" / source)
    monkeypatch.setattr("sys.argv", [script, "--checkpoint_path", path])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "quantize" / script), run_name="__main__")
    assert words in capsys.readouterr().err


# -------------------------------------------------------------------------------------- sources


def our_file(path: Path) -> Path:
    folder = write(path, TARGET, target_tensors())
    return quantize_checkpoint(plan_quantization(folder, Recipe(8)))


def gptq_folder(path: Path) -> Path:
    write_gptq_folder(path)
    return path


def awq_folder(path: Path) -> Path:
    write_awq_folder(path)
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (our_file, "fasteagle int8 (mse)"),
        (gptq_folder, "GPTQ"),
        (awq_folder, "AWQ"),
        (lambda path: write_gptfast(path, Mode(4))[0], "gpt-fast int4"),
    ],
    ids=["ours", "gptq", "awq", "gpt-fast"],
)
def test_what_is_quantized_already(
    make: Callable[[Path], Path], name: str, tmp_path: Path, refused: Refused
) -> None:
    path = make(tmp_path / "base")
    words = f"is quantized already ({name}); give the checkpoint that it was made from"
    refused("quantize", "--checkpoint_path", path, words=words)
    words = f"is quantized already ({name}); load it as it is, or convert"
    refused("convert", "--checkpoint_dir", path, words=words)


def changed(name: str, value: float) -> Tensors:
    tensors = target_tensors()
    tensors[name].view(-1)[3] = value
    return tensors


@pytest.mark.parametrize("layout", ["one.safetensors", "shards.bin"])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.2.mlp.up_proj.weight", torch.nan, "up_proj.weight holds NaN or infinity"),
        ("model.norm.weight", -torch.inf, "model.norm.weight holds NaN or infinity"),
        ("model.norm.weight", 1e5, "norm.weight overflows float16; run `fasteagle convert"),
        ("model.embed_tokens.weight", -1e5, "embed_tokens.weight overflows float16"),
    ],
)
def test_values_that_are_wrong(
    name: str, value: float, words: str, layout: str, tmp_path: Path, refused: Refused
) -> None:
    config = TARGET | {"torch_dtype": "float16"}
    path = write(tmp_path / "base", config, changed(name, value), layout)
    refused("quantize", "--checkpoint_path", path, "--mode", "int8", words=words)


# ----------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "calibration text text.txt does not exist"),
        (b"", "the calibration text text.txt has 0 tokens; at least 256 are needed, 128 windows"),
        (b"Too short to say much.", "give a longer text"),
        (b"\xff\xfe\x00caf\xe9" * 999, "text.txt"),
    ],
    ids=["missing", "empty", "short", "not UTF-8"],
)
def test_a_calibration_text_that_is_none(
    content: bytes | None, words: str, tmp_path: Path, refused: Refused
) -> None:
    path = embedded(tmp_path / "base")
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    flags = ("--checkpoint_path", path, "--mode", "int4-gptq", "--pad")
    refused("quantize", *flags, "--calibration", "text.txt", words=words)


def test_calibrations_that_cannot_be(
    base: Path, head: Path, text: Path, tmp_path: Path, refused: Refused
) -> None:
    flags = ("--mode", "int4-gptq", "--pad", "--calibration", text)
    refused("quantize", "--checkpoint_path", base, *flags, words="has no tokenizer to read the")
    of_head = ("quantize", "--checkpoint_path", head, *flags)
    refused(*of_head, words="calibrated on its model's features; give --target_checkpoint_path")
    other = embedded(tmp_path / "other")
    words = "is a head for a model of dim 16 and vocabulary 24, but the target has dim 256"
    refused(*of_head, "--target_checkpoint_path", other, words=words)
    refused(*of_head, "--target_checkpoint_path", head, words="is an EAGLE-1 head, not a target")
    of_base = ("quantize", "--checkpoint_path", other, *flags)
    words = "--target_checkpoint_path is for an EAGLE head"
    refused(*of_base, "--target_checkpoint_path", other, words=words)
    refused(*of_base, "--calibration_length", "1", words="windows of 1 tokens are too short")


# ----------------------------------------------------------------------------- broken off runs


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(base: Path, refused: Refused) -> None:
    base.chmod(0o555)
    try:
        refused("quantize", "--checkpoint_path", base, "--pad", words="Permission denied")
    finally:
        base.chmod(0o755)


@pytest.mark.parametrize("n_writes", [0, 1], ids=["weights", "config.json"])
def test_a_full_disk(
    n_writes: int, base: Path, run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("quantize", "--checkpoint_path", base, "--mode", "int8")
    run(*call)
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > n_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    words = "base: No space left on device; nothing was changed there"
    refused(*call, "--clip", "minmax", words=words)
    assert len(calls) == n_writes + 1


def interrupt(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def terminate(*_: object, **__: object) -> NoReturn:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("the signal was ignored")


@pytest.mark.parametrize("gptq", [False, True], ids=["nearest", "gptq"])
@pytest.mark.parametrize("stop", [interrupt, terminate])
def test_a_run_that_is_broken_off_leaves_nothing(
    stop: Callable[..., NoReturn],
    gptq: bool,
    tmp_path: Path,
    text: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = embedded(tmp_path / "base")
    run("quantize", "--checkpoint_path", path, "--pad")
    before = everything(tmp_path)
    module = quantize_gptq if gptq else quantize
    work = getattr(module, "gptq" if gptq else "quantize")
    seen: list[list[Path]] = []

    def third(*args: object, **settings: object) -> object:
        seen.append(sorted(path.rglob("*")))
        return stop() if len(seen) == 3 else work(*args, **settings)

    monkeypatch.setattr(module, "gptq" if gptq else "quantize", third)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # `leave` takes SIGTERM
    flags = ["--mode", "int4-gptq", "--calibration", str(text)] if gptq else ["--clip", "minmax"]
    call = ["quantize", "--checkpoint_path", str(path), "--pad", *flags]
    if stop is interrupt:
        assert main(call) == 130
    else:
        with pytest.raises(SystemExit, match="143"):
            main(call)
    assert any(file.name.endswith(".part") for file in seen[-1])  # it was in the middle
    assert everything(tmp_path) == before
