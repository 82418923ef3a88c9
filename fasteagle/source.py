"""What is in a checkpoint? Config and headers, checked strictly before any value is read.

A source is a Hugging Face folder, a fasteagle folder (what `checkpoint.convert` writes), a weight
file inside one (its config.json lies beside it), or a hub id. Every tensor in it must be used and
every one that the config asks for must be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasteagle.config import DraftConfig, ModelConfig, from_dict
from fasteagle.families import (
    Weight,
    draft_weights,
    read_config,
    read_draft_config,
    target_weights,
)
from fasteagle.hf_config import DTYPES, dtype_name, token_ids
from fasteagle.hub import locate
from fasteagle.weights import Weights, read_json

Config = ModelConfig | DraftConfig
Source = str | Path
FOLDER_VERSION = 1  # of the fasteagle folder
TIED_COPY = "lm_head.weight"
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Checkpoint(NamedTuple):
    """An opened source: headers read and checked, values not yet."""

    folder: Path
    config: Config
    weights: Weights
    plan: list[Weight]  # in the order of the files, so that each is opened once

    @property
    def kind(self) -> str:
        """ "target" or "eagle"."""
        return "target" if isinstance(self.config, ModelConfig) else "eagle"


def open_checkpoint(source: Source, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, read its config and headers, and check names, shapes and types."""
    path = locate(source, revision=revision)
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a Hugging Face or a fasteagle folder"
        )
    stated = read_json(folder / "config.json")
    weights = Weights(path)
    try:
        native = stated.get("format") == "fasteagle"
        config, plan = _read_native(stated) if native else _read_hf(stated, weights)
        _check(config, plan, weights)
        if not native:
            config = _complete(config, stated, folder, weights.entries[plan[0].sources[0]].dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    order = {file: index for index, file in enumerate(weights.files)}
    plan.sort(key=lambda weight: order[weights.entries[weight.sources[0]].file])
    return Checkpoint(folder, config, weights, plan)


def read_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by our name, in `dtype` on the CPU, one at a time; NaN or inf is an error."""
    _check_tied_copy(checkpoint)
    for weight in checkpoint.plan:
        yield weight.name, read_parameter(checkpoint, weight, dtype)


def read_parameter(checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype) -> Tensor:
    """One parameter of the plan in `dtype` on the CPU; NaN or inf is a ValueError."""
    weights = checkpoint.weights
    tensor = torch.empty(weight.shape, dtype=dtype)
    parts = torch.split(tensor, [shape[0] for shape in weight.shapes])
    for name, part in zip(weight.sources, parts, strict=True):
        part.copy_(weights.read(name))
        # One pass without a temporary, ten times faster than isfinite; NaN comes through.
        if not torch.stack(torch.aminmax(part)).isfinite().all():
            raise ValueError(_not_finite(weights, name, dtype))
    return tensor


def weight_bytes(
    source: Source, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> dict[str, int]:
    """Bytes of the loaded weights by part (embed_tokens, layers, ...) and "total", from headers."""
    checkpoint = open_checkpoint(source, revision=revision)
    item = pick_dtype(checkpoint.config, dtype).itemsize
    sizes: dict[str, int] = {}
    for weight in checkpoint.plan:
        part = weight.name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + torch.Size(weight.shape).numel() * item
    return {**sizes, "total": sum(sizes.values())}


def _read_native(stated: dict[str, Any]) -> tuple[Config, list[Weight]]:
    if stated.get("version") != FOLDER_VERSION:
        raise ValueError(
            f"the folder has version {stated.get('version')}; this fasteagle reads version "
            f"{FOLDER_VERSION}: convert the checkpoint again"
        )
    kind, values = stated.get("kind"), stated.get("config")
    if kind not in ("target", "eagle") or not isinstance(values, dict):
        raise ValueError(f"kind is {kind!r}; expected target or eagle, with its config")
    config: Config = (
        from_dict(ModelConfig, values) if kind == "target" else from_dict(DraftConfig, values)
    )
    return config, [Weight(w.name, (w.name,), (w.shape,)) for w in _plan(config)]


def _read_hf(stated: dict[str, Any], weights: Weights) -> tuple[Config, list[Weight]]:
    given = {name.removeprefix("model."): name for name in weights.entries}
    if "fc.weight" not in given:
        target = read_config(stated)
        return target, _plan(target)
    if len(given) < len(weights.entries):
        raise ValueError("the head holds a tensor both with and without the prefix model.")
    head = read_draft_config(stated, {name: e.shape for name, e in weights.entries.items()})
    plan = [w._replace(sources=tuple(given.get(s, s) for s in w.sources)) for w in _plan(head)]
    return head, plan


def _plan(config: Config) -> list[Weight]:
    return target_weights(config) if isinstance(config, ModelConfig) else draft_weights(config)


def _check(config: Config, plan: list[Weight], weights: Weights) -> None:
    """Every wanted tensor is there, in its shape and a floating type, and no other is."""
    wanted = {n: shape for w in plan for n, shape in zip(w.sources, w.shapes, strict=True)}
    missing = [name for name in wanted if name not in weights.entries]
    unknown = [n for n in weights.entries if n not in wanted and not _may_ignore(n, config)]
    if missing or unknown:
        lists = {"missing": missing, "unknown": unknown}
        text = "; ".join(f"{kind} {', '.join(names)}" for kind, names in lists.items() if names)
        raise ValueError(f"the weights do not fit config.json: {text}")
    for name, shape in wanted.items():
        entry = weights.entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"{name} has shape {list(entry.shape)}; config.json asks for {list(shape)}"
            )
        if entry.dtype not in STORED:
            names = ", ".join(dtype_text(dtype) for dtype in STORED)
            raise ValueError(f"{name} is {dtype_text(entry.dtype)}; expected {names}")


def _may_ignore(name: str, config: Config) -> bool:
    tied = isinstance(config, ModelConfig) and config.tie_embeddings
    return name.endswith("rotary_emb.inv_freq") or (tied and name == TIED_COPY)


def _complete(config: Config, stated: dict[str, Any], folder: Path, stored: torch.dtype) -> Config:
    """Add what config.json may leave to others: the weights' dtype, generation_config's end ids."""
    if dtype_name(stated) is None:
        if dtype_text(stored) not in DTYPES:
            raise ValueError(
                f"the weights are {dtype_text(stored)}; expected {', '.join(DTYPES)}, "
                "or a dtype in config.json to convert to"
            )
        config = replace(config, dtype=dtype_text(stored))
    generation = folder / "generation_config.json"
    if isinstance(config, ModelConfig) and generation.is_file():
        ids = (*token_ids(read_json(generation), "eos_token_id"), *config.eos_ids)
        config = replace(config, eos_ids=tuple(dict.fromkeys(ids)))
    return config


def _check_tied_copy(checkpoint: Checkpoint) -> None:
    weights, used = checkpoint.weights, {n for w in checkpoint.plan for n in w.sources}
    if TIED_COPY not in weights.entries or TIED_COPY in used:
        return
    embedding = next(w.sources[0] for w in checkpoint.plan if w.name == "embed_tokens.weight")
    if not torch.equal(weights.read(embedding), weights.read(TIED_COPY)):
        raise ValueError(
            f"{weights.path}: config.json ties lm_head to the embedding, but {TIED_COPY} differs; "
            "set tie_word_embeddings to false"
        )


def _not_finite(weights: Weights, name: str, dtype: torch.dtype) -> str:
    entry, value = weights.entries[name], weights.read(name)
    if not value.isfinite().all():
        return f"{entry.file}: {name} holds NaN or infinity; download it again"
    return f"{entry.file}: {name} overflows {dtype_text(dtype)}; use bfloat16 or float32"


def pick_dtype(config: Config, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or the config's; one of float16, bfloat16 and float32."""
    name = config.dtype if dtype is None else dtype_text(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not supported; expected {', '.join(DTYPES)}")
    picked: torch.dtype = getattr(torch, name)
    return picked


def dtype_text(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")
