"""Count which tokens occur, so that a head guesses only among the most frequent ones.

fasteagle draft-vocab --size 8192 --prompts questions.jsonl --max_new_tokens 256 \\
    --checkpoint_path vicuna-7b --draft_checkpoint_path EAGLE-Vicuna-7B --chat_template vicuna
fasteagle draft-vocab --size 512 --text corpus.txt more.txt --out draft_vocab.json

Counts the model's own outputs on --prompts, which tell best what it will write, or --text, which
needs no decoding, or both. The file goes beside the head, where loading finds it. Coverage is the
share of the counted tokens that are kept; held out, the share in every fifth text or output of a
vocabulary that was counted on the others, which is what to expect of new text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fasteagle import demo
from fasteagle.assemble import find_tokenizer, folder_of
from fasteagle.commands.compiling import warm_up
from fasteagle.commands.draft_flags import check_model_flags
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import (
    add_compile,
    add_model,
    add_sampling,
    load_engine,
    pick_template,
    require_tokenizer,
    sampling_params,
)
from fasteagle.commands.prompts import check_prompts, encode
from fasteagle.commands.report import note, output_file, write, write_json
from fasteagle.config import ModelConfig
from fasteagle.draft.choice import ALL_TOKENS
from fasteagle.draft.vocabulary import FILE, coverage, most_frequent, vocabulary_file
from fasteagle.hub import is_hub_id
from fasteagle.prompt_files import read_prompts, text_file
from fasteagle.source import open_checkpoint

PASSAGE = 4000  # characters of a text that are held out together, to the end of their line
FIFTH = 5


class Tally:
    """How often each token occurred: in four of five texts or outputs, and in every fifth."""

    def __init__(self, vocab_size: int) -> None:
        self.shares = torch.zeros(2, vocab_size, dtype=torch.int64)  # [2, V]
        self.n_units = 0

    @property
    def counts(self) -> torch.Tensor:
        """Occurrences `[V]` in everything."""
        return self.shares.sum(0)

    def add(self, tokens: Sequence[int]) -> None:
        """Count one passage or output; ValueError for a token that the model has not."""
        held_out = int(self.n_units % FIFTH == FIFTH - 1)
        self.n_units += 1
        ids = torch.tensor(tokens, dtype=torch.int64)
        if len(ids) and int(ids.max()) >= self.shares.shape[1]:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}; the model's vocabulary is "
                f"{self.shares.shape[1]}: they do not belong together"
            )
        self.shares[held_out].index_add_(0, ids, torch.ones_like(ids))

    def held_out(self, size: int, always: Sequence[int]) -> float | None:
        """Coverage of the fifths by a vocabulary of the rest; None if there are too few of them."""
        if self.n_units < FIFTH:
            return None
        return coverage(self.shares[1], most_frequent(self.shares[0], size, always))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle draft-vocab`."""
    parser.add_argument(
        "--size", type=positive, required=True, metavar="N", help="how many tokens to keep"
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="texts to count")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts to answer, whose outputs are counted: one a line, or a .jsonl file with "
        '"prompt" or "turns"',
    )
    parser.add_argument(
        "--chat_template",
        default="none",
        metavar="NAME",
        help="write --prompts as chat messages: auto, vicuna, llama-2-chat or a Jinja file; "
        "default: none, plain text",
    )
    parser.add_argument(
        "--batch_size",
        type=positive,
        default=8,
        metavar="N",
        help="most prompts in one target pass (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"file to write (default: {FILE} in the head's folder)"
    )
    add_model(parser)
    parser.set_defaults(draft_vocab=ALL_TOKENS)  # an old file does not stand in a new one's way
    add_sampling(parser)
    add_compile(parser)


def run(args: argparse.Namespace) -> None:
    """Count, print the table and write the file."""
    check_model_flags(args)
    config, out = read_config(args), out_file(args)
    prompts = read_prompts(args.prompts, flag="--prompts") if args.prompts else []
    with output_file(str(out), "--out") as file:
        tally = Tally(config.vocab_size)
        count_texts(args, tally)
        n_passages = tally.n_units
        if prompts:
            count_outputs(args, tally, prompts)
        if not int(tally.counts.sum()):
            raise ValueError("nothing was counted; give --text or --prompts with some text")
        found = f"{n_passages} passages of text, {tally.n_units - n_passages} outputs"
        write(table(tally, args.size, config.eos_ids, found))
        ids = most_frequent(tally.counts, args.size, config.eos_ids)
        held_out = tally.held_out(args.size, config.eos_ids)
        facts = {"held_out_coverage": held_out, "counted_in": found}
        write_json(file, vocabulary_file(ids, tally.counts, **facts))
    note(f"wrote {out}")


def read_config(args: argparse.Namespace) -> ModelConfig:
    """The target's config; ValueError for flags that do not fit it or its head."""
    if not args.text and not args.prompts:
        raise ValueError("there is nothing to count; give --text, --prompts or both")
    path = args.checkpoint_path or demo.BASE
    config = open_checkpoint(path, revision=args.revision).config
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{path} is an EAGLE head; give its model as --checkpoint_path")  # noqa: TRY004
    smallest = max(1, len(set(config.eos_ids)))
    if not smallest <= args.size < config.vocab_size:
        raise ValueError(
            f"--size is {args.size}; give {smallest} to {config.vocab_size - 1}, the model has "
            f"{config.vocab_size} tokens"
        )
    require_tokenizer(str(path), args.revision)
    if args.draft_checkpoint_path is not None:
        head = open_checkpoint(args.draft_checkpoint_path)
        if head.kind != "eagle" or head.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"{args.draft_checkpoint_path} is no EAGLE head for a vocabulary of "
                f"{config.vocab_size}; give the head of this model"
            )
    return config


