"""Is every wrong call one clear line on stderr and status 2, with nothing written?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from hf_folders import HEAD, TARGET, head_tensors, target_tensors, write

from fasteagle import demo
from fasteagle.commands import options
from fasteagle.commands.main import main

ROOT = Path(__file__).parents[1]
GOLDEN_HEAD = str(GOLDEN / "byte_pair" / "eagle1")
Run = Callable[..., None]


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a command line in an empty folder; it must fail, name `words` and write nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path, words: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        status = main([str(part) for part in argv])
        out, error = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert len(error.splitlines()) == 1, error
        assert error.startswith("error: ")
        assert words in error
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def trace_flags(tmp_path: Path) -> list[str]:
    """What `trace` needs besides a model."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[1, 3, 5]]")
    out = tmp_path / "trace.json"
    return ["--prompt_ids", str(prompts), "--max_new_tokens", "4", "--out", str(out)]


# ---------------------------------------------------------------------------------- checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncated_safetensors(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors())
    cut(base / "model.safetensors")
    return base


def truncated_bin(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors(), "one.bin")
    cut(base / "pytorch_model.bin")
    return base


def wrong_shape(folder: Path) -> Path:
    return write(folder, TARGET, target_tensors() | {"model.norm.weight": torch.ones(3)})


def missing_tensor(folder: Path) -> Path:
    tensors = target_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return write(folder, TARGET, tensors)


def unknown_tensor(folder: Path) -> Path:
    return write(folder, TARGET, target_tensors() | {"model.adapter.weight": torch.ones(3)})


def not_a_number(folder: Path) -> Path:
    tensors = target_tensors()
    tensors["model.norm.weight"][2] = torch.nan
    return write(folder, TARGET, tensors)


def field_missing(folder: Path) -> Path:
    config = {name: value for name, value in TARGET.items() if name != "hidden_size"}
    return write(folder, config, target_tensors())


def unknown_architecture(folder: Path) -> Path:
    return write(folder, TARGET | {"architectures": ["GPT2LMHeadModel"]}, target_tensors())


def no_config(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors())
    (base / "config.json").unlink()
    return base


def broken_config(folder: Path) -> Path:
    base = write(folder, TARGET, target_tensors())
    (base / "config.json").write_text("{")
    return base


def a_head(folder: Path) -> Path:
    return write(folder, HEAD, head_tensors())


def nowhere(folder: Path) -> Path:
    return folder / "nowhere"


BROKEN: list[tuple[Callable[[Path], Path], str]] = [
    (nowhere, "does not exist"),
    (truncated_safetensors, "cut short"),
    (truncated_bin, "cut short"),
    (wrong_shape, "model.norm.weight has shape [3]; config.json asks for [16]"),
    (missing_tensor, "missing model.layers.1.mlp.up_proj.weight"),
    (unknown_tensor, "unknown model.adapter.weight"),
    (not_a_number, "model.norm.weight holds NaN or infinity"),
    (field_missing, "hidden_size"),
    (unknown_architecture, "GPT2LMHeadModel"),
    (no_config, "no config.json"),
    (broken_config, "not valid JSON"),
    (a_head, "EAGLE head"),
]


@pytest.mark.parametrize(("make", "words"), BROKEN, ids=[make.__name__ for make, _ in BROKEN])
def test_a_broken_checkpoint(
    tmp_path: Path, refused: Run, trace_flags: list[str], make: Callable[[Path], Path], words: str
) -> None:
    base = make(tmp_path / "base")
    refused("trace", "--checkpoint_path", base, *trace_flags, words=words)
    if make is not not_a_number:  # doctor reads headers only
        refused("doctor", "--checkpoint_path", base, words=words)


@pytest.mark.parametrize("command", ["trace", "doctor"])
def test_the_head_of_another_model(refused: Run, trace_flags: list[str], command: str) -> None:
    flags = trace_flags if command == "trace" else []
    words = "head for a model of dim 96 and vocabulary 260"
    refused(command, "--draft_checkpoint_path", GOLDEN_HEAD, *flags, words=words)


def test_a_model_given_as_its_own_head(refused: Run, trace_flags: list[str]) -> None:
    flags = ("--draft_checkpoint_path", demo.BASE, *trace_flags)
    refused("trace", *flags, words="expected an EAGLE head")


def test_a_wrong_tokenizer_file(tmp_path: Path, refused: Run) -> None:
    base = tmp_path / "base"
    shutil.copytree(demo.BASE, base)
    (base / "tokenizer.model").write_bytes(b"no tokenizer")
    refused("generate", "--checkpoint_path", base, words="tokenizer.model")


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, refused: Run) -> None:
    base = write(tmp_path / "base", TARGET, target_tensors())
    refused("generate", "--checkpoint_path", base, words="has no tokenizer")
    refused("chat", "--checkpoint_path", base, words="has no tokenizer")


