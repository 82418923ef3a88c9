"""Measure a model: its perplexity on a text, or how closely it agrees with a reference.

fasteagle evaluate perplexity --text held_out.txt
fasteagle evaluate perplexity --checkpoint_path vicuna-7b --text held_out.txt --window 2048 \\
    --stride 1024 --dtype bfloat16 --json perplexity.json
fasteagle evaluate agreement --checkpoint_path vicuna-7b/model_int8.safetensors \\
    --reference_path vicuna-7b --text held_out.txt
fasteagle evaluate agreement --checkpoint_path vicuna-7b/model_int8.safetensors \\
    --reference_path vicuna-7b --prompts question.jsonl --chat_template vicuna
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fasteagle import demo
from fasteagle.assemble import DTYPES, find_tokenizer, notices, pick_device, pick_dtype
from fasteagle.checkpoint import load_target, read_target
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import pick_template, require_tokenizer
from fasteagle.commands.report import note, output_file, write_json
from fasteagle.config import ModelConfig
from fasteagle.evaluate.agreement import (
    Agreement,
    check_lengths,
    check_pair,
    prompt_agreement,
    text_agreement,
)
from fasteagle.evaluate.passes import check_tokens, encode_text, window_sizes
from fasteagle.evaluate.perplexity import perplexity, token_losses
from fasteagle.model import Transformer
from fasteagle.prompt_files import read_prompts, text_file
from fasteagle.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 64
NO_TEMPLATE = "none"
PERPLEXITY = """Perplexity of a text in windows that slide over it. Every token is scored once,
after at least window - stride tokens of context where there are that many."""
AGREEMENT = """How often a model and its reference find the same next token likeliest, and the mean
KL(reference || model): along a text, or along what the reference writes after prompts."""

Compare = Callable[[Transformer, Transformer], Agreement]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The measures of `fasteagle evaluate` and their flags."""
    measures = parser.add_subparsers(
        dest="measure",
        required=True,
        metavar="MEASURE",
        help="perplexity or agreement; each has a --help",
    )
    add_perplexity(measures.add_parser("perplexity", description=PERPLEXITY, allow_abbrev=False))
    add_agreement(measures.add_parser("agreement", description=AGREEMENT, allow_abbrev=False))


