"""Which kernel would serve which layer of a checkpoint, and why?"""

from __future__ import annotations

import re

import torch

from fasteagle.footprint import is_expert, kernels_of
from fasteagle.quant.kernels import ANY, Range
from fasteagle.source import Checkpoint, packed_matrices


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
    config = checkpoint.config
    served = {(bits, is_expert(config, name)): name for name, bits in packed.items()}
    for (bits, experts), name in sorted(served.items()):
        title = f"int{bits} experts" if experts else f"int{bits}"
        if dtype == torch.float32:
            exact = "dequantized to float32 when loaded, the exact and slow reference"
            lines.append(f"  {title}: {exact}")
        else:
            ranges = kernels_of(config, name, bits, device=device, dtype=dtype)
            lines += _range_lines(title, ranges)
    return [*lines, f"  {dense}: torch's dense product"]


def _range_lines(title: str, ranges: list[Range]) -> list[str]:
    first, lines = 1, []
    for limit in ranges:
        rows = f"{first} to {limit.rows} rows" if limit.rows < ANY else f"{first} rows and more"
        lines.append(f"  {title}, {rows}: {limit.kernel}; {limit.why}")
        first = limit.rows + 1
    return lines
