"""What do the Triton kernels compute that multiply by chosen experts? For test_triton_experts.py.

TRITON_INTERPRET=1 python tests/triton_expert_cases.py     (one JSON object: an error a case)
python tests/triton_expert_cases.py compile
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton_cases import DTYPES, guarded, ptx_of, teach_bfloat16

from fasteagle.quant.layout import dequantize
from fasteagle.quant.rounding import quantize

E, O = 4, 70  # a tile and a bit
SLOTS = [1, 3, 1]  # experts 0 and 2 are used by nobody
KINDS = {"int4.g32": (4, 32, 160), "int4.g128": (4, 128, 256), "int8": (8, 1, 224)}
KINDS |= {"dense": (16, 1, 160), "dense even": (16, 1, 256)}
CASES = [f"{kind} {case}" for kind in KINDS for case in ("1 fp16", "5 bf16", "3 fp16")]


def stacks_of(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """What the operator is given besides x and experts, and the weights `[E, O, J]` in float64.

    The experts that nobody uses hold NaN: whoever reads them shows it.
    """
    bits, group, n_inputs = KINDS[kind]
    torch.manual_seed(bits)
    full = torch.randn(E, O, n_inputs) * 0.05 + 0.01
    if bits == 16:
        full = full.to(dtype)
        held, exact = [full.clone()], full.double()
    else:
        parts = [quantize(weight, bits=bits, group_size=group) for weight in full]
        exact = torch.stack([dequantize(part, torch.float64) for part in parts])
        each = zip(*(part.tensors().values() for part in parts), strict=True)
        held = [torch.stack(tensors) for tensors in each]
    for unused in set(range(E)) - set(SLOTS):
        held[-1][unused] = torch.nan
    return [guarded(stack) for stack in held], exact


def error(kind: str, rows: int, dtype: str, *, shared: bool, **tiles: Any) -> float:
    """Norm of the difference to the float64 product, over that product's norm."""
    from fasteagle.quant.triton_experts import expert_product

    held, exact = stacks_of(kind, DTYPES[dtype])
    torch.manual_seed(rows)
    x = torch.randn(1 if shared else len(SLOTS), rows, exact.shape[2]).to(DTYPES[dtype])
    experts = torch.tensor(SLOTS)
    found = expert_product(guarded(x), experts, *held, **tiles).double()
    wanted = x.double() @ exact[experts].mT
    assert found.shape == wanted.shape
    again = [n for n in range(1, len(SLOTS)) if SLOTS[n] == SLOTS[0]]
    assert not found[again].any(), "a slot that repeats the first is left 0"
    wanted[again] = 0
    return float((found - wanted).norm() / wanted.norm())


def interpreted() -> Iterator[tuple[str, Any]]:
    from fasteagle.quant.triton_ops import Tiles

    for kind in KINDS:
        yield f"{kind} 1 fp16", error(kind, 1, "fp16", shared=True)
        yield f"{kind} 5 bf16", error(kind, 5, "bf16", shared=False)
        yield f"{kind} 3 fp16", error(kind, 3, "fp16", shared=False, tiles=Tiles(32, 3, 32))
    for kind, name in (("int4.g32", "int4"), ("int8", "int8"), ("dense", "dense")):
        held, exact = stacks_of(kind, torch.float16)
        x = torch.randn(1, 3, exact.shape[2]).half()
        op = getattr(torch.ops.fasteagle, f"{name}_experts")
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op, (x, torch.tensor(SLOTS), *held), test_utils=checks)


def compiled() -> Iterator[tuple[str, Any]]:
    """The machine code for an RTX 3090, which needs no GPU to be made: its PTX, in counts."""
    from fasteagle.quant import triton_expert_kernels as kernels
    from fasteagle.quant.triton_ops import Tiles

    for bits, name in ((4, "int4"), (8, "int8"), (16, "dense")):
        kernel, tiles = getattr(kernels, f"{name}_expert_tile"), Tiles(64, 1)
        constants = {"ROWS": 16, "OUTPUTS": 64, "BYTES": 64, "EVEN": True}
        constants |= {"GROUP": 32, "GROUPS": 4} if bits == 4 else {}
        ptx = ptx_of(kernel, bits, constants, tiles)
        yield name, {word: ptx.count(word) for word in ("mma.sync", "cp.async.cg")}


if __name__ == "__main__":
    if "compile" in sys.argv:
        cases = compiled()
    else:
        teach_bfloat16()
        cases = interpreted()
    sys.stdout.write(json.dumps(dict(cases)) + "\n")
