"""How is a checkpoint quantized? One parameter in memory at a time, into one file beside it.

The matrices of the decoder layers (and an EAGLE head's fc) get `bits` bits, lm_head its own, norms,
biases and embeddings stay as they are. The file is written under another name and renamed when it
is whole; config.json then gets a record of it. A run that was broken off leaves nothing behind and
is started again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fasteagle import __version__
from fasteagle.checkpoint import open_kind
from fasteagle.config import ModelConfig, QuantConfig
from fasteagle.dtypes import dtype_text, pick_dtype, stored_dtype
from fasteagle.families import EMBEDDING, LM_HEAD
from fasteagle.footprint import is_quantizable
from fasteagle.parameters import read_parameters
from fasteagle.quant.layout import GROUP_SIZES, Quantized, stack
from fasteagle.quant.native import RECORDS, file_name, header, parts, records_of
from fasteagle.quant.rounding import CLIPS, quantize
from fasteagle.safewrite import Slot, safetensors_file, staged_folder, write_json
from fasteagle.source import Checkpoint, Source
from fasteagle.weights import read_json

ROWS = 512  # quantized together: the search for a range makes several float32 copies


class Recipe(NamedTuple):
    """What to make of a checkpoint."""

    bits: int  # 4 or 8
    group_size: int = 32  # of 4 bits
    clip: str = "mse"  # how a range is chosen, rounding.CLIPS
    lm_head_bits: int = 8  # 16 leaves it
    keep: tuple[str, ...] = ()  # patterns of our matrix names that stay in 16 bits
    pad: bool = False  # allow a last group that is not full
    gptq: bool = False

    @property
    def method(self) -> str:
        """As the file states it."""
        return f"gptq {self.clip}" if self.gptq else self.clip


class Plan(NamedTuple):
    """A checkpoint and what each of its parameters becomes."""

    checkpoint: Checkpoint
    recipe: Recipe
    bits: dict[str, int]  # of the quantized parameters; lm_head.weight may be one of tied models

    @property
    def config(self) -> QuantConfig:
        """The record of the file, without the checksum of its source."""
        has_groups = 4 in (self.recipe.bits, *self.bits.values())
        group_size = self.recipe.group_size if has_groups else 0
        lm_head = self.bits.get(LM_HEAD, 16)
        return QuantConfig(self.recipe.bits, group_size, self.recipe.method, "", lm_head)


def plan_quantization(
    source: Source, recipe: Recipe, *, kind: str | None = None, revision: str | None = None
) -> Plan:
    """Check a checkpoint and a recipe; ValueError for what cannot be, before anything is read."""
    if recipe.bits == 4 and recipe.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group size {recipe.group_size} is not supported; expected {sizes}")
    assert recipe.clip in CLIPS, f"{recipe.clip} is not one of {CLIPS}"
    checkpoint = open_kind(source, kind, revision=revision)
    if checkpoint.packed is not None:
        raise ValueError(
            f"{source} is quantized already ({checkpoint.packed.name}); give the checkpoint that "
            "it was made from"
        )
    plan = Plan(checkpoint, recipe, _bits(checkpoint, recipe))
    _check_groups(plan)
    return plan


def _bits(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, int]:
    matrices = [weight.name for weight in checkpoint.plan if is_quantizable(weight)]
    config = checkpoint.config
    if isinstance(config, ModelConfig) and config.tie_embeddings:
        matrices.append(LM_HEAD)
    kept = set()
    for pattern in recipe.keep:
        found = {name for name in matrices if fnmatch(name.removesuffix(".weight"), pattern)}
        if not found:
            some = ", ".join(name.removesuffix(".weight") for name in (*matrices[:4], matrices[-1]))
            raise ValueError(f"--keep {pattern} matches no matrix; there are {some}, ...")
        kept |= found
    bits = {name: recipe.lm_head_bits if name == LM_HEAD else recipe.bits for name in matrices}
    chosen = {name: number for name, number in bits.items() if number < 16 and name not in kept}
    if not chosen:
        raise ValueError("--keep leaves nothing to quantize; keep fewer matrices")
    return chosen


def _check_groups(plan: Plan) -> None:
    size = plan.recipe.group_size
    shapes = _shapes(plan.checkpoint)
    odd = [n for n, bits in plan.bits.items() if bits == 4 and shapes[n][1] % size]
    if odd and not plan.recipe.pad:
        name, n_inputs = odd[0].removesuffix(".weight"), shapes[odd[0]][1]
        fitting = [other for other in GROUP_SIZES if all(shapes[n][1] % other == 0 for n in odd)]
        another = f"--groupsize {max(fitting)}, " if fitting else ""
        raise ValueError(
            f"group size {size} does not divide the {n_inputs} inputs of {name} ({len(odd)} such "
            f"matrices); give --pad to fill up the last group, {another}or --keep "
            f"'*.{name.rpartition('.')[2]}' to leave them in 16 bits"
        )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = {weight.name: weight.shape for weight in checkpoint.plan}
    return shapes | {LM_HEAD: shapes.get(LM_HEAD, shapes.get(EMBEDDING, ()))}


def quantize_checkpoint(plan: Plan) -> Path:
    """Round a checkpoint's matrices to nearest; returns the file that was written."""
    with quantized_file(plan) as put:
        for name, value in dense_parameters(plan):
            if name in plan.bits:
                put(name, by_rows(value, plan, name))
            else:
                put(name, value)
            if name == EMBEDDING and LM_HEAD in plan.bits and _tied(plan):
                put(LM_HEAD, by_rows(value, plan, LM_HEAD))
    return path_of(plan)


