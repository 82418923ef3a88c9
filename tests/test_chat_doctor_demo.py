"""Do chat, doctor and demo say what they do, and do it?"""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, Run

from fasteagle import demo, load, memory
from fasteagle.chat import render_chat
from fasteagle.commands import chat, doctor, plan
from fasteagle.commands import demo as demo_command
from fasteagle.commands.report import has_colour
from fasteagle.draft.choice import Asked
from fasteagle.engine import Engine
from fasteagle.metrics import Stats, merge
from fasteagle.request import Generation, Piece
from fasteagle.sample import SamplingParams

# --------------------------------------------------------------------------------------- chat


def test_a_chat_remembers_resets_and_quits(run: Run) -> None:
    flags = ("chat", "--chat_template", "none", "--max_new_tokens", "8")
    first, _ = run(*flags, typed="import os\n")
    out, error = run(*flags, typed="import os\n/reset\nimport os\n/quit\nimport os\n")
    assert out == first * 2
    assert error.count("accept_length") == 2
    assert "forgotten" in error
    both, _ = run(*flags, typed="import os\nimport os\n")
    assert both.startswith(first)
    assert both != first * 2


def test_a_full_context_is_said_and_the_oldest_turns_go(run: Run) -> None:
    flags = ("chat", "--chat_template", "none", "--max_new_tokens", "40", "--max_length", "48")
    out, error = run(*flags, typed="import os\nimport sys\n")
    assert "the context of 48 tokens is full: forgot the oldest 1 of 1 earlier" in error
    assert out == run(*flags, typed="import os\n")[0] + run(*flags, typed="import sys\n")[0]


def test_a_message_that_never_fits_is_refused_and_the_chat_goes_on(run: Run) -> None:
    flags = ("chat", "--chat_template", "none", "--max_new_tokens", "8")
    out, error = run(*flags, typed="x " * 400 + "\nimport os\n")
    assert "error: the message takes" in error
    assert out == run(*flags, typed="import os\n")[0]


def test_the_system_message_survives_forgetting(engine: Engine) -> None:
    system = [{"role": "system", "content": "# Be brief.\n"}]
    turns = [{"role": role, "content": "x = 1\n" * 9} for role in ["user", "assistant"] * 4]
    turns.append({"role": "user", "content": "y = 2"})
    kept, ids = chat.fit(engine, chat.TEMPLATES["none"], system, turns, 64)
    assert len(kept) < len(turns)
    assert kept == turns[-len(kept) :]
    assert kept[0]["role"] == "user"
    assert engine.tokenizer is not None
    assert engine.tokenizer.decode(ids).startswith("# Be brief.")
    assert len(ids) + 64 <= engine.max_length


def test_without_a_template_chat_asks_for_one(run: Run) -> None:
    _, error = run("chat", "--checkpoint_path", str(demo.BASE), status=2)
    assert error.startswith("error: the checkpoint has no chat template; give --chat_template")
    _, error = run("chat", "--chat_template", "nosuch", status=2)
    assert "'nosuch'" in error


def test_the_embedded_pair_goes_on_with_what_is_typed(run: Run) -> None:
    flags = ("--max_new_tokens", "8")
    plain, _ = run("chat", "--chat_template", "none", *flags, typed="import os\n")
    text, error = run("chat", *flags, typed="import os\n")
    assert text == plain
    assert "no chat model" in error


def test_an_answer_comes_back_as_fastchat_writes_it(engine: Engine) -> None:
    """The answers of a sentencepiece model begin with a space, a template writes its own."""
    limits = {"max_new_tokens": 8, "stop": [], "sampling": SamplingParams()}
    template, turns = chat.TEMPLATES["vicuna"], []
    for message in ("hello", "  again "):
        turns = chat.answer(engine, template, [], turns, message, limits)
    first, second = turns[1]["content"], turns[3]["content"]
    assert first == first.strip() != ""
    asked = [*turns, {"role": "user", "content": "x"}]
    assert engine.tokenizer is not None
    text = render_chat(asked, template=template, tokenizer=engine.tokenizer)
    _, _, conversation = text.partition("questions. ")
    assert conversation == (
        f"USER: hello ASSISTANT: {first}</s>USER: again ASSISTANT: {second}</s>USER: x ASSISTANT:"
    )
    plain = chat.answer(engine, chat.TEMPLATES["none"], [], [], "  import os", limits)
    assert plain[0]["content"] == "  import os"