def out_file(args: argparse.Namespace) -> Path:
    """Where to write; ValueError if that is not known or would replace what is read."""
    head = args.draft_checkpoint_path
    if args.out is None and (head is None or is_hub_id(head)):
        raise ValueError(f"there is no head's folder to put {FILE} in; give --out FILE")
    out = Path(args.out) if args.out is not None else folder_of(head) / FILE
    for name in [*args.text, *([args.prompts] if args.prompts else [])]:
        if Path(name).resolve() == out.resolve():
            raise ValueError(f"--out {out} is a file that is read; give another --out")
    return out


def count_texts(args: argparse.Namespace, tally: Tally) -> None:
    """Count the tokens of --text, passage by passage."""
    tokenizer = find_tokenizer(args.checkpoint_path or demo.BASE, revision=args.revision)
    assert tokenizer is not None, "read_config asks for a tokenizer"
    for name in args.text:
        for passage in passages(name):
            tally.add(tokenizer.encode(passage, bos=False))


def passages(name: str) -> Iterator[str]:
    """A text in pieces of whole lines; ValueError if it is not UTF-8."""
    piece = ""
    with text_file(name, flag="--text") as lines:
        for line in lines:
            piece += line
            if len(piece) >= PASSAGE:
                yield piece
                piece = ""
    if piece:
        yield piece


def count_outputs(args: argparse.Namespace, tally: Tally, prompts: list[str]) -> None:
    """Count what the model answers to every prompt."""
    batch, sampling = min(len(prompts), args.batch_size), sampling_params(args)
    engine, loaded = load_engine(args, batch=batch, compiled=args.compile)
    assert engine.tokenizer is not None, "load_engine asks for a tokenizer"
    template = pick_template(args.chat_template, engine.tokenizer)
    limits: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "stop": args.stop}
    ids = [encode(engine, prompt, template) for prompt in prompts]
    check_prompts(engine, ids, **limits)
    note(loaded)
    if args.compile:
        n_tokens = max(map(len, ids)) + args.max_new_tokens
        warm_up(engine, sampled=not sampling.greedy, n_tokens=n_tokens)
    with tqdm(total=len(ids), unit="prompt", desc="decoding", disable=None) as bar:
        for first in range(0, len(ids), batch):
            for answer in engine.generate(ids[first : first + batch], sampling=sampling, **limits):
                tally.add(answer.tokens)
                bar.update()


def table(tally: Tally, size: int, always: Sequence[int], found: str) -> str:
    """Coverage of a few sizes around the one asked for."""
    counts, n_tokens = tally.counts, tally.shares.shape[1]
    lines = [
        f"counted {int(counts.sum())} tokens, {int((counts > 0).sum())} distinct of {n_tokens}, in "
        f"{found}",
        f"{'size':>8}{'of all':>9}{'coverage':>10}{'held out':>10}",
    ]
    smallest = max(1, len(set(always)))
    sizes = {max(smallest, n) for n in (size // 4, size // 2, size, 2 * size) if n <= n_tokens}
    for n in sorted(sizes):
        share = tally.held_out(n, always)
        held_out = "-" if share is None else f"{share:.2%}"
        kept = coverage(counts, most_frequent(counts, n, always))
        mark = " *" if n == size else ""
        lines.append(f"{n:>8}{n / n_tokens:>9.1%}{kept:>10.2%}{held_out:>10}{mark}")
    return "\n".join(lines) + "\n"