def add_perplexity(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle evaluate perplexity`."""
    add_checkpoint(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score")
    add_windows(parser)


def add_agreement(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle evaluate agreement`."""
    add_checkpoint(parser)
    parser.add_argument(
        "--reference_path",
        metavar="PATH",
        help="folder, weight file or hub id of the model to agree with; default: the embedded base",
    )
    parser.add_argument(
        "--reference_dtype",
        choices=list(DTYPES),
        help="default: float32 on the CPU, the reference's own on CUDA",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="compare along this UTF-8 text")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="compare along the reference's greedy text after these prompts: one a line, or in a "
        '.jsonl file one {"prompt": ...} or {"turns": [...]} a line',
    )
    add_windows(parser)
    parser.add_argument(
        "--max_new_tokens",
        type=positive,
        metavar="N",
        help=f"with --prompts: most tokens the reference writes (default: {DEFAULT_NEW_TOKENS})",
    )
    parser.add_argument(
        "--chat_template",
        metavar="NAME",
        help="with --prompts: as in `fasteagle generate` (default: none, plain text)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flags that name the model that is measured, and the one for its figures."""
    parser.add_argument(
        "--checkpoint_path",
        metavar="PATH",
        help="folder, weight file or hub id (owner/name) of the model; default: the embedded base",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model's hub id")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of the model's weights; default: float32 on the CPU, the checkpoint's own on CUDA. "
        "Softmax and sums are float32 or better",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too, unrounded")


def add_windows(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a text is cut."""
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help="tokens of one pass (default: the model's context, at most 2048)",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens from one window to the next (default: half the window)",
    )
    parser.add_argument(
        "--max_tokens", type=positive, metavar="N", help="use the first N tokens of the text only"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print the figures, write them as JSON where asked to."""
    {"perplexity": run_perplexity, "agreement": run_agreement}[args.measure](args)


def run_perplexity(args: argparse.Namespace) -> None:
    """Score a text; wrong calls end before weights are read."""
    content = read_text(args.text)
    config, tokenizer = look_at(args.checkpoint_path, args.revision)
    text = encode_text(tokenizer, content, max_tokens=args.max_tokens)
    check_tokens(text.tokens, config)
    window, stride = window_sizes(config.attention_span, args.window, args.stride)
    with figures(args) as values:
        target = load(args)
        note(f"windows of {window} tokens, stride {stride}, {dtype_name(target)}")
        found = perplexity(
            token_losses(target, text.tokens, window=window, stride=stride), text.n_bytes
        )
        values["figures"] = {
            "nats_per_token": found.nats_per_token,
            "perplexity": found.perplexity,
            "bits_per_token": found.bits_per_token,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.n_tokens,
            "bytes": found.n_bytes,
        }
        values |= {"window": window, "stride": stride, "dtype": dtype_name(target)}


def run_agreement(args: argparse.Namespace) -> None:
    """Compare two models; wrong calls end before weights are read."""
    check_flags(args)
    texts = [read_text(args.text)] if args.text else read_prompts(args.prompts, flag="--prompts")
    config, tokenizer = look_at(args.checkpoint_path, args.revision)
    reference_path = args.reference_path if args.reference_path is not None else demo.BASE
    context = check_pair(config, read_target(reference_path)[0])
    check_tokenizers(tokenizer, find_tokenizer(reference_path), texts)
    compare, settings = plan(args, tokenizer, texts, context)
    with figures(args) as values:
        target = load(args)
        number = pick_dtype(args.reference_dtype, target.device)
        reference = load_target(reference_path, dtype=number, device=target.device)
        note(f"{dtype_name(target)} beside a reference in {dtype_name(reference)}")
        found = compare(target, reference)
        values["figures"] = {
            "agreement": found.share,
            "kl_nats": found.kl,
            "equal": found.n_equal,
            "tokens": found.n_tokens,
        }
        values |= settings
        values |= {"dtype": dtype_name(target), "reference_dtype": dtype_name(reference)}


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for a flag of --text beside --prompts, or the other way round."""
    others = {
        "--text": ("max_new_tokens", "chat_template"),
        "--prompts": ("window", "stride", "max_tokens"),
    }
    source = "--text" if args.text else "--prompts"
    for name in others[source]:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} has no meaning with {source}; drop it")


def plan(
    args: argparse.Namespace, tokenizer: Tokenizer, texts: list[str], context: int
) -> tuple[Compare, dict[str, Any]]:
    """What compares two models on these texts, and its settings for the JSON."""
    if args.text:
        text = encode_text(tokenizer, texts[0], max_tokens=args.max_tokens)
        window, stride = window_sizes(context, args.window, args.stride)
        compare = partial(text_agreement, tokens=text.tokens, window=window, stride=stride)
        return compare, {"window": window, "stride": stride}
    template = pick_template(args.chat_template or NO_TEMPLATE, tokenizer)
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": text}], template)
        if template
        else tokenizer.encode(text)
        for text in texts
    ]
    limit = args.max_new_tokens or DEFAULT_NEW_TOKENS
    check_lengths(prompts, limit, context)
    compare = partial(prompt_agreement, prompts=prompts, max_new_tokens=limit)
    return compare, {"n_prompts": len(prompts), "max_new_tokens": limit}


def read_text(name: str) -> str:
    """A file's text, its line ends as they are; an error names the flag."""
    with text_file(name, flag="--text", newline="") as file:
        text = file.read()
    if not text:
        raise ValueError(f"--text {name} is empty; give some text")
    return text


def look_at(path: str | None, revision: str | None) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of the model that is measured, without its weights."""
    source = str(demo.BASE) if path is None else path
    config, _ = read_target(source, revision=revision)
    require_tokenizer(source, revision)
    tokenizer = find_tokenizer(source, revision=revision)
    assert tokenizer is not None, "require_tokenizer asks for one"
    return config, tokenizer


def load(args: argparse.Namespace) -> Transformer:
    """The model that is measured, with its weights."""
    source = demo.BASE if args.checkpoint_path is None else args.checkpoint_path
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    for notice in notices(source, dtype, device, revision=args.revision):
        note(notice)
    return load_target(source, dtype=dtype, device=device, revision=args.revision)


def check_tokenizers(tokenizer: Tokenizer, other: Tokenizer | None, texts: list[str]) -> None:
    """ValueError if the reference has a tokenizer that reads one of the texts otherwise."""
    if other and any(tokenizer.encode(text) != other.encode(text) for text in texts):
        raise ValueError(
            "the reference's tokenizer reads the text otherwise; give the model's original as "
            "--reference_path"
        )


def dtype_name(model: Transformer) -> str:
    """float32, bfloat16 or float16."""
    return str(model.dtype).removeprefix("torch.")


@contextmanager
def figures(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A place for settings and `figures`, which are printed, and all written to --json."""
    named = {name: getattr(args, name, None) for name in ("reference_path", "text", "prompts")}
    values: dict[str, Any] = {"measure": args.measure, "checkpoint": args.checkpoint_path}
    values |= {name.removesuffix("_path"): value for name, value in named.items()}
    if args.json is None:
        yield values
    else:
        if Path(args.json).resolve() == Path(args.text or args.prompts).resolve():
            raise ValueError(f"--json and the text both name {args.json}; give another --json")
        with output_file(args.json, "--json") as file:
            yield values
            settings = {name: value for name, value in values.items() if name != "figures"}
            write_json(file, settings | values["figures"])
    for name, value in values["figures"].items():
        text = str(value) if isinstance(value, int) else format(value, ".6g")
        print(f"{name.replace('_', ' '):18}{text}")
