"""Which kernel would serve which layer of a checkpoint, why, and how many bytes does it take?"""

from __future__ import annotations

import re

import torch

from fasteagle.checkpoint import keeps_dense
from fasteagle.families import Weight
from fasteagle.quant.kernels import (
    ANY,
    CPU_INT4,
    CPU_INT8,
    DENSE,
    TINYGEMM,
    TRITON,
    Range,
    kernels,
)
from fasteagle.source import Checkpoint, packed_matrices, tensors_of

EXACT = "float32: dequantized when loaded, the exact and slow reference"


def layer_lines(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> list[str]:
    """A line for each kind of matrix, and one for each kernel of those that are quantized."""
    kinds: dict[str, list[str]] = {}  # layers.*.mlp.down_proj, of which precision -> matrices
    packed = packed_matrices(checkpoint)
    for weight in checkpoint.plan:
        matrix = weight.name.removesuffix(".weight")
        if len(weight.shape) == 2:
            stored = f"int{packed[matrix]}" if matrix in packed else str(dtype)[6:]
            kinds.setdefault(f"{re.sub(r'[.][0-9]+[.]', '.*.', matrix)} {stored}", []).append(
                matrix
            )
    lines = []
    width = max(len(kind) for kind in kinds) + 6
    for kind, matrices in kinds.items():
        bits = packed.get(matrices[0])
        title = f"  {kind} x{len(matrices)}".ljust(width)
        served = [f"dense {str(dtype)[6:]}"] if bits is None else _served(bits, dtype, device)
        lines += [title + served[0], *(" " * width + more for more in served[1:])]
    return lines


def _served(bits: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    if dtype == torch.float32:
        return [EXACT]
    first, words = 1, []
    for limit in kernels(bits, device=device, dtype=dtype):
        rows = f"{first} to {limit.rows} rows" if limit.rows < ANY else f"{first} rows and more"
        words.append(f"{rows}: {limit.kernel}, {limit.why}")
        first = limit.rows + 1
    return words


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a checkpoint's weights in memory, with what its kernels want besides the codes."""
    packed, keep = packed_matrices(checkpoint), keeps_dense(checkpoint, device)
    total = 0
    for weight in checkpoint.plan:
        dense = torch.Size(weight.shape).numel() * dtype.itemsize
        bits = packed.get(weight.name.removesuffix(".weight"))
        if bits is None or dtype == torch.float32:
            total += dense
        else:
            stored = _stored_bytes(checkpoint, weight)
            copies = _copies(kernels(bits, device=device, dtype=dtype), keep_dense=keep)
            total += copies * stored + (dense if keep else 0)
    return total


def _stored_bytes(checkpoint: Checkpoint, weight: Weight) -> int:
    entries = checkpoint.weights.entries
    total = 0
    for source, shape in zip(weight.sources, weight.shapes, strict=True):
        for name in tensors_of(source, shape, checkpoint.weights, checkpoint.packed):
            if name in entries:
                total += torch.Size(entries[name].shape).numel() * entries[name].dtype.itemsize
    return total


def _copies(ranges: list[Range], *, keep_dense: bool) -> int:
    """How often a layer holds its codes: as they are, and in the layout of a kernel."""
    used = {limit.kernel for limit in ranges}
    plain = bool(used & {TRITON, CPU_INT8}) or (DENSE in used and not keep_dense)
    return plain + bool(used & {TINYGEMM, CPU_INT4})