def _tied(plan: Plan) -> bool:
    config = plan.checkpoint.config
    return isinstance(config, ModelConfig) and config.tie_embeddings


def dense_parameters(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, in the widest type that the files hold: rounding comes once, at the end."""
    entries = plan.checkpoint.weights.entries.values()
    wide = any(entry.dtype in (torch.float32, torch.float64) for entry in entries)
    dtype = torch.float32 if wide else pick_dtype(plan.checkpoint.config, None)
    for name, value in read_parameters(plan.checkpoint, dtype):
        assert isinstance(value, Tensor), f"{name} is quantized"
        yield name, value


def by_rows(weight: Tensor, plan: Plan, name: str) -> Quantized:
    """A weight `[O, I]` quantized as the plan says for it, some rows at a time."""
    recipe, bits = plan.recipe, plan.bits[name]
    whole = stack(
        [
            quantize(rows, bits=bits, group_size=recipe.group_size, clip=recipe.clip)
            for rows in weight.split(ROWS)
        ]
    )
    assert whole is not None, "rows of one weight share a layout"
    return whole


def path_of(plan: Plan) -> Path:
    """The file that a plan writes."""
    return plan.checkpoint.folder / file_name(plan.config)


@contextmanager
def quantized_file(plan: Plan) -> Iterator[Callable[[str, Tensor | Quantized], None]]:
    """Write a plan's file by calling what this yields with every parameter, in any order."""
    path, checkpoint, quant = path_of(plan), plan.checkpoint, _with_sha(plan)
    dtype = pick_dtype(checkpoint.config, None)
    slots = [slot for name in _names(plan) for slot in _slots(plan, name, dtype)]
    metadata = {"fasteagle": __version__} | header(checkpoint.config, quant)
    total = len(_names(plan))
    stated = read_json(checkpoint.folder / "config.json")
    records = records_of(stated) | {path.name: asdict(quant)}
    with staged_folder(checkpoint.folder, last="config.json") as stage:
        with (
            safetensors_file(stage / path.name, slots, metadata=metadata) as write,
            tqdm(total=total, unit="tensor", desc="quantizing", disable=None) as bar,
        ):

            def put(name: str, value: Tensor | Quantized) -> None:
                if isinstance(value, Quantized):
                    for suffix, tensor in value.tensors().items():
                        write(f"{name.removesuffix('.weight')}.{suffix}", tensor)
                else:
                    write(name, _rounded(name, value, dtype))
                bar.update()

            yield put
        write_json(stage / "config.json", stated | {RECORDS: records})


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = value.to(dtype) if value.is_floating_point() else value
    if narrow.dtype != value.dtype and not narrow.isfinite().all():
        raise ValueError(
            f"{name} overflows {dtype_text(dtype)}; run `fasteagle convert --dtype bfloat16` first "
            "and quantize what it writes"
        )
    return narrow


def _with_sha(plan: Plan) -> QuantConfig:
    """The record with the SHA-256 of the source's weight files, one after another."""
    digest = hashlib.sha256()
    for file in plan.checkpoint.weights.files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 24):
                digest.update(piece)
    return QuantConfig(**asdict(plan.config) | {"source_sha": digest.hexdigest()})


def _names(plan: Plan) -> list[str]:
    names = [weight.name for weight in plan.checkpoint.plan]
    return [*names, LM_HEAD] if LM_HEAD in plan.bits and LM_HEAD not in names else names


def _slots(plan: Plan, name: str, dtype: torch.dtype) -> Sequence[Slot]:
    shape, bits = _shapes(plan.checkpoint)[name], plan.bits.get(name)
    if bits is None:
        weight = next(w for w in plan.checkpoint.plan if w.name == name)
        return [Slot(name, shape, stored_dtype(weight, dtype))]
    named = parts(name.removesuffix(".weight"), shape, bits=bits, group_size=plan.recipe.group_size)
    return [Slot(tensor, part.shape, part.dtypes[0]) for tensor, part in named.items()]
