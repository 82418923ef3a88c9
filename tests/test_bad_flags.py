"""Is every wrong flag, prompt or machine one clear line on stderr and status 2?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused

from fasteagle.commands import options
from fasteagle.commands.main import main

ROOT = Path(__file__).parents[1]


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
        ("--temperature=1e40 --seed=1", "temperature is 1e+40"),
        ("--top_p=1.5", "top_p is 1.5"),
        ("--top_p=0", "top_p is 0.0"),
        ("--top_k=-1", "top_k is -1"),
        ("--seed=one", "--seed"),
        ("--seed=18446744073709551615 --num_samples=2", "seed is 18446744073709551616"),
        ("--seed=99999999999999999999", "64 bits"),
        ("--device=tpu", "device 'tpu' is unknown"),
        ("--device=meta", "device 'meta' is not supported"),
        ("--dtype=int3", "--dtype: invalid choice: 'int3'"),
        ("--max_length=1", "max_length is 1"),
        ("--max_length=300", "max_length is 300"),
        ("--tree=[[0],", "--tree is not JSON"),
        ("--tree=[[1, 0]]", "without its parent"),
        ("--tree=bushy", "--tree 'bushy'"),
        ("--tree=", "--tree ''"),
        ("--draft none --tree=", "--draft none has no tree"),
        ("--tree=chain-250", "less than a tree 250 deep"),
        ("--stop=", "stop string is empty"),
        ("--draft none --tree chain-3", "--draft none has no tree"),
        ("--draft none --draft_checkpoint_path x", "exclude each other"),
        ("--checkpoint_path x --draft eagle", "needs --draft_checkpoint_path"),
        ("--draft medium", "--draft: invalid choice: 'medium'"),
        ("--draft lookup --draft_checkpoint_path x", "--draft lookup and --draft_checkpoint_path"),
        ("--draft lookup --tree chain-3", "--draft lookup has no tree"),
        ("--draft lookahead --tree dynamic", "--draft lookahead has no tree"),
        ("--draft none --total_tokens 20", "--draft none has no tree; drop --total_tokens"),
        ("--tree dynamic --depth=-1", "--depth: '-1' is not a whole number"),
        ("--tree dynamic --depth 999999999", "depth 999999999 and top_k 10 runs the draft"),
        ("--tree dynamic --depth 200 --tree_top_k 200", "at most 1024, and 256 for each"),
        ("--tree chain-0", "--tree chain-0: a chain has 1 to 255 tokens"),
        ("--tree chain-999999", "--tree chain-999999: a chain has 1 to 255 tokens"),
        ("--speculate_k 999999", "--speculate_k 999999; give 1 to 255"),
        ("--draft lookup --ngram 999999999", "give an --ngram of 1 to 64"),
        ("--draft lookup --window 3", "--draft lookup has no use for --window"),
        ("--draft lookahead --lookup 3", "--draft lookahead has no use for --lookup"),
        ("--draft none --lookup 3", "--draft none guesses nothing; drop --lookup"),
        ("--guesses 3", "--guesses is for Lookahead; add --draft lookahead"),
        ("--ngram 3", "--ngram is what lookup compares; add --lookup"),
        ("--lookup 0", "--lookup: '0' is not a whole number above 0"),
        ("--checkpoint_path x --lookup 3", "or --draft lookup, or drop it"),
        ("--checkpoint_path x --window 3", "--window needs a drafter; give --draft lookahead,"),
        ("--draft lookahead --window 60", "make 268 nodes"),
        ("--draft lookahead --ngram 1", "ngram is at least 2"),
        ("--prompt a --batch b", "not allowed with"),
        ("--interactive --json x.json", "--interactive takes neither"),
        ("--chat_template auto", "no chat template"),
        ("--chat_template nosuch", "--chat_template 'nosuch'"),
        ("--max_new 3", "unrecognized arguments: --max_new 3"),
        ("--no_such_flag", "unrecognized arguments"),
        ("--json=missing/x.json", "is no folder"),
        ("--profile=missing/x.json", "is no folder"),
        ("--json=/dev/null", "not a regular file"),
        ("--json=x.json --profile=./x.json", "--json and --profile both name x.json"),
        (f"--checkpoint_path {ROOT}/README.md", "README.md is not a weight file"),
        ("--batch=missing.txt", "does not exist"),
        ("--batch=.", "--batch . is not a regular file"),
        ("--checkpoint_path=", "checkpoint path is empty"),
        ("--draft_checkpoint_path=", "checkpoint path is empty"),
    ],
)
def test_a_wrong_flag_of_generate(refused: Refused, flags: str, words: str) -> None:
    split = [flags] if flags.startswith("--tree=[") else flags.split(" ")
    refused("generate", *split, words=words)


def test_a_cuda_device_that_is_not_there(refused: Refused) -> None:
    n_devices = torch.cuda.device_count()
    refused("generate", f"--device=cuda:{n_devices}", words=f"device 'cuda:{n_devices}'")


def test_a_prompt_longer_than_the_context(refused: Refused) -> None:
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
def test_a_wrong_batch_file(
    tmp_path: Path, refused: Refused, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused("generate", "--batch", name, words=words)


def test_a_template_that_is_no_jinja(tmp_path: Path, refused: Refused) -> None:
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
def test_wrong_prompt_ids(tmp_path: Path, refused: Refused, prompts: str, words: str) -> None:
    (tmp_path / "ids.json").write_text(prompts)
    flags = ("--prompt_ids", "ids.json", "--max_new_tokens", "100", "--out", "out.json")
    refused("trace", *flags, words=words)


def test_prompt_ids_that_are_not_there(refused: Refused) -> None:
    flags = ("--prompt_ids", "ids.json", "--max_new_tokens", "3", "--out", "out.json")
    refused("trace", *flags, words="--prompt_ids ids.json cannot be read (No such file")


def test_trace_without_its_flags(refused: Refused) -> None:
    refused("trace", words="--prompt_ids, --max_new_tokens, --out; see fasteagle trace --help")


def test_an_unknown_command(refused: Refused) -> None:
    refused("generat", words="'generat' is no command")


def test_compiling_without_a_compiler(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
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
    refused: Refused, monkeypatch: pytest.MonkeyPatch, error: BaseException
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
