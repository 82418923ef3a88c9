"""What do a checkpoint's parameters hold? Values, one parameter in memory at a time.

source.py has found the tensors and checked their names, shapes and types; here they are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fasteagle.dtypes import dtype_text, pick_dtype
from fasteagle.families import EMBEDDING, LM_HEAD, Weight
from fasteagle.quant.layout import Quantized, stack
from fasteagle.source import Checkpoint, Source, matrix_of, open_checkpoint, tensors_of
from fasteagle.weights import Weights

# A parameter as it is read: a list has parts, stacked top to bottom, whose layouts differ.
Parameter = Tensor | Quantized | list[Tensor | Quantized]


def read_parameters(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Parameter]]:
    """Every parameter by our name on the CPU, one at a time; NaN or infinity is an error.

    What is not quantized comes in `dtype`; what is, as it is stored.
    """
    _check_tied_copy(checkpoint)
    for weight in checkpoint.plan:
        if any(matrix_of(s, checkpoint.weights, checkpoint.packed) for s in weight.sources):
            yield weight.name, _read_packed(checkpoint, weight, dtype)
        else:
            yield weight.name, read_parameter(checkpoint, weight, dtype)


def read_parameter(checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype) -> Tensor:
    """One parameter that is not quantized, in `dtype` (whole numbers in int64) on the CPU; NaN or
    inf is a ValueError.
    """
    weights = checkpoint.weights
    if weight.whole:
        return weights.read(weight.sources[0]).to(torch.int64, copy=True)
    tensor = torch.empty(weight.shape, dtype=dtype)
    parts = torch.split(tensor, weight.heights)
    for name, part in zip(weight.sources, parts, strict=True):
        part.copy_(weights.read(name).reshape(part.shape))
        # One pass without a temporary, ten times faster than isfinite; NaN comes through.
        if not torch.stack(torch.aminmax(part)).isfinite().all():
            raise ValueError(_not_finite(weights, name, dtype))
    return tensor


def _read_packed(checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype) -> Parameter:
    """A parameter with quantized parts: stacked where their layouts agree."""
    weights, packed = checkpoint.weights, checkpoint.packed
    # Only then may the file hold biases that the model has not.
    added = packed is not None and packed.zero_bias
    used = {name for each in checkpoint.plan for name in each.sources} if added else set()
    parts: list[Tensor | Quantized] = []
    for source, shape in zip(weight.sources, weight.shapes, strict=True):
        matrix = matrix_of(source, weights, packed)
        if matrix is None or packed is None:
            parts.append(read_parameter(checkpoint, Weight(source, (source,), (shape,)), dtype))
            continue
        bias = f"{matrix}.bias"
        if added and bias in weights.entries.keys() - used and weights.read(bias).any():
            raise ValueError(f"{weights.path}: {bias} is not 0, and this model has no such bias")
        names = [name for name in packed.tensors(matrix, shape) if name in weights.entries]
        held = {name: weights.read(name).clone() for name in names}  # what is kept must be ours
        try:
            parts.append(packed.read(matrix, shape, held))
        except ValueError as error:
            raise ValueError(f"{weights.path}: {error}") from error
    quantized = [part for part in parts if isinstance(part, Quantized)]
    whole = stack(quantized) if len(quantized) == len(parts) else None
    return parts if whole is None else whole


def weight_bytes(
    source: Source, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> dict[str, int]:
    """Bytes of the weights by part (embed_tokens, layers, ...) and "total", from headers.

    Quantized matrices count as they are stored, all others in `dtype`.
    """
    checkpoint = open_checkpoint(source, revision=revision)
    item = pick_dtype(checkpoint.config, dtype).itemsize
    sizes: dict[str, int] = {}
    for weight in checkpoint.plan:
        part = weight.name.partition(".")[0]
        for source_name, shape in zip(weight.sources, weight.shapes, strict=True):
            wanted = tensors_of(source_name, shape, checkpoint.weights, checkpoint.packed)
            for name, tensor in wanted.items():
                entry = checkpoint.weights.entries.get(name)
                plain = name == source_name and not weight.whole
                size = item if plain else entry.dtype.itemsize if entry else 0
                sizes[part] = sizes.get(part, 0) + torch.Size(tensor.shape).numel() * size
    return {**sizes, "total": sum(sizes.values())}


def _check_tied_copy(checkpoint: Checkpoint) -> None:
    weights, used = checkpoint.weights, {n for w in checkpoint.plan for n in w.sources}
    if LM_HEAD not in weights.entries or LM_HEAD in used:
        return
    embedding = next(w.sources[0] for w in checkpoint.plan if w.name == EMBEDDING)
    if not torch.equal(weights.read(embedding), weights.read(LM_HEAD)):
        raise ValueError(
            f"{weights.path}: config.json ties lm_head to the embedding, but {LM_HEAD} differs; "
            "set tie_word_embeddings to false"
        )


def _not_finite(weights: Weights, name: str, dtype: torch.dtype) -> str:
    entry, value = weights.entries[name], weights.read(name)
    if not value.isfinite().all():
        return f"{entry.file}: {name} holds NaN or infinity; download it again"
    return f"{entry.file}: {name} overflows {dtype_text(dtype)}; use bfloat16 or float32"
