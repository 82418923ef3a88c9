"""Talk to a model in its own chat format; answers stream, with their speed after each.

fasteagle chat --checkpoint_path meta-llama/Llama-2-7b-chat-hf \\
    --draft_checkpoint_path yuhuili/EAGLE-llama2-chat-7B --compile
fasteagle chat --checkpoint_path vicuna-7b --draft_checkpoint_path EAGLE-Vicuna-7B \\
    --chat_template vicuna --temperature 0.7

Type /reset to forget the conversation, /quit or end of input to leave. Ctrl-C stops an answer.
Without a checkpoint the embedded pair goes on with the Python that you type. --compile builds for
1024 tokens of conversation, and again, with a pause, when one grows past 1k, 2k, 4k, ...
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fasteagle.chat import TEMPLATES, ChatTemplate
from fasteagle.commands.compiling import warm_up
from fasteagle.commands.options import (
    AUTO,
    TALK_TOKENS,
    add_compile,
    add_model,
    add_sampling,
    load_engine,
    pick_template,
    sampling_params,
)
from fasteagle.commands.prompts import typed_lines
from fasteagle.commands.report import DIM, note, paint, write
from fasteagle.engine import Engine
from fasteagle.request import Generation

Messages = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle chat`."""
    add_model(parser)
    add_sampling(parser)
    parser.add_argument(
        "--chat_template",
        default=AUTO,
        metavar="NAME",
        help="auto (the checkpoint's own format), vicuna, llama-2-chat, a Jinja file, or none to "
        "join the messages as plain text (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    add_compile(parser)


def run(args: argparse.Namespace) -> None:
    """Answer line after line until the user leaves."""
    sampling = sampling_params(args)
    engine, loaded = load_engine(args, compiled=args.compile)
    assert engine.tokenizer is not None, "load_engine asks for a tokenizer"
    embedded = args.checkpoint_path is None and args.chat_template == AUTO
    name = "none" if embedded else args.chat_template
    template = pick_template(name, engine.tokenizer) or TEMPLATES["none"]
    note(loaded)
    if embedded:
        note("the embedded pair is no chat model: it goes on with the Python that you type")
    if args.compile:
        warm_up(engine, sampled=not sampling.greedy, n_tokens=TALK_TOKENS, call=args.call)
    system = [{"role": "system", "content": args.system}] if args.system else []
    limits = {"max_new_tokens": args.max_new_tokens, "stop": args.stop, "sampling": sampling}
    turns: Messages = []
    for line in typed_lines("you> "):
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            turns = []
            note("the conversation is forgotten")
            continue
        try:
            turns = answer(engine, template, system, turns, line, limits)
        except ValueError as error:  # this message does not fit; the next one may
            note(f"error: {error}")


def answer(
    engine: Engine,
    template: ChatTemplate,
    system: Messages,
    turns: Messages,
    line: str,
    limits: dict[str, Any],
) -> Messages:
    """Answer one message on stdout; returns the turns that are remembered from now on."""
    asked = [*turns, {"role": "user", "content": tidy(line, template)}]
    kept, ids = fit(engine, template, system, asked, limits["max_new_tokens"])
    if len(kept) < len(asked):
        n_dropped = (len(asked) - len(kept)) // 2
        note(
            f"the context of {engine.max_length} tokens is full: "
            f"forgot the oldest {n_dropped} of {len(asked) // 2} earlier exchanges"
        )
    written: list[str] = []
    result: Generation | None = None
    try:
        for piece in engine.stream(ids, **limits):
            write(piece.text)
            written.append(piece.text)
            result = piece.result
    except KeyboardInterrupt:
        note("\nstopped")
    text = "".join(written)
    write("" if text.endswith("\n") else "\n")
    if result:
        note(paint(summary(result), DIM, sys.stderr))
    return [*kept, {"role": "assistant", "content": tidy(text, template)}]


def tidy(text: str, template: ChatTemplate) -> str:
    """A message without the space around it, which a template writes itself, unless there is none.

    Sentencepiece answers begin with a space: kept, the next turn would hold two.
    """
    return text if template is TEMPLATES["none"] else text.strip()


def fit(
    engine: Engine, template: ChatTemplate, system: Messages, turns: Messages, n_wanted: int
) -> tuple[Messages, list[int]]:
    """Drop the oldest exchanges until the rest leaves room to answer; with its token ids.

    Room is what was asked for, at most a quarter of the context.
    """
    assert engine.tokenizer is not None, "load_engine asks for a tokenizer"
    room = max(min(n_wanted, engine.max_length // 4), engine.drafter.n_path)
    while True:
        ids = engine.tokenizer.encode_chat(system + turns, template)
        if len(ids) + room <= engine.max_length:
            return turns, ids
        if len(turns) < 2:
            raise ValueError(
                f"the message takes {len(ids)} tokens with its frame; at most "
                f"{engine.max_length - room} leave room to answer; shorten it"
            )
        turns = turns[2:]


def summary(result: Generation) -> str:
    """One line on an answer: how long, how fast, how often the draft was right."""
    stats = result.stats
    cut = ", cut off by a limit" if result.reason == "length" else ""
    return (
        f"[{stats.new_tokens} tokens{cut}, {stats.tokens_per_second:.1f} tokens/sec, "
        f"accept_length {stats.accept_length:.2f}]"
    )
