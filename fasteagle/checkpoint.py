"""How does a checkpoint become a model, or a fasteagle folder?

`source` is anything that source.py opens; values are read here, one parameter at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fasteagle import __version__
from fasteagle.config import DraftConfig, ModelConfig, to_dict
from fasteagle.draft import vocabulary
from fasteagle.draft.eagle import EagleHead
from fasteagle.hub import is_hub_id
from fasteagle.model import Transformer
from fasteagle.safewrite import Slot, staged_folder, write_json, write_safetensors
from fasteagle.source import (
    FOLDER_VERSION,
    Checkpoint,
    Source,
    dtype_text,
    open_checkpoint,
    pick_dtype,
    read_tensors,
    weight_bytes,
)
from fasteagle.weights import read_json

__all__ = ["convert", "load_head", "load_target", "read_head", "read_target", "weight_bytes"]

Model = TypeVar("Model", Transformer, EagleHead)
EMBEDDING = "embed_tokens.weight"
# Patterns of what is copied as it is; tree.json and draft_vocab.json are the draft tree
# that a head asks for and the tokens that it may guess.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "tree.json",
    vocabulary.FILE,
)


def read_target(
    source: Source, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """A target's config and its parameters by our names; dtype None keeps the config's."""
    checkpoint = _open(source, "target", revision=revision)
    config = checkpoint.config
    assert isinstance(config, ModelConfig), "a target has a ModelConfig"
    wanted = pick_dtype(config, dtype)
    return replace(config, dtype=dtype_text(wanted)), read_tensors(checkpoint, wanted)


def read_head(
    source: Source, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[DraftConfig, Iterator[tuple[str, Tensor]]]:
    """An EAGLE head's config and its parameters by our names; dtype None keeps the config's."""
    checkpoint = _open(source, "eagle", revision=revision)
    config = checkpoint.config
    assert isinstance(config, DraftConfig), "a head has a DraftConfig"
    wanted = pick_dtype(config, dtype)
    return replace(config, dtype=dtype_text(wanted)), read_tensors(checkpoint, wanted)


def _open(source: Source, kind: str | None, *, revision: str | None) -> Checkpoint:
    """An opened checkpoint; ValueError if `kind` ("target" or "eagle") is given and is not its."""
    checkpoint = open_checkpoint(source, revision=revision)
    if kind in (None, checkpoint.kind):
        return checkpoint
    if checkpoint.kind == "eagle":
        raise ValueError(
            f"{source} is an EAGLE head, not a target model; give it where the head is asked for"
        )
    raise ValueError(f"{source} is a target model; expected an EAGLE head, which holds fc.weight")


def load_target(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Transformer:
    """A target model with its weights; dtype None keeps the checkpoint's."""
    config, tensors = read_target(source, dtype=dtype, revision=revision)
    state = {name: tensor.to(device) for name, tensor in tensors}
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True, strict=True)
    return _placed(model, device)


def load_head(
    source: Source,
    target: Transformer,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> EagleHead:
    """An EAGLE head for `target`, in the target's dtype and on its device unless told otherwise.

    A copy of the target's embedding is dropped; one that differs is kept.
    """
    config, tensors = read_head(source, dtype=dtype or target.dtype, revision=revision)
    _check_pair(source, config, target.config)
    device = device or target.device
    state = {}
    for name, tensor in tensors:
        if name == EMBEDDING and _same(tensor, target.embed_tokens.table):
            config = replace(config, own_embedding=False)
        else:
            state[name] = tensor.to(device)
    with torch.device("meta"):
        head = EagleHead(config)
    head.load_state_dict(state, assign=True, strict=True)
    return _placed(head, device)


def _placed(module: Model, device: torch.device | str) -> Model:
    """The module ready to decode on its device."""
    return module.to(device).eval().requires_grad_(False)


def convert(
    source: Source,
    out: Source | None = None,
    *,
    kind: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a target or an EAGLE head as a fasteagle folder, one parameter in memory at a time.

    kind "target" or "eagle" refuses a source of the other kind. out defaults to
    `<folder>-fasteagle`, or `checkpoints/<owner>/<name>` for a hub id. A folder that fasteagle did
    not write is left alone; after a failure `out` is as it was.
    """
    hub = is_hub_id(source)
    checkpoint = _open(source, kind, revision=revision)
    beside = f"{checkpoint.folder.resolve()}-fasteagle"
    folder = Path(out or (Path("checkpoints", source) if hub else beside))
    _refuse_foreign(folder, checkpoint)
    wanted = pick_dtype(checkpoint.config, dtype)
    config = replace(checkpoint.config, dtype=dtype_text(wanted))
    with staged_folder(folder, last="config.json", owned=COMPANIONS) as stage:
        slots = [Slot(weight.name, weight.shape, wanted) for weight in checkpoint.plan]
        tensors = _progress(read_tensors(checkpoint, wanted), slots)
        metadata = {"fasteagle": __version__}
        write_safetensors(stage / "model.safetensors", slots, tensors, metadata=metadata)
        for file in _matches(checkpoint.folder, COMPANIONS):
            copy = stage / file.relative_to(checkpoint.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        header = {"format": "fasteagle", "version": FOLDER_VERSION, "kind": checkpoint.kind}
        write_json(stage / "config.json", {**header, "config": to_dict(config)})
    return folder


def _progress(tensors: Iterator[tuple[str, Tensor]], slots: list[Slot]) -> Iterator[Tensor]:
    total = sum(slot.n_bytes for slot in slots)
    # disable=None: only on a terminal. tqdm writes to stderr.
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for _, tensor in tensors:
            yield tensor
            bar.update(tensor.nbytes)


def _check_pair(source: Source, head: DraftConfig, target: ModelConfig) -> None:
    wants, has = (head.dim, head.vocab_size), (target.dim, target.vocab_size)
    if wants != has:
        raise ValueError(
            f"{source} is a head for a model of dim {wants[0]} and vocabulary {wants[1]}, but the "
            f"target has dim {has[0]} and vocabulary {has[1]}; give the head of this target"
        )


def _same(embedding: Tensor, target: Tensor) -> bool:
    return torch.equal(embedding.to(device=target.device, dtype=target.dtype), target)


def _matches(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _refuse_foreign(out: Path, checkpoint: Checkpoint) -> None:
    """Stop if `out` holds files of our names that no earlier conversion of this kind wrote."""
    config = out / "config.json"
    if config.is_file():
        held = read_json(config)
        if held.get("format") == "fasteagle" and held.get("kind") == checkpoint.kind:
            return
    names = ("config.json", "model.safetensors", *COMPANIONS)
    taken = [str(path.relative_to(out)) for path in _matches(out, names)]
    if taken:
        raise ValueError(
            f"{out} already holds {', '.join(taken)}, not an earlier conversion of this kind "
            f"({checkpoint.kind}); give another --out"
        )
