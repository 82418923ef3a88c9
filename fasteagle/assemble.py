"""How do paths become an engine? Base, head, tree, tokenizer and device put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from fasteagle import demo
from fasteagle.checkpoint import load_head, load_target
from fasteagle.draft import vocabulary
from fasteagle.draft.base import Drafter
from fasteagle.draft.choice import (
    ALL_TOKENS,
    ANY_WEIGHTS,
    BY_NAME,
    Asked,
    check_choice,
    check_names,
)
from fasteagle.draft.kinds import DRAFTERS, Options
from fasteagle.draft.standalone import check_tokenizers, check_vocabulary
from fasteagle.engine import Engine
from fasteagle.hub import locate
from fasteagle.model import Transformer
from fasteagle.quant.kernels import fallbacks
from fasteagle.source import Checkpoint, open_checkpoint, packed_matrices
from fasteagle.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from fasteagle.tree import Tree, parse_tree
from fasteagle.tree_file import FILE as TREE_FILE
from fasteagle.tree_file import Tuned, prefers_plain, read_tuned, tell_elsewhere

NO_DRAFT = "none"
SHAPED = ("tree", "speculate_k", "lookup")  # who asks for one of these wants that draft
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    checkpoint_path: str | Path | None = None,
    draft_checkpoint_path: str | Path | None = None,
    *,
    draft: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    compiled: bool = False,
    batch: int = 1,
    max_length: int | None = None,
    revision: str | None = None,
    **asked: Unpack[Asked],
) -> Engine:
    """An engine for a base checkpoint and its draft, a head or a smaller model: folders, weight
    files or hub ids.

    No checkpoint_path takes the embedded pair; no draft_checkpoint_path (or "none") is plain
    decoding, except that the embedded base brings its head. tree is what `parse_tree` takes; by
    default the draft's own tree.json, else that of its kind: mc_sim_7b_63 for EAGLE heads, Medusa's
    own, a chain of 5 for a draft model, or of speculate_k. Where that tree.json says that plain
    decoding is faster on this device, in this precision and so compiled, plain decoding it is, with
    a warning, unless tree, speculate_k, lookup or draft="eagle" ask for the draft. draft_vocab is a
    file of the tokens that may be guessed, or "none" for all; by default draft_vocab.json beside
    the head, else all. draft is "none", "lookup" or "lookahead" for a draft without weights, of
    which lookup, ngram, window and guesses are the sizes; a head or model guesses `lookup` more
    tokens by prompt lookup. dtype by default is bfloat16 where the model is quantized, else the
    checkpoint's on CUDA and float32 elsewhere. ValueError or FileNotFoundError, in one line, for
    what does not fit.
    """
    check_names(asked)
    if str(draft_checkpoint_path) == NO_DRAFT:
        draft, draft_checkpoint_path = draft or NO_DRAFT, None
    paths = {"path": draft_checkpoint_path is not None, "base": checkpoint_path is not None}
    check_choice(draft, asked, **paths)
    place = pick_device(device)
    if checkpoint_path is None:
        checkpoint_path = demo.BASE
        if draft_checkpoint_path is None and draft not in BY_NAME:
            draft_checkpoint_path = demo.HEAD
    number = pick_dtype(dtype, place, checkpoint_path, revision=revision)
    # Before the weights: a wrong tokenizer file ends here at once.
    tokenizer = find_tokenizer(checkpoint_path, revision=revision)
    target = load_target(checkpoint_path, dtype=number, device=place, revision=revision)
    drafter: Drafter | None = None
    if draft in BY_NAME:
        drafter = DRAFTERS[draft].drafter(None, target, sizes_of(asked))
    elif draft_checkpoint_path is not None:
        path = draft_checkpoint_path
        insists = draft == ANY_WEIGHTS or any(asked.get(name) for name in SHAPED)
        if insists or not prefers_plain(own_tree(path), target, compiled=compiled):
            drafter = load_drafter(
                path, target, dtype=dtype, tokenizer=tokenizer, compiled=compiled, **asked
            )
    return Engine(
        target, drafter, tokenizer=tokenizer, batch=batch, max_length=max_length, compiled=compiled
    )


def load_drafter(
    path: str | Path,
    target: Transformer,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    compiled: bool | None = None,
    **asked: Unpack[Asked],
) -> Drafter:
    """The drafter of a head's or a smaller model's folder, on the tree that is asked of it or its
    own.

    A head is in the target's dtype. A model has one of its own, which `load`'s dtype and defaults
    choose, and reads with the tokenizer of the target, which its own must agree with. A
    tree.json that was measured on another device, in another precision or, where `compiled` tells
    what is wanted here, with other steps is used, with a warning.
    """
    make = draft_maker(path, target, dtype=dtype, tokenizer=tokenizer, **asked)
    if asked.get("tree") is None and asked.get("speculate_k") is None:
        tell_elsewhere(own_tree(path), target, compiled=compiled)
    return make(None)


def draft_maker(
    path: str | Path,
    target: Transformer,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    **asked: Unpack[Asked],
) -> Callable[[Tree | None], Drafter]:
    """What gives trees to the draft of a folder, whose weights are read once; None is the tree that
    `load_drafter` takes.
    """
    check_names(asked)
    opened = open_checkpoint(path)
    options = draft_options(path, opened, target, asked)
    weights: nn.Module
    if opened.kind == "target":
        check_tokenizers(path, find_tokenizer(path) if tokenizer else None, tokenizer)
        own = draft_dtype(path, opened, dtype, target.dtype, target.device)
        weights = load_target(path, dtype=own, device=target.device)
    else:
        weights = load_head(path, target, dtype=target.dtype, device=target.device)

    def make(tree: Tree | None) -> Drafter:
        shaped = options if tree is None else replace(options, tree=tree)
        try:
            return DRAFTERS[draft_kind(opened)].drafter(weights, target, shaped)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    return make


def draft_kind(checkpoint: Checkpoint) -> str:
    """Which row of DRAFTERS a checkpoint is when it drafts."""
    return "standalone" if checkpoint.kind == "target" else checkpoint.kind


def draft_dtype(
    path: str | Path,
    checkpoint: Checkpoint,
    name: str | None,
    target: torch.dtype | None,
    device: torch.device,
) -> torch.dtype | None:
    """A draft's dtype when `name` is asked for: the target's for a head, a model has its own."""
    return pick_dtype(name, device, path) if checkpoint.kind == "target" else target


def sizes_of(asked: Asked) -> Options:
    """What is asked of a draft without weights."""
    return Options(
        lookup=asked.get("lookup") or 0,
        ngram=asked.get("ngram"),
        window=asked.get("window"),
        guesses=asked.get("guesses"),
    )


def draft_options(
    path: str | Path, checkpoint: Checkpoint, target: Transformer, asked: Asked
) -> Options:
    """What a user asks of the draft that a checkpoint holds; ValueError for what it cannot do."""
    tree, speculate_k = asked.get("tree"), asked.get("speculate_k")
    if checkpoint.kind == "target":
        try:
            check_vocabulary(checkpoint.config.vocab_size, target.config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif speculate_k is not None:
        raise ValueError(
            f"--speculate_k is how far a draft model guesses, but {path} is {checkpoint.words}; "
            f"give --tree chain-{speculate_k}"
        )
    if speculate_k is not None:
        shape: Tree | None = parse_tree(f"chain-{speculate_k}")
    elif tree is not None:
        shape = parse_tree(tree)
    else:
        own = own_tree(path)
        shape = own.tree if own else None
    vocab = pick_vocab(path, asked.get("draft_vocab"), target.config.vocab_size)
    return replace(sizes_of(asked), tree=shape, vocab=vocab)


def own_tree(path: str | Path) -> Tuned | None:
    """What tree.json beside the head says, if there is one."""
    return read_tuned(folder_of(path) / TREE_FILE)


def pick_vocab(path: str | Path, draft_vocab: str | None, vocab_size: int) -> Tensor | None:
    """The ids `[K]` that a head may guess: those of a file, or draft_vocab.json beside the head.

    None if all may be: for "none", or where there is no file.
    """
    if draft_vocab is not None:
        return (
            None
            if draft_vocab == ALL_TOKENS
            else vocabulary.read_vocabulary(draft_vocab, vocab_size)
        )
    file = folder_of(path) / vocabulary.FILE
    return vocabulary.read_vocabulary(file, vocab_size) if file.is_file() else None


def find_tokenizer(path: str | Path, *, revision: str | None = None) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, or None if the folder has no tokenizer file."""
    folder = folder_of(path, revision=revision)
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def folder_of(path: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint that is given as a folder, a weight file or a hub id."""
    place = locate(path, revision=revision)
    return place if place.is_dir() else place.parent


def pick_device(name: str | None) -> torch.device:
    """The device named, or CUDA where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} asked for, but this torch sees no CUDA; give --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} asked for, but there are {torch.cuda.device_count()}, from cuda:0"
        )
    if device.type not in {"cpu", "cuda"}:
        raise ValueError(f"device {name!r} is not supported; give cpu or cuda")
    return device


