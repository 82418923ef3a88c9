"""Continue a prompt with plain or EAGLE decoding; the text streams to stdout.

fasteagle generate --prompt "def read_lines(path):" --max_new_tokens 60
fasteagle generate --checkpoint_path meta-llama/Llama-2-7b-chat-hf \\
    --draft_checkpoint_path yuhuili/EAGLE-llama2-chat-7B --chat_template auto \\
    --prompt "Why is the sky blue?" --compile
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from fasteagle.chat import ChatTemplate
from fasteagle.commands.compile_help import HELPS, waiting_for_help
from fasteagle.commands.compiling import warm_up
from fasteagle.commands.describe import describe
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import (
    TALK_TOKENS,
    add_compile,
    add_model,
    add_sampling,
    load_engine,
    nth_sample,
    pick_template,
    sampling_params,
)
from fasteagle.commands.prompts import check_prompts, encode, read_prompt, typed_lines
from fasteagle.commands.report import DIM, note, output_file, paint, timing, write, write_json
from fasteagle.engine import Engine
from fasteagle.metrics import Stats, merge
from fasteagle.prompt_files import read_prompts
from fasteagle.request import Generation
from fasteagle.sample import SamplingParams

DEMO_PROMPT = 'def read_lines(path):\n    """'
PROMPT = "Hello, my name is"


