"""What do the Triton kernels compute that multiply by chosen experts? For triton_cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton_cases import DTYPES, guarded, ptx_of

from fasteagle.quant.layout import dequantize
from fasteagle.quant.rounding import quantize

N_EXPERTS, N_OUTPUTS = 4, 70  # a tile and a bit
SLOTS = [1, 3, 1]  # experts 0 and 2 are used by nobody
KINDS = {"int4.g32": (4, 32, 160), "int8": (8, 1, 224)}
KINDS |= {"dense": (16, 1, 160), "dense even": (16, 1, 256)}
EXPERT_KERNELS = {"int4": 4, "int8": 8, "dense": 16}
EXPERT_CASES = [f"{kind} {case}" for kind in KINDS for case in ("1 fp16", "5 bf16", "3 fp16")]


def stacks_of(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """What the operator is given besides x and experts, and the weights `[E, O, J]` in float64.

    The experts that nobody uses hold NaN: whoever reads them shows it.
    """
    bits, group, n_inputs = KINDS[kind]
    torch.manual_seed(bits)
    full = torch.randn(N_EXPERTS, N_OUTPUTS, n_inputs) * 0.05 + 0.01
    if bits == 16:
        full = full.to(dtype)
        held, exact = [full.clone()], full.double()
    else:
        parts = [quantize(weight, bits=bits, group_size=group) for weight in full]
        exact = torch.stack([dequantize(part, torch.float64) for part in parts])
        each = zip(*(part.tensors().values() for part in parts), strict=True)
        held = [torch.stack(tensors) for tensors in each]
    for unused in set(range(N_EXPERTS)) - set(SLOTS):
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


def interpreted_experts() -> Iterator[tuple[str, Any]]:
    from fasteagle.quant.triton_ops import Tiles

    for kind in KINDS:
        yield f"{kind} 1 fp16", error(kind, 1, "fp16", shared=True)
        yield f"{kind} 5 bf16", error(kind, 5, "bf16", shared=False)
        yield f"{kind} 3 fp16", error(kind, 3, "fp16", shared=False, tiles=Tiles(32, 3, 32))
    for kind, name in (("int4.g32", "int4"), ("int8", "int8"), ("dense", "dense")):
        held, exact = stacks_of(kind, torch.float16)
        x = torch.randn(1, 3, exact.shape[2]).half()
        op = getattr(torch.ops.fasteagle, f"{name}_experts")
        arguments = (x, torch.tensor(SLOTS), *held)
        with FakeTensorMode() as mode:
            fake = op(*map(mode.from_tensor, arguments))
        assert (fake.shape, fake.dtype) == ((len(SLOTS), 3, N_OUTPUTS), x.dtype)


def compiled_experts() -> Iterator[tuple[str, Any]]:
    """The machine code for an RTX 3090, which needs no GPU to be made: its PTX, in counts."""
    from fasteagle.quant import triton_expert_kernels as kernels
    from fasteagle.quant.triton_ops import Tiles

    for name, bits in EXPERT_KERNELS.items():
        kernel, tiles = getattr(kernels, f"{name}_expert_tile"), Tiles(64, 1)
        constants = {"ROWS": 16, "OUTPUTS": 64, "BYTES": 64, "EVEN": True}
        constants |= {"GROUP": 32, "GROUPS": 4} if bits == 4 else {}
        ptx = ptx_of(kernel, bits, constants, tiles)
        yield f"{name} experts", {w: ptx.count(w) for w in ("mma.sync", "cp.async.cg")}
