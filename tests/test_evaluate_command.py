"""Do `fasteagle evaluate perplexity` and `agreement` print the figures and refuse wrong calls?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, Refused, Run, prompt

from fasteagle import demo
from fasteagle.checkpoint import load_target
from fasteagle.evaluate.passes import encode_text
from fasteagle.evaluate.perplexity import token_losses
from fasteagle.tokenizer import load_tokenizer

OTHER = GOLDEN / "byte_pair" / "base"
SOURCE = "def add(one, other):\n    return one + other\n" * 6
TOKENS = torch.tensor(prompt(50))


CALL = ("evaluate", "perplexity", "--device", "cpu")
COMPARE = ("evaluate", "agreement", "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_bytes(SOURCE.replace("\n", "\r\n", 1).encode())
    return path


def test_the_command_prints_the_figures(run: Run, text: Path, tmp_path: Path) -> None:
    flags = ("--text", text, "--window", "32", "--stride", "32")
    out, error = run(*CALL, *flags, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert len(error.splitlines()) == 1
    names = ["nats per token", "perplexity", "bits per token", "bits per byte", "tokens", "bytes"]
    assert list(lines) == names
    for name, value in lines.items():
        assert float(value) == pytest.approx(found[name.replace(" ", "_")], rel=1e-5)
    content = text.read_bytes().decode()
    tokens = encode_text(load_tokenizer(demo.BASE), content).tokens
    losses = token_losses(load_target(demo.BASE, dtype=torch.float32), tokens, window=32, stride=32)
    assert found["bytes"] == len(content) == len(SOURCE) + 1
    assert found["tokens"] == len(tokens) - 1
    assert found["nats_per_token"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert (found["window"], found["stride"], found["dtype"]) == (32, 32, "float32")
    assert found["text"] == str(text)
    cut, _ = run(*CALL, *flags, "--max_tokens", "10")
    assert "tokens            10\n" in cut


def test_the_command_compares_with_the_embedded_base(run: Run, text: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "bfloat16", "--json", tmp_path / "found.json")
    out, _ = run(*COMPARE, "--text", text, *flags)
    found = json.loads((tmp_path / "found.json").read_text())
    assert out.splitlines()[0] == f"agreement         {found['agreement']:.6g}"
    assert 0.8 < found["agreement"] <= 1
    assert 0 < found["kl_nats"] < 0.01
    assert (found["dtype"], found["reference_dtype"]) == ("bfloat16", "float32")
    out, _ = run(*COMPARE, "--text", text)
    assert out.startswith("agreement         1\nkl nats           0\n")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_the_command_compares_along_prompts(run: Run, tmp_path: Path, name: str) -> None:
    lines = {"prompts.txt": "import os\nclass A:\n", "prompts.jsonl": '{"turns": ["import os"]}\n'}
    (tmp_path / name).write_text(lines[name])
    flags = ("--prompts", tmp_path / name, "--max_new_tokens", "5", "--reference_path", demo.BASE)
    out, _ = run(*COMPARE, *flags, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == found["equal"] == 5 * found["n_prompts"]
    assert found["n_prompts"] == len(lines[name].splitlines())
    assert out.startswith("agreement         1\n")


def write_texts(folder: Path) -> None:
    """The files that wrong calls name."""
    for name, text in {"empty": "", "short": "x", "latin": "caf\xe9", "good": SOURCE[:80]}.items():
        (folder / f"{name}.txt").write_bytes(text.encode("latin-1"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--text; see fasteagle evaluate perplexity --help"),
        ("--text nowhere.txt", "--text nowhere.txt does not exist"),
        ("--text .", "--text . is not a regular file"),
        ("--text empty.txt", "--text empty.txt is empty"),
        ("--text short.txt", "holds 1 token; scoring takes 2 or more"),
        ("--text latin.txt", "--text latin.txt is not UTF-8"),
        ("--text good.txt --window 1", "window is 1; give 2 tokens or more"),
        ("--text good.txt --window 0", "--window: '0' is not a whole number above 0"),
        ("--text good.txt --window 257", "window is 257; the context is 256"),
        ("--text good.txt --stride 0", "--stride: '0' is not a whole number above 0"),
        ("--text good.txt --window 8 --stride 9", "stride is 9; a window of 8 takes 1 to 8"),
        ("--text good.txt --max_tokens 1", "holds 1 token; scoring takes 2 or more"),
        ("--text good.txt --json good.txt", "--json and the text both name good.txt"),
        ("--text good.txt --json missing/x.json", "is no folder"),
        ("--text good.txt --win 8", "unrecognized arguments: --win 8"),
        ("--text good.txt --device tpu", "device 'tpu' is unknown"),
        ("--text good.txt --checkpoint_path nowhere", "nowhere"),
        (
            f"--text good.txt --checkpoint_path {demo.HEAD}",
            "is an EAGLE-1 head, not a target model",
        ),
    ],
)
def test_a_wrong_call_of_perplexity(
    tmp_path: Path, refused: Refused, flags: str, words: str
) -> None:
    write_texts(tmp_path)
    refused(*CALL, *flags.split(), words=words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "one of the arguments --text --prompts is required"),
        ("--text good.txt --prompts good.txt", "not allowed with"),
        ("--text good.txt --max_new_tokens 4", "--max_new_tokens has no meaning with --text"),
        ("--prompts good.txt --window 4", "--window has no meaning with --prompts"),
        ("--prompts nowhere.txt", "--prompts nowhere.txt does not exist"),
        ("--prompts empty.txt", "--prompts empty.txt is empty"),
        ("--prompts good.txt --max_new_tokens 254", "exceed the context of 256"),
        ("--prompts good.txt --chat_template auto", "has no chat template"),
        ("--text good.txt --window 257", "window is 257; the context is 256"),
        (f"--text good.txt --reference_path {demo.HEAD}", "is an EAGLE-1 head"),
        (f"--text good.txt --reference_path {OTHER}", "a vocabulary of 2048 and the reference one"),
        ("--text good.txt --reference_path renamed", "tokenizer reads the text otherwise"),
    ],
)
def test_a_wrong_call_of_agreement(
    tmp_path: Path, refused: Refused, folders: dict[str, Path], flags: str, words: str
) -> None:
    write_texts(tmp_path)
    if "renamed" in flags:
        shutil.copytree(demo.BASE, tmp_path / "renamed")
        shutil.copy(folders["prefixed"] / "tokenizer.model", tmp_path / "renamed")
    refused(*COMPARE, *flags.split(), words=words)


def test_a_measure_is_asked_for(refused: Refused) -> None:
    refused("evaluate", words="MEASURE; see fasteagle evaluate --help")
    refused("evaluate", "speed", words="invalid choice: 'speed'")
