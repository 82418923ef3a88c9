"""What do the Triton kernels compute, and do they compile? For test_triton_kernels.py.

TRITON_INTERPRET=1 python tests/triton_cases.py     (one JSON object: a number or text a case)
python tests/triton_cases.py compile
The word "attention" gives triton_attention_cases.py in the place of the products.

A process of its own: Triton decides at import whether it interprets kernels, for good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasteagle.quant.layout import GROUP_SIZES, Quantized, dequantize
from fasteagle.quant.rounding import quantize

ROWS = (1, 2, 3, 16, 17, 26, 33, 64)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
N_OUTPUTS = 70  # a tile and a bit
SCALES = (torch.bfloat16, torch.float16, torch.float32)


class Case(NamedTuple):
    bits: int
    group: int  # 0 for int8
    rows: int
    dtype: str


CASES = [
    *(Case(4, g, m, dtype) for g in GROUP_SIZES for m in ROWS for dtype in DTYPES),
    *(Case(8, 0, m, dtype) for m in ROWS for dtype in DTYPES),
]
SPLITS = (1, 2, 3, 8)  # 3 does not divide the steps; 8 leaves ranges without any
COMPILED = ((4, 32, 16), (4, 128, 64), (8, 0, 16))


def name(case: Case) -> str:
    return " ".join(map(str, case))


def weight_of(case: Case, n_inputs: int, scales: torch.dtype = torch.bfloat16) -> Quantized:
    """Every weight tensor ends in front of NaN or noise that no kernel may use."""
    torch.manual_seed(case.group)
    full = torch.randn(N_OUTPUTS, n_inputs) * 0.05 + 0.01
    weight = quantize(full, bits=case.bits, group_size=case.group or 1)
    zeros = weight.zeros
    return weight._replace(
        codes=guarded(weight.codes),
        scales=guarded(weight.scales.to(scales)),
        zeros=None if zeros is None else guarded(zeros.to(scales)),
    )


def guarded(tensor: Tensor) -> Tensor:
    """The same values at the start of a longer buffer."""
    fill = torch.nan if tensor.is_floating_point() else 77
    longer = torch.full((tensor.numel() + 4096,), fill, dtype=tensor.dtype)
    longer[: tensor.numel()] = tensor.flatten()
    return longer[: tensor.numel()].view(tensor.shape)


def product(weight: Quantized, x: Tensor, bias: Tensor | None, **tiles: Any) -> Tensor:
    from fasteagle.quant import triton_ops

    if weight.bits == 8:
        return triton_ops.int8_product(x, weight.codes, weight.scales, bias, **tiles)
    assert weight.zeros is not None
    return triton_ops.int4_product(x, weight.codes, weight.scales, weight.zeros, bias, **tiles)


def error(case: Case, n_inputs: int, scales: torch.dtype, *, bias: bool, **tiles: Any) -> float:
    """Norm of the difference to the float64 product, over that product's norm."""
    weight = weight_of(case, n_inputs, scales)
    dtype = DTYPES[case.dtype]
    x = guarded(torch.randn(case.rows, n_inputs).to(dtype))
    added = guarded(torch.randn(N_OUTPUTS).to(dtype)) if bias else None
    wanted = x.double() @ dequantize(weight, torch.float64).T
    if added is not None:
        wanted += added.double()
    found = product(weight, x, added, **tiles)
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    return float((found.double() - wanted).norm() / wanted.norm())


def interpreted() -> Iterator[tuple[str, Any]]:
    from fasteagle.quant.triton_ops import Tiles

    scales, biases = cycle(SCALES), cycle((True, False, False, True, False))
    for case in CASES:
        # 5 groups of 32 are a step and a half: masks. Larger ones: a part of a group a step.
        n_inputs = case.group * (5 if case.group < 128 else 2) or 224
        yield name(case), error(case, n_inputs, next(scales), bias=next(biases))
    for bits, group in ((4, 32), (8, 0)):
        for splits in SPLITS:
            tiles = Tiles(32, splits, 32)
            case = Case(bits, group, 5, "fp16")
            found = error(case, 320, torch.bfloat16, bias=splits == 2, tiles=tiles)
            yield f"int{bits} splits {splits}", found
    yield from operators()
    yield from rules()
    from triton_expert_cases import interpreted_experts

    yield from interpreted_experts()