def test_an_interrupted_answer_is_kept_and_the_chat_goes_on(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **limits: object) -> Iterator[Piece]:
        yield Piece("half", drafted=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", interrupted)
    limits = {"max_new_tokens": 8}
    turns = chat.answer(engine, chat.TEMPLATES["none"], [], [], "import os", limits)
    assert turns[-1] == {"role": "assistant", "content": "half"}
    assert "stopped" in capsys.readouterr().err


# ----------------------------------------------------------------------------- doctor and demo


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.mark.usefixtures("no_compiler")
def test_doctor_names_machine_model_and_verdict(run: Run) -> None:
    pair = GOLDEN / "byte_pair"
    flags = ("--checkpoint_path", pair / "base", "--draft_checkpoint_path", pair / "eagle1")
    out, _ = run("doctor", *flags, "--device", "cpu")
    for words in (torch.__version__, "no-such-compiler", "LlamaForCausalLM", "pytorch_model.bin"):
        assert words in out
    assert "tree mc_sim_7b_63: 26 nodes" in out
    assert "\nfits: " in out


@pytest.mark.usefixtures("no_compiler")
def test_doctor_says_what_does_not_fit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda device: 10_000_000)
    assert "does not fit: 22" in run("doctor", "--device", "cpu")[0]


def test_advice_counts_caches_in_the_precision_it_advises() -> None:
    sizes = {"weights": 100, "KV cache": 80}
    for itemsize, words in (
        (4, "they fit with --dtype bfloat16"),
        (2, "not even --dtype bfloat16"),
    ):
        made = plan.Plan([], [], sizes, {"--dtype bfloat16": 50}, itemsize)
        assert words in doctor.verdict(made, 100, torch.device("cpu"))


def test_free_memory_is_what_a_container_leaves(tmp_path: Path) -> None:
    assert memory.group_room(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.group_room(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    assert memory.group_room(tmp_path) == 600


def test_a_long_context_is_planned_as_far_as_it_is_reserved(tmp_path: Path, run: Run) -> None:
    shutil.copytree(demo.BASE, tmp_path / "long")
    config = json.loads((demo.BASE / "config.json").read_text())
    (tmp_path / "long/config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 131072})
    )
    out, _ = run("doctor", "--checkpoint_path", tmp_path / "long", "--device", "cpu")
    assert "8192 tokens a row, more when a request needs it" in out


@pytest.mark.parametrize(
    ("batch", "wish"),
    [(1, {}), (3, {}), (1, {"draft": "lookahead"}), (2, {"lookup": 3})],
    ids=["1", "3", "lookahead", "hybrid"],
)
def test_the_plan_is_what_the_engine_allocates(batch: int, wish: dict[str, Any]) -> None:
    names = (
        "checkpoint_path",
        "draft_checkpoint_path",
        "draft",
        "revision",
        "max_length",
        *("total_tokens", "depth", "tree_top_k"),
        *Asked.__annotations__,
    )
    flags = {**dict.fromkeys(names), **wish, "batch_size": batch}
    cpu = torch.device("cpu")
    planned = plan.make_plan(Namespace(**flags), torch.float32, cpu).n_bytes
    engine = load(dtype="float32", device="cpu", batch=batch, **wish)
    weights = sum(weight.nbytes for weight in engine.target.parameters())
    assert planned["weights"] == weights
    assert planned["KV cache"] == engine.builder.cache.n_bytes
    assert planned["the draft's memory"] == engine.builder.memory.n_bytes  # type: ignore[union-attr]
    assert planned["buffers"] == sum(tensor.nbytes for tensor in engine.state.tensors())


def test_the_demo_shows_text_and_a_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_command, "REPEATS", 1)
    monkeypatch.setattr(demo_command, "BENCH_TOKENS", 12)
    n_threads = torch.get_num_threads()
    out, error = run("demo", "--no_compile")
    assert "class Stack:" in out
    assert "accept_length" in out
    assert "identical: yes" in out
    assert "\x1b" not in out
    assert "CPU threads: 1" in error
    assert torch.get_num_threads() == n_threads


def test_no_prompt_of_the_demo_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    def merged(stats: list[Stats]) -> Stats:
        found.append(merge(stats).seconds)
        return merge(stats)

    monkeypatch.setattr(demo_command, "merge", merged)
    monkeypatch.setattr(demo_command, "REPEATS", 1)
    monkeypatch.setattr(demo_command, "BENCH_TOKENS", 8)
    engine = load()
    begin = time.perf_counter()
    assert demo_command.compare({"plain": engine}, "eager") == 0
    assert 0 < sum(found) <= time.perf_counter() - begin


def test_the_demo_fails_if_outputs_differ(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Engine):
        def generate(self, *args: Any, **flags: Any) -> list[Generation]:
            results = super().generate(*args, **flags)
            results[0].tokens[-1] += 1
            return results

    monkeypatch.setattr(demo_command, "REPEATS", 1)
    monkeypatch.setattr(demo_command, "BENCH_TOKENS", 4)
    wrong = Wrong(engine.target, tokenizer=engine.tokenizer)
    assert demo_command.compare({"plain": engine, "EAGLE": wrong}, "eager") == 1
    assert "identical: no" in capsys.readouterr().out


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colour(Terminal())
    assert not has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Terminal())
