"""What is in a checkpoint? Config and headers, checked strictly before any value is read.

A source is a Hugging Face folder, a fasteagle folder (what `checkpoint.convert` writes), a weight
file inside one (its config.json lies beside it), or a hub id. Every tensor in it must be used and
every one that the config asks for must be there. Matrices may be quantized: in our own files, by
GPTQ, AWQ or compressed-tensors in a folder, or by gpt-fast in a .pth file.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasteagle.config import (
    CONFIGS,
    AnyConfig,
    DraftConfig,
    HeadConfig,
    ModelConfig,
    from_dict,
    kind_of,
)
from fasteagle.dtypes import dtype_text
from fasteagle.expert_names import FUSED
from fasteagle.families import LM_HEAD, Shape, Weight, read_config, target_weights
from fasteagle.heads import HEADS, canonical, head_kind, read_draft_config
from fasteagle.hf_config import DTYPES, dtype_name, token_ids
from fasteagle.hub import locate
from fasteagle.quant import gptfast
from fasteagle.quant.formats import Format, Part, format_of
from fasteagle.quant.native import HEADER, Native, read_header, records_of
from fasteagle.weights import Entry, Weights, read_json

Config = AnyConfig
Source = str | Path
FOLDER_VERSION = 1  # of the fasteagle folder
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int64, torch.int32)


class Checkpoint(NamedTuple):
    """An opened source: headers read and checked, values not yet."""

    folder: Path
    config: Config
    weights: Weights
    plan: list[Weight]  # in the order of the files, so that each is opened once
    packed: Format | None = None  # how quantized matrices are stored, if there are any

    @property
    def kind(self) -> str:
        """ "target", or a row of heads.HEADS."""
        return kind_of(self.config)

    @property
    def words(self) -> str:
        """What it is called in messages."""
        return HEADS[self.kind].words if self.kind in HEADS else "a target model"


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
        config, plan, packed = _read(stated, weights, path)
        _check(config, plan, weights, packed)
        if stated.get("format") != "fasteagle":
            dense = (w for w in plan if not matrix_of(w.sources[0], weights, packed))
            plain = next(w for w in dense if not w.whole)
            stored = _first_entry(plain, weights, packed).dtype
            config = _complete(config, stated, folder, stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    order = {file: index for index, file in enumerate(weights.files)}
    plan.sort(key=lambda weight: order[_first_entry(weight, weights, packed).file])
    return Checkpoint(folder, config, weights, plan, packed)


def _read(
    stated: dict[str, Any], weights: Weights, path: Path
) -> tuple[Config, list[Weight], Format | None]:
    """Config, wanted parameters and quantized form of a source, from what its files state."""
    if HEADER in weights.metadata:
        return _read_quantized(stated, weights, path)
    if path.suffix == ".pth":
        return _read_gptfast(stated, weights)
    native = stated.get("format") == "fasteagle"
    config, plan = _read_native(stated) if native else _read_hf(stated, weights)
    method = stated.get("quantization_config")
    return config, plan, format_of(method) if method else None


def packed_matrices(checkpoint: Checkpoint) -> dict[str, int]:
    """The quantized matrices by our names, a fused one once, and their bits."""
    found = {}
    for weight in checkpoint.plan:
        for source, shape in zip(weight.sources, weight.shapes, strict=True):
            if matrix_of(source, checkpoint.weights, checkpoint.packed):
                held = tensors_of(source, shape, checkpoint.weights, checkpoint.packed).values()
                whole = any(part.dtypes == (torch.int8,) for part in held)
                found[weight.name.removesuffix(".weight")] = 8 if whole else 4
    return found


def matrix_of(source: str, weights: Weights, packed: Format | None) -> str | None:
    """The name of a quantized matrix as its format has it, or None if it is not quantized."""
    matrix = source.removesuffix(".weight")
    held = packed is not None and matrix != source and packed.holds(matrix, weights.entries)
    return matrix if held else None


def tensors_of(
    source: str, shape: Shape, weights: Weights, packed: Format | None, *, whole: bool = False
) -> dict[str, Part]:
    """The tensors that stand for one tensor of the unquantized checkpoint; whole: Weight's."""
    matrix = matrix_of(source, weights, packed)
    if matrix is None or packed is None:
        return {source: Part(shape, WHOLE if whole else STORED)}
    return packed.tensors(matrix, (shape[0], shape[1]))


