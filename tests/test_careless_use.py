"""Does careless use end in a clear error or the right text, never in wrong text or leftovers?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from conftest import plain_decode, prompt, tiny_target

import fasteagle
from fasteagle import demo
from fasteagle.cache import KVCache
from fasteagle.checkpoint import convert
from fasteagle.commands import run
from fasteagle.commands.trace import read_prompt_ids
from fasteagle.engine import Engine
from fasteagle.families import read_config
from fasteagle.model import Transformer
from fasteagle.prompt_files import read_prompts
from fasteagle.safewrite import replacing
from fasteagle.tokenizer import load_tokenizer
from fasteagle.tree import chain, static_tree

ROOT = Path(__file__).parents[1]


def test_a_request_that_loses_its_caches_to_another_stops() -> None:
    engine = Engine(tiny_target())
    request = engine.request(prompt(5), max_new_tokens=20, stop_ids=[])
    for takes_over in (
        lambda: engine.generate([prompt(7)], max_new_tokens=3),
        lambda: engine.warm_up(longest=8),
    ):
        rounds = engine.decode(engine.rows([request]))
        next(rounds)
        takes_over()
        with pytest.raises(RuntimeError, match="another request began on this engine"):
            next(rounds)


def test_threads_on_one_engine_get_their_own_text_or_an_error() -> None:
    engine, wrong = Engine(tiny_target()), []
    texts = [plain_decode(engine.target, prompt(5, seed), 30) for seed in range(4)]
    engine.generate([prompt(5)], max_new_tokens=2)

    def ask(seed: int) -> None:
        for _ in range(10):
            try:
                result = engine.generate([prompt(5, seed)], max_new_tokens=30, stop_ids=[])[0]
            except RuntimeError:
                continue
            if result.tokens != texts[seed]:
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_engine_outlives_caches_that_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasteagle.engine.DEFAULT_ROOM", 32)
    target, tokens = tiny_target(), prompt(5)
    engine, make = Engine(target), type(target).new_cache

    def small_only(self: Transformer, batch: int, n_slots: int) -> KVCache:
        if n_slots > 64:
            raise RuntimeError("CUDA out of memory")
        return make(self, batch, n_slots)

    monkeypatch.setattr(type(target), "new_cache", small_only)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate([tokens], max_new_tokens=100, stop_ids=[])
    result = engine.generate([tokens], max_new_tokens=20, stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, 20)


def test_a_text_is_no_list_of_texts() -> None:
    engine = fasteagle.load()
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate([""])
    with pytest.raises(ValueError, match="give a list of prompts"):
        engine.generate("def f", max_new_tokens=2)
    stop = "return"
    texts = [
        engine.generate(["def f"], max_new_tokens=30, stop=given)[0].text
        for given in (stop, [stop])
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_told_to_stop_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    def write(args: Any) -> None:
        with replacing(tmp_path / "big") as file:
            file.write(b"half")
            os.kill(os.getpid(), number)
            raise AssertionError("the signal was ignored")

    parts: dict[str, Any] = {"__doc__": "Write.", "__name__": "fasteagle.commands.write"}
    command = SimpleNamespace(**parts, add_arguments=lambda parser: None, run=write)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(cast(ModuleType, command), [])
    finally:
        signal.signal(number, before)
    assert stopped.value.code == 128 + number
    assert not list(tmp_path.iterdir())


def test_converting_again_removes_what_the_source_no_longer_has(tmp_path: Path) -> None:
    source, out = tmp_path / "head", tmp_path / "out"
    shutil.copytree(demo.HEAD, source)
    convert(source, out)
    assert (out / "tree.json").is_file()
    (source / "tree.json").unlink()
    convert(source, out)
    assert not (out / "tree.json").exists()
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("script", "ours", "others", "words"),
    [
        ("convert_hf_checkpoint", demo.BASE, demo.HEAD, "is an EAGLE-1 head, not a target model"),
        ("convert_hf_checkpoint_EAGLE", demo.HEAD, demo.BASE, "is a target model; expected an"),
    ],
)
def test_a_convert_script_takes_its_own_kind(
    tmp_path: Path, script: str, ours: Path, others: Path, words: str
) -> None:
    def convert_with_script(source: Path) -> subprocess.CompletedProcess[str]:
        file = str(ROOT / "convert" / f"{script}.py")
        flags = ["--checkpoint_dir", str(source), "--out", str(tmp_path / "out")]
        return subprocess.run([sys.executable, file, *flags], capture_output=True, text=True)

    done = convert_with_script(others)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert not list(tmp_path.iterdir())
    done = convert_with_script(ours)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")


def test_prompts_are_cut_at_line_ends_only(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x0cd"
    (tmp_path / "p.jsonl").write_text(
        "\ufeff" + json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n\n", encoding="utf-8"
    )
    assert read_prompts(str(tmp_path / "p.jsonl")) == [odd]
    (tmp_path / "p.txt").write_text(f"{odd}\nsecond\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt")) == [odd, "second"]


def test_only_first_guesses_make_a_chain() -> None:
    assert chain(2).name == "chain-2"
    assert static_tree([[1], [1, 2]]).name == "of 3 nodes"


def test_absurd_nesting_is_a_plain_error(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000)
    for read in (read_prompts, read_prompt_ids):
        with pytest.raises(ValueError, match="not JSON"):
            read(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[" * 100_000),
        ("tokenizer_config.json", "[" * 100_000),
        ("added_tokens.json", '{"<x>": "2048"}'),
        ("added_tokens.json", '{"<x>": true}'),
    ],
)
def test_absurd_files_beside_the_weights_are_plain_errors(
    tmp_path: Path, name: str, content: str
) -> None:
    shutil.copytree(demo.BASE, tmp_path / "base")
    (tmp_path / "base" / name).write_text(content)
    with pytest.raises(ValueError, match=r"JSON|added_tokens\.json gives ids"):
        fasteagle.load(tmp_path / "base")


def test_named_chat_templates_survive_a_conversion(tmp_path: Path) -> None:
    source, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(demo.BASE, source)
    named = source / "additional_chat_templates"
    named.mkdir()
    for name in ("rag", "tools"):
        (named / f"{name}.jinja").write_text(name)
    convert(source, out)
    assert load_tokenizer(out).chat_templates == {"rag": "rag", "tools": "tools"}
    (named / "rag.jinja").unlink()
    convert(source, out)
    assert load_tokenizer(out).chat_templates == {"tools": "tools"}


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": [["x"]]},
        {"rope_theta": 10**400},
        {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rms_norm_eps": 10**400},
    ],
)
def test_absurd_config_values_are_plain_errors(change: dict[str, Any]) -> None:
    config = json.loads((demo.BASE / "config.json").read_text())
    with pytest.raises(ValueError, match="field"):
        read_config(config | change)


@pytest.mark.parametrize("wrong", ["foo", "total_tokens"])
def test_a_keyword_that_load_does_not_know_is_refused(wrong: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword '{wrong}'; .* tree, draft_vocab"):
        fasteagle.load(**cast(Any, {wrong: 26}))