class Job(NamedTuple):
    """What every sample of a run shares."""

    engine: Engine
    template: ChatTemplate | None
    args: argparse.Namespace

    @property
    def limits(self) -> dict[str, Any]:
        return {"max_new_tokens": self.args.max_new_tokens, "stop": self.args.stop}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle generate` and of generate.py."""
    add_model(parser)
    add_sampling(parser)
    _add_prompt(parser)
    parser.add_argument(
        "--num_samples",
        type=positive,
        default=1,
        metavar="N",
        help="how often to continue each prompt; sample i uses seed + i (default: %(default)s)",
    )
    add_compile(parser)
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="write a Chrome trace of the first sample (chrome://tracing, Perfetto)",
    )
    parser.add_argument("--json", metavar="FILE", help="write texts, token ids and figures as JSON")


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    sources = group.add_mutually_exclusive_group()
    sources.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue; - reads stdin without its last newline; default: a short text",
    )
    sources.add_argument(
        "--batch",
        metavar="FILE",
        help="any number of prompts: one a line, or a .jsonl file with "
        '"prompt" or "turns"; texts come out in the order of the prompts',
    )
    sources.add_argument(
        "--interactive", action="store_true", help="continue every line that you type"
    )
    group.add_argument(
        "--chat_template",
        default="none",
        metavar="NAME",
        help="write the prompt as a chat message: auto (the checkpoint's own format), vicuna, "
        "llama-2-chat or a Jinja file; default: none, plain text",
    )
    group.add_argument(
        "--batch_size",
        type=positive,
        default=8,
        metavar="N",
        help="prompts of --batch that are decoded together; when one's text ends, the next prompt "
        "takes its row (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Generate, in the way that the flags ask for."""
    sampling = sampling_params(args)
    nth_sample(sampling, args.num_samples - 1)  # its seed must be one, too
    if args.interactive and (args.json or args.profile or args.num_samples > 1):
        raise ValueError("--interactive takes neither --json, --profile nor --num_samples")
    if args.json and args.profile and Path(args.json).resolve() == Path(args.profile).resolve():
        raise ValueError(f"--json and --profile both name {args.json}; give each its own file")
    prompts = [] if args.interactive else _prompts(args)
    with waiting_for_help(), ExitStack() as files:
        report, trace = (
            files.enter_context(output_file(name, flag))
            if name and not os.environ.get(HELPS)
            else None
            for name, flag in ((args.json, "--json"), (args.profile, "--profile"))
        )
        batch = max(1, min(len(prompts), args.batch_size))
        engine, loaded = load_engine(args, batch=batch, compiled=args.compile)
        assert engine.tokenizer is not None, "load_engine asks for a tokenizer"
        job = Job(engine, pick_template(args.chat_template, engine.tokenizer), args)
        ids = [encode(engine, prompt, job.template) for prompt in prompts]
        check_prompts(engine, ids, **job.limits)
        note(loaded)
        if args.interactive:
            _interact(job, sampling)
            return
        n_prompt = max(map(len, ids))
        compiling = _compile(job, sampling, n_prompt + args.max_new_tokens, n_prompt)
        before = engine.compiler.seconds
        samples = _samples(job, prompts, ids, sampling, trace)
        compiling += engine.compiler.seconds - before
        if report:
            write_json(report, _summary(job, sampling, compiling, prompts, samples))


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.batch:
        return read_prompts(args.batch)
    default = DEMO_PROMPT if args.checkpoint_path is None else PROMPT
    return [read_prompt(default if args.prompt is None else args.prompt)]


def _compile(
    job: Job, sampling: SamplingParams, n_tokens: int, n_prompt: int | None = None
) -> float:
    if not job.args.compile:
        return 0.0
    sampled = not sampling.greedy
    return warm_up(
        job.engine,
        sampled=sampled,
        n_tokens=n_tokens,
        n_prompt=n_prompt,
        call=job.args.call if _is_there_again(job.args) else None,
        at_once=_is_one_text(job.args),
    )


def _is_one_text(args: argparse.Namespace) -> bool:
    """Whether a prompt is fed once, so that it may be fed eagerly, and nobody looks into steps."""
    return not (args.interactive or args.batch or args.profile or args.num_samples > 1)


def _is_there_again(args: argparse.Namespace) -> bool:
    """Whether a second process with the same words finds the same prompts."""
    return args.prompt != "-" and not (args.batch and not Path(args.batch).is_file())


def _samples(
    job: Job,
    prompts: list[str],
    ids: list[list[int]],
    sampling: SamplingParams,
    trace: BinaryIO | None,
) -> list[list[Generation]]:
    """Every sample's generations, printed as they come; the first is profiled into `trace`."""
    n_samples, results, rates = job.args.num_samples, [], []
    for index in range(n_samples):
        if n_samples > 1:
            write(f"--- sample {index + 1} of {n_samples}\n")
        params = nth_sample(sampling, index)
        started = job.engine.compiler.clock()
        with _profiled(trace) if trace and index == 0 else nullcontext():
            if len(ids) > 1:
                generations = job.engine.generate(ids, sampling=params, **job.limits)
            else:
                generations = [_stream(job, prompts[0], ids[0], params)]
        seconds = job.engine.compiler.clock() - started
        if len(ids) > 1:
            _print_batch(prompts, generations)
        stats = _merged(generations)
        note(timing(index + 1, seconds, stats))
        rates.append(stats.new_tokens / seconds)
        results.append(generations)
    if n_samples > 1:
        note(f"Average tokens/sec: {sum(rates) / n_samples:.2f}")
    return results


def _stream(job: Job, prompt: str, ids: Sequence[int], sampling: SamplingParams) -> Generation:
    """Decode one prompt; on a terminal the text follows its prompt."""
    if sys.stdout.isatty() and job.template is None:
        write(paint(prompt, DIM, sys.stdout))
    result: Generation | None = None
    for piece in job.engine.stream(ids, sampling=sampling, **job.limits):
        write(piece.text)
        result = piece.result
    assert result is not None, "the last piece carries the result"
    write("" if result.text.endswith("\n") else "\n")
    return result


def _print_batch(prompts: list[str], generations: list[Generation]) -> None:
    for index, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        title = " ".join(prompt.split())
        short = title if len(title) <= 60 else f"{title[:57]}..."
        write(f"--- prompt {index + 1} of {len(prompts)}: {short}\n")
        write(generation.text.removesuffix("\n") + "\n")


def _interact(job: Job, sampling: SamplingParams) -> None:
    """Continue every line of stdin until its end; a prompt that does not fit is no end."""
    _compile(job, sampling, TALK_TOKENS)
    for index, line in enumerate(typed_lines("prompt> ")):
        started = job.engine.compiler.clock()
        try:
            result = _stream(job, "", encode(job.engine, line, job.template), sampling)
        except ValueError as error:
            note(f"error: {error}")
            continue
        note(timing(index + 1, job.engine.compiler.clock() - started, result.stats))


@contextmanager
def _profiled(trace: BinaryIO) -> Iterator[None]:
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(trace.name)


def _merged(generations: list[Generation]) -> Stats:
    """One Stats over a batch; ttft, the wait for a row included, is the mean over its prompts."""
    return merge([generation.stats for generation in generations])


def _summary(
    job: Job,
    sampling: SamplingParams,
    compiling: float,
    prompts: list[str],
    samples: list[list[Generation]],
) -> dict[str, Any]:
    return {
        "engine": describe(job.engine),
        "compiled": job.args.compile,
        "compile_seconds": compiling,
        "sampling": asdict(sampling),
        "results": [
            {
                "sample": index,
                "prompt": prompt,
                "text": generation.text,
                "tokens": generation.tokens,
                "reason": generation.reason,
                "stats": generation.stats.to_dict(),
            }
            for index, generations in enumerate(samples)
            for prompt, generation in zip(prompts, generations, strict=True)
        ],
    }