def _first_entry(weight: Weight, weights: Weights, packed: Format | None) -> Entry:
    names = tensors_of(weight.sources[0], weight.shapes[0], weights, packed)
    return next(weights.entries[name] for name in names if name in weights.entries)


def _read_quantized(
    stated: dict[str, Any], weights: Weights, path: Path
) -> tuple[Config, list[Weight], Format]:
    """A file that our quantizers wrote; config.json beside it must be its model's."""
    config, quant = read_header(weights.metadata)
    record = records_of(stated).get(path.name, asdict(quant))
    if record != asdict(quant) or not _describes(stated, config):
        raise ValueError(
            "config.json beside it belongs to another model; put the file beside the checkpoint "
            "that it was made from, or quantize again"
        )
    plan = _own_names(config)
    tied = isinstance(config, ModelConfig) and config.tie_embeddings
    if tied and "lm_head.qweight" in weights.entries:
        plan.append(Weight(LM_HEAD, (LM_HEAD,), ((config.vocab_size, config.dim),)))
    return config, plan, Native(quant, weights.entries)


def _read_gptfast(stated: dict[str, Any], weights: Weights) -> tuple[Config, list[Weight], Format]:
    """A quantized .pth of gpt-fast, or of EAGLE's eaglefast branch."""
    entries = weights.entries
    stored = gptfast.format_of_file(entries)
    layer = "layers.0.attention.wqkv"
    if stored is None or not stored.holds(layer, entries):
        raise ValueError(
            f"{layer} is not quantized; expected a file like model_int8.pth or model_int4.g32.pth: "
            "give the folder of the Hugging Face checkpoint instead"
        )
    config: Config
    if "fc.weight" in entries:
        config = read_draft_config(stated, gptfast.head_shapes(entries))
        names = gptfast.head_names(config)
    else:
        config = read_config(stated)
        names = gptfast.target_names(config)
    plan = [Weight(ours, tuple(parts), tuple(parts.values())) for ours, parts in names.items()]
    return config, plan, gptfast.Turned(stored, config)


def _describes(stated: dict[str, Any], config: Config) -> bool:
    """Whether a config.json is that of a config's model; dtype and special ids may differ."""
    if stated.get("format") == "fasteagle":
        beside, _ = _read_native(stated)
    elif isinstance(config, ModelConfig):
        beside = read_config(stated)
    else:
        shapes = {n: s for w in _plan(config) for n, s in zip(w.sources, w.shapes, strict=True)}
        beside = HEADS[config.kind].read(stated, shapes)
    if isinstance(config, ModelConfig) and isinstance(beside, ModelConfig):
        beside = replace(beside, bos_id=config.bos_id, eos_ids=config.eos_ids)
    return replace(beside, dtype=config.dtype) == config


def _read_native(stated: dict[str, Any]) -> tuple[Config, list[Weight]]:
    if stated.get("version") != FOLDER_VERSION:
        raise ValueError(
            f"the folder has version {stated.get('version')}; this fasteagle reads version "
            f"{FOLDER_VERSION}: convert the checkpoint again"
        )
    kind, values = stated.get("kind"), stated.get("config")
    if kind not in CONFIGS or not isinstance(values, dict):
        raise ValueError(f"kind is {kind!r}; expected {', '.join(CONFIGS)}, with its config")
    config: Config = from_dict(CONFIGS[kind], values)
    return config, _own_names(config)


