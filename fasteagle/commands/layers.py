"""Which kernel would serve which layer of a checkpoint, why, and how many bytes does it take?"""

from __future__ import annotations

import re

import torch

from fasteagle.checkpoint import keeps_dense
from fasteagle.families import LM_HEAD, Weight
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
from fasteagle.quant.native import Native
from fasteagle.source import Checkpoint, packed_matrices, tensors_of


def layer_lines(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> list[str]:
    """A line for each kind of matrix and what it is stored as, then who multiplies by that."""
    packed, dense = packed_matrices(checkpoint), str(dtype).removeprefix("torch.")
    kinds: dict[tuple[str, str], int] = {}  # layers.*.mlp.down_proj, int4 -> how many
    for weight in checkpoint.plan:
        matrix = weight.name.removesuffix(".weight")
        if len(weight.shape) == 2:
            stored = f"int{packed[matrix]}" if matrix in packed else dense
            kind = (re.sub(r"[.][0-9]+[.]", ".*.", matrix), stored)
            kinds[kind] = kinds.get(kind, 0) + 1
    lines = [f"  {name + f' x{n}':36}{stored}" for (name, stored), n in kinds.items()]
    for bits in sorted(set(packed.values())):
        lines += _served(bits, dtype, device)
    return [*lines, f"  {dense}: torch's dense product"]


def _served(bits: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    if dtype == torch.float32:
        return [f"  int{bits}: dequantized to float32 when loaded, the exact and slow reference"]
    first, lines = 1, []
    for limit in kernels(bits, device=device, dtype=dtype):
        rows = f"{first} to {limit.rows} rows" if limit.rows < ANY else f"{first} rows and more"
        lines.append(f"  int{bits}, {rows}: {limit.kernel}; {limit.why}")
        first = limit.rows + 1
    return lines


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
            ranges = kernels(bits, device=device, dtype=dtype)
            copies = _copies(ranges, keep_dense=keep and weight.name != LM_HEAD)
            total += copies * stored + (dense if keep else 0)
    return total


def scratch_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the largest weight that a product of many rows dequantizes first; 0 if none does."""
    if dtype == torch.float32 or keeps_dense(checkpoint, device):
        return 0
    packed = packed_matrices(checkpoint)
    matrices = [w for w in checkpoint.plan if w.name.removesuffix(".weight") in packed]
    sizes = (torch.Size(weight.shape).numel() * dtype.itemsize for weight in matrices)
    return max(sizes, default=0)


def _stored_bytes(checkpoint: Checkpoint, weight: Weight) -> int:
    """Bytes of a parameter's codes, scales and zeros as `Quantized` has them."""
    entries, native = checkpoint.weights.entries, isinstance(checkpoint.packed, Native)
    total = 0
    for source, shape in zip(weight.sources, weight.shapes, strict=True):
        for name in tensors_of(source, shape, checkpoint.weights, checkpoint.packed):
            if name not in entries:
                continue
            count = torch.Size(entries[name].shape).numel()
            total += count * entries[name].dtype.itemsize
            if not native and name.endswith(("scale", "scales")):
                total += count * 4  # zeros of others' files become float32
            if name.endswith("g_idx"):
                total += count * 4  # 8 bytes a column, not 4
    return total


def _copies(ranges: list[Range], *, keep_dense: bool) -> int:
    """How often a layer holds its codes: as they are, and in the layout of a kernel."""
    used = {limit.kernel for limit in ranges}
    plain = bool(used & {TRITON, CPU_INT8}) or (DENSE in used and not keep_dense)
    return plain + bool(used & {TINYGEMM, CPU_INT4})
