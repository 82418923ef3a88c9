"""Does the program find its commands, and does generate give what the engine gives?"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import Run

from fasteagle import commands, demo
from fasteagle.commands import demo as demo_command
from fasteagle.commands.compiling import compiler_problem
from fasteagle.commands.main import COMMANDS, main, module_of
from fasteagle.engine import Engine
from fasteagle.sample import SamplingParams

ROOT = Path(__file__).parents[1]
PROMPT = "class Stack:\n    def __init__(self):\n"


# ------------------------------------------------------------------------------- the program


def test_without_arguments_the_help_names_every_command(run: Run) -> None:
    out, _ = run()
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert out == run("--help")[0]


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version")[0].startswith("fasteagle 0.")


def test_the_help_needs_no_torch() -> None:
    code = "import sys; from fasteagle.commands.main import main; main([]); print(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert "'torch'" not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_explained(name: str) -> None:
    module = module_of(name)
    parser = commands.Parser()
    module.add_arguments(parser)
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert not unexplained


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "convert"])
def test_the_examples_in_a_help_parse(name: str) -> None:
    module = module_of(name)
    text = (module.__doc__ or "").replace("\\\n", " ")
    examples = [line for line in text.splitlines() if line.startswith(f"fasteagle {name}")]
    assert len(examples) >= 2
    for example in examples:
        parser = commands.Parser()
        module.add_arguments(parser)
        parser.parse_args(shlex.split(example)[2:])


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_command, "run", interrupt)
    assert main(["demo"]) == 130


def test_a_closed_pipe_ends_quietly() -> None:
    command = [sys.executable, "-m", "fasteagle", "generate", "--max_new_tokens", "120"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == commands.PIPE_CLOSED
    assert "rror" not in errors


# ----------------------------------------------------------------------------------- generate


def test_the_text_is_the_engines_and_alone_on_stdout(run: Run, engine: Engine) -> None:
    out, error = run("generate", "--prompt", PROMPT, "--max_new_tokens", "30")
    (wanted,) = engine.generate([PROMPT], max_new_tokens=30)
    assert out.rstrip("\n") == wanted.text.rstrip("\n")
    assert "Time for inference 1: " in error
    assert "accept_length" in error
    assert error.startswith("loaded LlamaForCausalLM (3.4M, float32, cpu), EAGLE head")


def test_plain_decoding_gives_the_same_text(run: Run) -> None:
    flags = ("generate", "--prompt", PROMPT, "--max_new_tokens", "30")
    out, error = run(*flags, "--draft", "none")
    assert out == run(*flags)[0]
    assert "no draft" in error
    assert "accept_length 1.00" in error


def test_sample_i_uses_the_seed_plus_i(run: Run, engine: Engine, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ("--prompt", PROMPT, "--max_new_tokens", "12", "--temperature", "0.8", "--top_k", "50")
    out, error = run("generate", *flags, "--seed", "5", "--num_samples", "2", "--json", report)
    for index, found in enumerate(json.loads(report.read_text())["results"]):
        sampling = SamplingParams(0.8, 50, seed=5 + index)
        (wanted,) = engine.generate([PROMPT], max_new_tokens=12, sampling=sampling)
        assert found["sample"] == index
        assert found["tokens"] == wanted.tokens
        assert wanted.text in out
    assert "Average tokens/sec" in error


def test_the_report_holds_the_figures(run: Run, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    out, _ = run("generate", "--prompt", PROMPT, "--max_new_tokens", "12", "--json", report)
    written = json.loads(report.read_text())
    (result,) = written["results"]
    assert written["sampling"]["temperature"] == 0
    assert (result["prompt"], result["reason"]) == (PROMPT, "length")
    assert result["text"] in out
    assert result["stats"]["new_tokens"] == len(result["tokens"]) == 12
    assert result["stats"]["accept_length"] >= 1


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_batch_gives_what_its_prompts_give_alone(
    run: Run, engine: Engine, tmp_path: Path, kind: str
) -> None:
    # Five prompts on two rows: a row that is free takes the next.
    prompts = ["import os", "class Error(Exception):", "def main():", "x = [", "import re"]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    lines[1] = json.dumps({"turns": [prompts[1], "and then?"]})
    file, report = tmp_path / f"prompts.{kind}", tmp_path / "report.json"
    file.write_text("\n\n".join(prompts if kind == "txt" else lines) + "\n")
    flags = ("--max_new_tokens", "10", "--batch_size", "2", "--json", report)
    out, _ = run("generate", "--batch", file, *flags)
    results = json.loads(report.read_text())["results"]
    alone = [engine.generate([prompt], max_new_tokens=10)[0].tokens for prompt in prompts]
    assert [result["tokens"] for result in results] == alone
    assert [result["prompt"] for result in results] == prompts
    titles = [line for line in out.splitlines() if line.startswith("--- prompt ")]
    assert titles == [f"--- prompt {n} of 5: {prompt}" for n, prompt in enumerate(prompts, 1)]
    places = [
        out.index(result["text"], out.index(t)) for t, result in zip(titles, results, strict=True)
    ]
    assert places == sorted(places)


def test_a_prompt_may_come_from_stdin(run: Run) -> None:
    flags = ("generate", "--max_new_tokens", "10", "--prompt")
    assert run(*flags, "-", typed="import os\n")[0] == run(*flags, "import os")[0]


def test_a_stop_string_ends_the_text_before_it(run: Run) -> None:
    flags = ("generate", "--prompt", PROMPT, "--max_new_tokens", "30")
    whole, _ = run(*flags)
    cut, _ = run(*flags, "--stop", "call", "--stop", "nowhere")
    assert cut == whole.partition("call")[0] + "\n"


def test_every_typed_line_is_continued(run: Run) -> None:
    flags = ("generate", "--max_new_tokens", "6")
    out, error = run(*flags, "--interactive", typed="import os\n\n" + "x " * 300 + "\ndef f(x):\n")
    assert out == run(*flags, "--prompt", "import os")[0] + run(*flags, "--prompt", "def f(x):")[0]
    assert error.count("Time for inference") == 2
    assert "error: prompt has" in error


def test_what_is_typed_keeps_its_indentation(run: Run) -> None:
    flags = ("generate", "--max_new_tokens", "6")
    typed, _ = run(*flags, "--interactive", typed="    return x\n")
    assert typed == run(*flags, "--prompt", "    return x")[0]
    assert typed != run(*flags, "--prompt", "return x")[0]


def test_a_chat_template_frames_the_prompt(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("# {{ messages[0]['content'] }}")
    flags = ("generate", "--max_new_tokens", "8")
    framed, _ = run(*flags, "--prompt", "Errors", "--chat_template", template)
    assert framed == run(*flags, "--prompt", "# Errors")[0]


def test_a_profile_is_a_chrome_trace(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    run("generate", "--max_new_tokens", "2", "--profile", trace)
    assert json.loads(trace.read_text())["traceEvents"]
    assert list(tmp_path.iterdir()) == [trace]


def test_the_script_runs_without_an_install(tmp_path: Path, run: Run) -> None:
    command = [sys.executable, str(ROOT / "generate.py"), "--max_new_tokens", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    )
    assert done.stdout == run("generate", "--max_new_tokens", "4")[0]


@pytest.mark.skipif(bool(compiler_problem(torch.device("cpu"))), reason="no C++ compiler")
def test_compiling_is_announced_and_changes_nothing(run: Run) -> None:
    flags = ("generate", "--draft", "none", "--device", "cpu", "--max_new_tokens", "20")
    out, error = run(*flags, "--compile")
    assert out == run(*flags)[0]
    assert "compiling ... " in error


def test_the_embedded_pair_is_what_no_checkpoint_means(run: Run) -> None:
    named = ("--checkpoint_path", demo.BASE, "--draft_checkpoint_path", demo.HEAD)
    flags = ("generate", "--prompt", PROMPT, "--max_new_tokens", "10")
    assert run(*flags, *named)[0] == run(*flags)[0]
