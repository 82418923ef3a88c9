"""How does a checkpoint become a model, or a fasteagle folder?

`source` is anything that source.py opens; values are read here, one parameter at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fasteagle import __version__
from fasteagle.config import Eagle3Config, HeadConfig, ModelConfig, to_dict
from fasteagle.draft import vocabulary
from fasteagle.draft.eagle import Head
from fasteagle.draft.eagle3 import feature_layers
from fasteagle.draft.kinds import DRAFTERS
from fasteagle.dtypes import dtype_text, pick_dtype, stored_dtype
from fasteagle.families import EMBEDDING
from fasteagle.fill import fill
from fasteagle.footprint import check_room, keeps_dense
from fasteagle.heads import HEADS
from fasteagle.hub import is_hub_id
from fasteagle.model import Transformer
from fasteagle.parameters import Parameter, read_parameters, weight_bytes
from fasteagle.safewrite import Slot, safetensors_file, staged_folder, write_json
from fasteagle.source import FOLDER_VERSION, Checkpoint, Config, Source, open_checkpoint
from fasteagle.weights import read_json

__all__ = ["convert", "load_head", "load_target", "read_head", "read_target", "weight_bytes"]

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
# What a command may insist on.
KINDS = {"target": {"target"}, "head": set(HEADS), "eagle": {"eagle", "eagle3"}}
# Quantized files of what is replaced are no longer this checkpoint's.
QUANTIZED = "model_int*.safetensors"


def read_target(
    source: Source, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[ModelConfig, Iterator[tuple[str, Parameter]]]:
    """A target's config and its parameters by our names; dtype None keeps the config's."""
    checkpoint = open_kind(source, "target", revision=revision)
    config, wanted = _in_dtype(checkpoint, dtype)
    assert isinstance(config, ModelConfig), "a target has a ModelConfig"
    return config, read_parameters(checkpoint, wanted)


def read_head(
    source: Source, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[HeadConfig, Iterator[tuple[str, Parameter]]]:
    """A draft head's config and its parameters by our names; dtype None keeps the config's."""
    checkpoint = open_kind(source, "head", revision=revision)
    config, wanted = _in_dtype(checkpoint, dtype)
    assert not isinstance(config, ModelConfig), "a head has a config of its own"
    return config, read_parameters(checkpoint, wanted)


def _in_dtype(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[Config, torch.dtype]:
    wanted = pick_dtype(checkpoint.config, dtype)
    return replace(checkpoint.config, dtype=dtype_text(wanted)), wanted


def open_kind(source: Source, kind: str | None, *, revision: str | None) -> Checkpoint:
    """An opened checkpoint; ValueError if it is not of the kind that is given, a row of KINDS."""
    checkpoint = open_checkpoint(source, revision=revision)
    if kind is None or checkpoint.kind in KINDS[kind]:
        return checkpoint
    if kind == "target":
        raise ValueError(
            f"{source} is {checkpoint.words}, not a target model; give it where the head is asked "
            "for"
        )
    wanted = "an EAGLE head, which holds fc.weight" if kind == "eagle" else "a draft head"
    raise ValueError(f"{source} is {checkpoint.words}; expected {wanted}")


def load_target(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Transformer:
    """A target model with its weights; dtype None keeps the checkpoint's.

    Quantized matrices become QuantLinear layers in 16 bits, and dense ones in float32. ValueError,
    before anything is read, if the device's free memory cannot hold them.
    """
    checkpoint = open_kind(source, "target", revision=revision)
    config, wanted = _in_dtype(checkpoint, dtype)
    assert isinstance(config, ModelConfig), "a target has a ModelConfig"
    with torch.device("meta"):
        model = Transformer(config)
    place = torch.device(device)
    keep = keeps_dense(checkpoint, place)
    check_room(checkpoint, wanted, place, keep_dense=keep)
    parameters = read_parameters(checkpoint, wanted)
    return fill(model, parameters, dtype=wanted, device=device, keep_dense=keep)


def load_head(
    source: Source,
    target: Transformer,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """A draft head for `target`, in the target's dtype and on its device unless told otherwise.

    It is the `module` of its row of DRAFTERS. A copy of the target's embedding is dropped; one that
    differs is kept.
    """
    checkpoint = open_kind(source, "head", revision=revision)
    config, wanted = _in_dtype(checkpoint, dtype or target.dtype)
    assert not isinstance(config, ModelConfig), "a head has a config of its own"
    check_pair(source, config, target.config)
    with torch.device("meta"):
        head = DRAFTERS[checkpoint.kind].make(config)

    def needed() -> Iterator[tuple[str, Parameter]]:
        for name, value in read_parameters(checkpoint, wanted):
            if (
                name == EMBEDDING
                and isinstance(head, Head)
                and _same(value, target.embed_tokens.table)
            ):
                head.borrow_embedding()
            else:
                yield name, value

    place = device or target.device
    keep = keeps_dense(checkpoint, torch.device(place))
    return fill(head, needed(), dtype=wanted, device=place, keep_dense=keep)


def convert(
    source: Source,
    out: Source | None = None,
    *,
    kind: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a target or a draft head as a fasteagle folder, one parameter in memory at a time.

    kind is `open_kind`'s: what it refuses. out defaults to
    `<folder>-fasteagle`, or `checkpoints/<owner>/<name>` for a hub id. A folder that fasteagle did
    not write is left alone; after a failure `out` is as it was.
    """
    hub = is_hub_id(source)
    checkpoint = open_kind(source, kind, revision=revision)
    if checkpoint.packed is not None:
        raise ValueError(
            f"{source} is quantized already ({checkpoint.packed.name}); load it as it is, or "
            "convert the checkpoint that it was made from"
        )
    beside = f"{checkpoint.folder.resolve()}-fasteagle"
    folder = Path(out or (Path("checkpoints", source) if hub else beside))
    _refuse_foreign(folder, checkpoint)
    wanted = pick_dtype(checkpoint.config, dtype)
    config = replace(checkpoint.config, dtype=dtype_text(wanted))
    with staged_folder(folder, last="config.json", owned=(*COMPANIONS, QUANTIZED)) as stage:
        slots = [Slot(w.name, w.shape, stored_dtype(w, wanted)) for w in checkpoint.plan]
        metadata = {"fasteagle": __version__}
        with safetensors_file(stage / "model.safetensors", slots, metadata=metadata) as put:
            for name, tensor in _progress(read_parameters(checkpoint, wanted), slots):
                assert isinstance(tensor, Tensor), f"{name} is quantized"
                put(name, tensor)
        for file in _matches(checkpoint.folder, COMPANIONS):
            copy = stage / file.relative_to(checkpoint.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        header = {"format": "fasteagle", "version": FOLDER_VERSION, "kind": checkpoint.kind}
        write_json(stage / "config.json", {**header, "config": to_dict(config)})
    return folder


def _progress(
    parameters: Iterator[tuple[str, Parameter]], slots: list[Slot]
) -> Iterator[tuple[str, Parameter]]:
    total = sum(slot.n_bytes for slot in slots)
    sizes = {slot.name: slot.n_bytes for slot in slots}
    # disable=None: only on a terminal. tqdm writes to stderr.
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for name, value in parameters:
            yield name, value
            bar.update(sizes[name])


def check_pair(source: Source, head: HeadConfig, target: ModelConfig) -> None:
    """ValueError if a head is not one for a target's shape."""
    width = head.target_dim if isinstance(head, Eagle3Config) else head.dim
    wants, has = (width, head.vocab_size), (target.dim, target.vocab_size)
    if wants != has:
        raise ValueError(
            f"{source} is a head for a model of dim {wants[0]} and vocabulary {wants[1]}, but the "
            f"target has dim {has[0]} and vocabulary {has[1]}; give the head of this target"
        )
    if isinstance(head, Eagle3Config):
        feature_layers(head, target.n_layers)
        whole = head.own_embedding and (head.own_lm_head or head.tie_embeddings)
        if head.dim != target.dim and not whole:
            raise ValueError(
                f"{source} has dim {head.dim} and its target {target.dim}, so it needs an "
                "embedding and an lm_head of its own; export them with the head"
            )


def _same(embedding: Parameter, target: Tensor) -> bool:
    assert isinstance(embedding, Tensor), "embeddings are never quantized"
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