def operators() -> Iterator[tuple[str, Any]]:
    """The two operators as torch.compile and the fake tensors see them."""
    for bits, group in ((4, 64), (8, 0)):
        weight = weight_of(Case(bits, group, 3, "fp16"), 128)
        x, bias = torch.randn(3, 128).half(), torch.randn(N_OUTPUTS).half()
        zeros = [] if weight.zeros is None else [weight.zeros]
        op = getattr(torch.ops.fasteagle, f"int{bits}_linear")
        args = (x, weight.codes, weight.scales, *zeros)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op, (*args, bias), test_utils=checks)

        def doubled(*args: Tensor, op: Any = op) -> Tensor:
            return op(*args) * 2

        compiled = torch.compile(doubled, fullgraph=True, backend="eager")
        yield f"int{bits} compiled", bool(torch.equal(compiled(*args), op(*args) * 2))


def rules() -> Iterator[tuple[str, Any]]:
    """The choice for the layers of LLaMA2-7B and LLaMA3-8B: [bits, rows, O, B, *tiles]."""
    from fasteagle.quant.triton_ops import choose_tiles

    shapes = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)]
    shapes += [(6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
    yield (
        "tiles",
        [
            [bits, rows, outputs, inputs * bits // 8, *choose_tiles(bits, rows, outputs, n_bytes)]
            for bits in (4, 8)
            for outputs, inputs in shapes
            for n_bytes in [inputs * bits // 8]
            for rows in ROWS
        ],
    )


def compiled() -> Iterator[tuple[str, Any]]:
    """The machine code for an RTX 3090, which needs no GPU to be made: its PTX, in counts."""
    from fasteagle.quant import triton_kernels
    from fasteagle.quant.triton_ops import Tiles, choose_tiles

    for bits, group, rows in COMPILED:
        kernel = triton_kernels.int4_tile if bits == 4 else triton_kernels.int8_tile
        tiles: Tiles = choose_tiles(bits, rows, 4096, 512 * bits)
        constants = {"ROWS": rows, "OUTPUTS": tiles.outputs, "BYTES": tiles.step_bytes}
        constants["EVEN"] = True
        if bits == 4:
            constants |= {"GROUP": group, "GROUPS": max(1, 2 * tiles.step_bytes // group)}
        ptx = ptx_of(kernel, bits, constants, tiles)
        counts = {word: ptx.count(word) for word in ("mma.sync", "cp.async.cg")}
        yield f"{bits} {group} {rows}", counts
    from triton_expert_cases import compiled_experts

    yield from compiled_experts()


def ptx_of(
    kernel: Any,
    bits: int,
    constants: dict[str, Any],
    tiles: Any,
    *,
    types: dict[str, str] | None = None,
    target: int = 86,
) -> str:
    """Machine code for a compute capability; types of arguments are those of a product if None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"x": "*fp16", "codes": "*u8" if bits == 4 else "*i8", "sums": "*fp32"}
    pointers |= {"scales": "*bf16", "zeros": "*bf16", "weights": "*fp16", "experts": "*i64"}
    types = types or pointers
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        constant = argument in constants
        signature[argument] = "constexpr" if constant else types.get(argument, "i32")
        if signature[argument][0] in "*i" and argument != "n_rows":
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    gpu = GPUTarget("cuda", target, 32)
    return str(triton.compile(source, target=gpu, options=options).asm["ptx"])


def teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies these as they are; widen them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(values, tl.float32)

    def dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return plain(self, widened(a), widened(b), *more)

    InterpreterBuilder.create_dot = dot


def chosen(words: list[str]) -> Iterator[tuple[str, Any]]:
    """The cases that the command line names."""
    if "attention" in words:
        from triton_attention_cases import compiled_attention, interpreted_attention

        return compiled_attention() if "compile" in words else interpreted_attention()
    return compiled() if "compile" in words else interpreted()


if __name__ == "__main__":
    if "compile" not in sys.argv:
        teach_bfloat16()
    found = chosen(sys.argv)
    sys.stdout.write(json.dumps(dict(found)) + "\n")