def _read_hf(stated: dict[str, Any], weights: Weights) -> tuple[Config, list[Weight]]:
    shapes = {name: entry.shape for name, entry in weights.entries.items()}
    kind = head_kind(shapes)
    if kind is None:
        target = read_config(stated)
        fused = any(name.endswith(FUSED) for name in shapes)
        return target, target_weights(target, fused_experts=fused)
    given = {canonical(name): name for name in shapes}
    if len(given) < len(shapes):
        names = sorted(set(shapes) - set(given.values()))
        raise ValueError(f"the head holds {names[0]} twice, with and without a prefix")
    head: HeadConfig = HEADS[kind].read(stated, shapes)
    plan = [w._replace(sources=tuple(given.get(s, s) for s in w.sources)) for w in _plan(head)]
    return head, plan


def _plan(config: Config) -> list[Weight]:
    if isinstance(config, ModelConfig):
        return target_weights(config)
    return HEADS[config.kind].weights(config)


def _own_names(config: Config) -> list[Weight]:  # of our files
    return [w._replace(sources=(w.name,), shapes=(w.shape,)) for w in _plan(config)]


def _check(config: Config, plan: list[Weight], weights: Weights, packed: Format | None) -> None:
    """Every wanted tensor is there, in its shape and one of its types, and no other is."""
    wanted: dict[str, Part] = {}
    ignored: set[str] = set()
    for weight in plan:
        for source, shape in zip(weight.sources, weight.shapes, strict=True):
            wanted |= tensors_of(source, shape, weights, packed, whole=weight.whole)
            matrix = matrix_of(source, weights, packed)
            if matrix is not None and packed is not None and packed.zero_bias:
                ignored.add(f"{matrix}.bias")
    missing = [n for n, part in wanted.items() if n not in weights.entries and not part.optional]
    if isinstance(packed, gptfast.Turned) and isinstance(config, DraftConfig):
        ignored.update(n for n in weights.entries if n.startswith(gptfast.HEAD_COPY))
    known = wanted.keys() | ignored
    unknown = [n for n in weights.entries if n not in known and not _may_ignore(n, config)]
    if missing or unknown:
        lists = {"missing": missing, "unknown": unknown}
        text = "; ".join(f"{kind} {', '.join(names)}" for kind, names in lists.items() if names)
        raise ValueError(f"the weights do not fit config.json: {text}")
    for name, part in wanted.items():
        if name in weights.entries:
            _check_entry(name, weights.entries[name], part)
    if isinstance(config, ModelConfig) and config.n_experts:
        _check_experts(plan, weights, packed)


def _check_experts(plan: list[Weight], weights: Weights, packed: Format | None) -> None:
    """The experts of a layer lie in one tensor, so they are quantized all together or not."""
    for weight in plan:
        kinds = {matrix_of(source, weights, packed) is None for source in weight.sources}
        if ".mlp." in weight.name and len(kinds) > 1:
            plain = next(s for s in weight.sources if matrix_of(s, weights, packed) is None)
            raise ValueError(
                f"{plain} is not quantized, but other experts of its layer are; quantize all or "
                "none of them"
            )


def _check_entry(name: str, entry: Entry, part: Part) -> None:
    if entry.shape != part.shape:
        raise ValueError(
            f"{name} has shape {list(entry.shape)}; config.json asks for {list(part.shape)}"
        )
    if entry.dtype not in part.dtypes:
        names = ", ".join(dtype_text(dtype) for dtype in part.dtypes)
        raise ValueError(f"{name} is {dtype_text(entry.dtype)}; expected {names}")


def _may_ignore(name: str, config: Config) -> bool:
    if isinstance(config, ModelConfig):
        left_over = config.tie_embeddings and name == LM_HEAD
    else:
        left_over = canonical(name) in HEADS[config.kind].leftovers
    return left_over or name.endswith("rotary_emb.inv_freq")


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
