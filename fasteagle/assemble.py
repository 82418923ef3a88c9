"""How do paths become an engine? Base, head, tree, tokenizer and device put together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle import demo
from fasteagle.checkpoint import load_head, load_target, open_kind
from fasteagle.draft import vocabulary
from fasteagle.draft.base import Drafter
from fasteagle.draft.choice import BY_NAME, FLAGS, check_choice
from fasteagle.draft.kinds import DRAFTERS, Options
from fasteagle.engine import Engine
from fasteagle.hub import locate
from fasteagle.model import Transformer
from fasteagle.quant.kernels import fallbacks
from fasteagle.source import open_checkpoint, packed_matrices
from fasteagle.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from fasteagle.tree import Tree, parse_tree

NO_DRAFT = "none"
ALL_TOKENS = "none"  # in place of a draft vocabulary
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    checkpoint_path: str | Path | None = None,
    draft_checkpoint_path: str | Path | None = None,
    *,
    draft: str | None = None,
    tree: str | None = None,
    draft_vocab: str | None = None,
    lookup: int = 0,
    ngram: int | None = None,
    window: int | None = None,
    guesses: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    compiled: bool = False,
    batch: int = 1,
    max_length: int | None = None,
    revision: str | None = None,
) -> Engine:
    """An engine for a base checkpoint and its EAGLE-1 head: folders, weight files or hub ids.

    No checkpoint_path takes the embedded pair; no draft_checkpoint_path (or "none") is plain
    decoding, except that the embedded base brings its head. tree is what `parse_tree` takes; by
    default the head's own tree.json, else mc_sim_7b_63. draft_vocab is a file of the tokens that
    may be guessed, or "none" for all; by default draft_vocab.json beside the head, else all. draft
    is "none", "lookup" or "lookahead" for a draft without weights, of which lookup, ngram, window
    and guesses are the sizes; a head guesses `lookup` more tokens by prompt lookup. dtype
    by default is bfloat16 where the model is quantized, else the checkpoint's on CUDA and float32
    elsewhere. ValueError or FileNotFoundError, in one line, for what does not fit.
    """
    wish = Wish(draft, draft_checkpoint_path, tree, draft_vocab, lookup, ngram, window, guesses)
    wish = wish.checked(base=checkpoint_path is not None)
    place = pick_device(device)
    checkpoint_path = demo.BASE if checkpoint_path is None else checkpoint_path
    number = pick_dtype(dtype, place, checkpoint_path, revision=revision)
    # Before the weights: a wrong tokenizer file ends here at once.
    tokenizer = find_tokenizer(checkpoint_path, revision=revision)
    target = load_target(checkpoint_path, dtype=number, device=place, revision=revision)
    return Engine(
        target,
        wish.drafter(target),
        tokenizer=tokenizer,
        batch=batch,
        max_length=max_length,
        compiled=compiled,
    )


class Wish(NamedTuple):
    """What a user wants to draft with, in the words of `load`."""

    draft: str | None
    path: str | Path | None
    tree: str | None
    draft_vocab: str | None
    lookup: int
    ngram: int | None
    window: int | None
    guesses: int | None

    def checked(self, *, base: bool) -> Wish:
        """The draft and path that this comes to; ValueError if its parts do not go together.

        base: the target is not the embedded one, which would bring its head.
        """
        draft, path = self.draft, self.path
        if str(path) == NO_DRAFT:
            draft, path = draft or NO_DRAFT, None
        asked = {flag: getattr(self, flag) for flag in FLAGS}
        asked["draft_vocab"] = None if self.draft_vocab == ALL_TOKENS else self.draft_vocab
        check_choice(draft, asked, path=path is not None, base=base)
        if path is None and not base and draft not in BY_NAME:
            path = demo.HEAD
        return self._replace(draft=draft, path=path)

    def drafter(self, target: Transformer) -> Drafter | None:
        """The drafter of a checked wish; None to decode plainly."""
        if self.draft in BY_NAME:
            options = Options(None, None, self.lookup, self.ngram, self.window, self.guesses)
            return DRAFTERS[self.draft].drafter(None, target, options)
        if self.path is None:
            return None
        return load_drafter(
            self.path,
            target,
            tree=self.tree,
            draft_vocab=self.draft_vocab,
            lookup=self.lookup,
            ngram=self.ngram,
        )


def load_drafter(
    path: str | Path,
    target: Transformer,
    *,
    tree: str | None = None,
    draft_vocab: str | None = None,
    lookup: int = 0,
    ngram: int | None = None,
) -> Drafter:
    """The drafter of a head's folder, on `tree` and `draft_vocab` or the head's own."""
    options = Options(
        tree=own_tree(path) if tree is None else parse_tree(tree),
        vocab=pick_vocab(path, draft_vocab, target.config.vocab_size),
        lookup=lookup,
        ngram=ngram,
    )
    kind = DRAFTERS[open_kind(path, "head", revision=None).kind]
    head = load_head(path, target, dtype=target.dtype, device=target.device)
    return kind.drafter(head, target, options)


def own_tree(path: str | Path) -> Tree | None:
    """tree.json beside the head, if there is one."""
    file = folder_of(path) / "tree.json"
    return parse_tree(str(file)) if file.is_file() else None


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