def pick_dtype(
    name: str | None,
    device: torch.device,
    path: str | Path | None = None,
    *,
    revision: str | None = None,
) -> torch.dtype | None:
    """The dtype named; else bfloat16 for a quantized model, whose kernels are fastest in it, None
    (the checkpoint's own) for another on CUDA and float32 on the CPU.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; give one of {', '.join(DTYPES)}")
    if name is not None:
        return DTYPES[name]
    if path is not None and open_checkpoint(path, revision=revision).packed is not None:
        return torch.bfloat16
    return None if device.type == "cuda" else torch.float32


def notices(
    path: str | Path | None,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    revision: str | None = None,
) -> list[str]:
    """What a user should know of a quantized checkpoint before it runs: a slow path, a fallback."""
    if path is None:
        return []
    checkpoint = open_checkpoint(path, revision=revision)
    bits = sorted(set(packed_matrices(checkpoint).values()))
    dtype = dtype or DTYPES[checkpoint.config.dtype]
    if dtype == torch.float32 and bits:
        kinds = " and ".join(f"int{number}" for number in bits)
        return [
            f"{path}: its {kinds} weights are dequantized to float32, the exact and slow "
            "reference; --dtype bfloat16 uses int kernels"
        ]
    return [f"{path}: {text}" for n in bits for text in fallbacks(n, device=device, dtype=dtype)]