# ----------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prompt=", "the prompt is empty"),
        ("--max_new_tokens=0", "--max_new_tokens: '0' is not a whole number above 0"),
        ("--max_new_tokens=many", "'many' is not a whole number above 0"),
        ("--num_samples=0", "--num_samples"),
        ("--temperature=-1", "temperature is -1.0"),
        ("--temperature=nan", "temperature is nan"),
        ("--temperature=warm", "--temperature"),
        ("--top_p=1.5", "top_p is 1.5"),
        ("--top_p=0", "top_p is 0.0"),
        ("--top_k=-1", "top_k is -1"),
        ("--seed=one", "--seed"),
        ("--seed=99999999999999999999", "64 bits"),
        ("--device=tpu", "device 'tpu' is unknown"),
        ("--device=meta", "device 'meta' is not supported"),
        ("--dtype=int3", "--dtype: invalid choice: 'int3'"),
        ("--max_length=1", "max_length is 1"),
        ("--max_length=300", "max_length is 300"),
        ("--tree=[[0],", "--tree is not JSON"),
        ("--tree=[[1, 0]]", "without its parent"),
        ("--tree=bushy", "--tree 'bushy'"),
        ("--tree=chain-250", "less than a tree 250 deep"),
        ("--stop=", "stop string is empty"),
        ("--draft none --tree chain-3", "--draft none has no tree"),
        ("--draft none --draft_checkpoint_path x", "exclude each other"),
        ("--checkpoint_path x --draft eagle", "needs --draft_checkpoint_path"),
        ("--prompt a --batch b", "not allowed with"),
        ("--interactive --json x.json", "--interactive takes neither"),
        ("--chat_template auto", "no chat template"),
        ("--chat_template nosuch", "--chat_template 'nosuch'"),
        ("--max_new 3", "unrecognized arguments: --max_new 3"),
        ("--no_such_flag", "unrecognized arguments"),
        ("--json=missing/x.json", "is no folder"),
        ("--profile=missing/x.json", "is no folder"),
        ("--json=/dev/null", "not a regular file"),
        ("--batch=missing.txt", "does not exist"),
    ],
)
def test_a_wrong_flag_of_generate(refused: Run, flags: str, words: str) -> None:
    split = [flags] if flags.startswith("--tree=[") else flags.split(" ")
    refused("generate", *split, words=words)


def test_a_cuda_device_that_is_not_there(refused: Run) -> None:
    n_devices = torch.cuda.device_count()
    refused("generate", f"--device=cuda:{n_devices}", words=f"device 'cuda:{n_devices}'")


def test_a_prompt_longer_than_the_context(refused: Run) -> None:
    refused("generate", "--prompt", "x = 1\n" * 200, words="at most 255 fit in a context of 256")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", "\n \n", "is empty"),
        ("latin.txt", "caf\xe9", "not UTF-8"),
        ("cut.jsonl", '{"prompt": "a"}\n{"pro', "line 2: not JSON"),
        ("other.jsonl", '{"question": "a"}', "line 1: expected"),
        ("turns.jsonl", '{"turns": []}', "line 1: expected"),
        ("long.txt", "a\n" + "x = 1 " * 300, "prompt 2 of 2: prompt has"),
    ],
)
def test_a_wrong_batch_file(tmp_path: Path, refused: Run, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused("generate", "--batch", name, words=words)


def test_a_template_that_is_no_jinja(tmp_path: Path, refused: Run) -> None:
    (tmp_path / "chat.jinja").write_text("{% for %}")
    refused("generate", "--chat_template", "chat.jinja", words="chat.jinja")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", "is not JSON"),
        ("{}", "expected a list of lists"),
        ("[]", "expected a list of lists"),
        ("[1, 2]", "prompt 1 is 1"),
        ("[[1], [2, true]]", "prompt 2 is [2, true]"),
        ('[["a"]]', 'prompt 1 is ["a"]'),
        ("[[]]", "prompt 1 is []"),
        ("[[1], [4096]]", "prompt 2 of 2: prompt holds token 4096"),
        ("[[-1]]", "prompt holds token -1"),
        (json.dumps([[1] * 400]), "at most 255 fit"),
        (json.dumps([[1] * 253]), "less than a tree 3 deep"),
        (json.dumps([[1] * 200]), "200 tokens, and 100 new ones exceed the context of 256"),
    ],
)
def test_wrong_prompt_ids(tmp_path: Path, refused: Run, prompts: str, words: str) -> None:
    (tmp_path / "ids.json").write_text(prompts)
    flags = ("--prompt_ids", "ids.json", "--max_new_tokens", "100", "--out", "out.json")
    refused("trace", *flags, words=words)


def test_prompt_ids_that_are_not_there(refused: Run) -> None:
    flags = ("--prompt_ids", "ids.json", "--max_new_tokens", "3", "--out", "out.json")
    refused("trace", *flags, words="ids.json")


def test_trace_without_its_flags(refused: Run) -> None:
    refused("trace", words="--prompt_ids, --max_new_tokens, --out; see fasteagle trace --help")


def test_an_unknown_command(refused: Run) -> None:
    refused("generat", words="'generat' is no command")


def test_compiling_without_a_compiler(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    flags = ("--device", "cpu", "--compile")
    refused("generate", *flags, words="--compile needs a C++ compiler")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_too_little_memory(
    refused: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def load(*args: Any, **flags: Any) -> None:
        raise error

    monkeypatch.setattr(options, "load", load)
    refused("generate", words="error: out of memory")


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **flags: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(options, "load", load)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main(["generate"])


# ----------------------------------------------------------------------------- as true programs


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "fasteagle", "generate", "--checkpoint_path", "nowhere"],
        ["-m", "fasteagle", "trace", "--prompt_ids", "nowhere", "--max_new_tokens", "1"],
        ["generate.py", "--temperature", "-1"],
    ],
    ids=["generate", "trace", "generate.py"],
)
def test_a_program_ends_with_status_2_and_one_line(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
