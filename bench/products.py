"""Which kernels multiply by a 16-bit, int8 or int4 weight here, and how is each one called?

    O outputs  I inputs  g group size

Weights are random: a product takes the same time with any.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fasteagle.quant.layout import Quantized, unpack_int4

Shape = tuple[int, int]  # O, I
Multiply = Callable[[Tensor, Any], Tensor]
CACHE_BYTES = 96 << 20  # copies of a weight are more than this: an H200's cache has 50 MB
OURS_GROUP = 32  # of the column "ours"


class Product(NamedTuple):
    name: str
    dtype: torch.dtype  # of activations
    multiply: Multiply  # x [M, I] and a copy of the weight -> [M, O]
    copies: list[Any]


class Maker(NamedTuple):
    """A product that is not made yet: all of them together would not fit a GPU."""

    name: str
    build: Callable[[], Product]


def our_linear(bits: int) -> Callable[[Quantized, torch.dtype], torch.nn.Module]:
    """The package's own layer for such weights: the place where benches get it."""
    from fasteagle.quant.linear import QuantLinear

    def make(weight: Quantized, dtype: torch.dtype) -> torch.nn.Module:
        assert weight.bits == bits, f"{weight.bits} bits, not {bits}"
        device = weight.codes.device
        keep = device.type == "cpu"  # as loading does where memory allows
        return QuantLinear(weight, dtype=dtype, device=device, keep_dense=keep)

    return make


def products(shape: Shape, device: torch.device) -> list[Maker]:
    """The kernels of a device, each with a name that read_bytes understands."""
    bf16, fp16 = torch.bfloat16, torch.float16
    if device.type == "cpu":
        table = [
            ("dense bf16", dense, {"dtype": bf16}),
            ("int8pack bf16", int8pack, {}),
            ("int4pack.g32 bf16", int4pack, {"group": 32}),
            ("int8 ours bf16", ours, {"bits": 8, "group": 32, "dtype": bf16}),
            ("int4.g32 ours bf16", ours, {"bits": 4, "group": 32, "dtype": bf16}),
        ]
    else:
        table = [(f"dense {_text(dtype)}", dense, {"dtype": dtype}) for dtype in (bf16, fp16)]
        table += [(f"int4.g{g} tinygemm bf16", tinygemm, {"group": g}) for g in (32, 128)]
        if importlib.util.find_spec("triton") is not None:
            for dtype in (bf16, fp16):
                table.append((f"int8 triton {_text(dtype)}", triton, {"bits": 8, "group": 32}))
                table[-1][2]["dtype"] = dtype
                for g in (32, 128):
                    options = {"bits": 4, "group": g, "dtype": dtype}
                    table.append((f"int4.g{g} triton {_text(dtype)}", triton, options))
    return [
        Maker(name, partial(make, name, shape, device, **options)) for name, make, options in table
    ]


def read_bytes(name: str, shape: Shape) -> float:
    """Bytes of a weight by a kernel's name: codes, and 16-bit scales and zeros."""
    kind, n = name.split()[0], shape[0] * shape[1]
    if kind == "dense":
        return 2 * n
    if kind.startswith("int8"):
        return n + 2 * shape[0]
    return n / 2 + 4 * n / int(kind.rpartition("g")[2])


def random_weight(bits: int, shape: Shape, group: int, device: torch.device) -> Quantized:
    n_out, n_in = shape
    if bits == 8:
        codes = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8, device=device)
        return Quantized(
            8, codes, torch.full((n_out, 1), 0.001, device=device).bfloat16(), None, n_in
        )
    codes = torch.randint(0, 256, (n_out, n_in // 2), dtype=torch.uint8, device=device)
    scales = torch.full((n_out, n_in // group), 0.01, device=device).bfloat16()
    return Quantized(4, codes, scales, torch.zeros_like(scales), n_in)


def copies_of(make: Callable[[], Any], n_bytes: float, device: torch.device) -> list[Any]:
    """Enough copies that none is left in the GPU's cache when its turn comes; one on the CPU."""
    n = 1 if device.type == "cpu" else 1 + int(CACHE_BYTES / n_bytes)
    return [make() for _ in range(n)]


def dense(name: str, shape: Shape, device: torch.device, *, dtype: torch.dtype) -> Product:
    def make() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return Product(name, dtype, F.linear, copies_of(make, read_bytes(name, shape), device))


def ours(name: str, shape: Shape, device: torch.device, **options: Any) -> Product:
    layer = our_linear(options["bits"])

    def make() -> torch.nn.Module:
        weight = random_weight(options["bits"], shape, options["group"], device)
        return layer(weight, options["dtype"])

    def multiply(x: Tensor, module: torch.nn.Module) -> Tensor:
        return module(x)

    copies = copies_of(make, read_bytes(name, shape), device)
    return Product(name, options["dtype"], multiply, copies)


def triton(name: str, shape: Shape, device: torch.device, **options: Any) -> Product:
    """Our Triton kernel; `tiles` overrides its rule."""
    from fasteagle.quant import triton_ops

    tiles = options.get("tiles")

    def multiply(x: Tensor, weight: Quantized) -> Tensor:
        if weight.zeros is None:
            return triton_ops.int8_product(x, weight.codes, weight.scales, tiles=tiles)
        arguments = (x, weight.codes, weight.scales, weight.zeros)
        return triton_ops.int4_product(*arguments, tiles=tiles)

    def make() -> Quantized:
        return random_weight(options["bits"], shape, options["group"], device)

    copies = options.get("copies") or copies_of(make, read_bytes(name, shape), device)
    return Product(name, options["dtype"], multiply, copies)


def int8pack(name: str, shape: Shape, device: torch.device) -> Product:
    weight = random_weight(8, shape, 32, device)
    held = (weight.codes, weight.scales[:, 0].contiguous())

    def multiply(x: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, *held)

    return Product(name, torch.bfloat16, multiply, [held])


def int4pack(name: str, shape: Shape, device: torch.device, *, group: int) -> Product:
    """The CPU's kernel, called as torch does: codes as int32, scales and zeros `[G, O, 2]`."""
    weight = random_weight(4, shape, group, device)
    values = unpack_int4(weight.codes, group).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    held = (packed, group, _pairs(weight))

    def multiply(x: Tensor, held: tuple[Any, ...]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, *held)

    return Product(name, torch.bfloat16, multiply, [held])


def tinygemm(name: str, shape: Shape, device: torch.device, *, group: int) -> Product:
    def make() -> tuple[Any, ...]:
        weight = random_weight(4, shape, group, device)
        packed = torch.ops.aten._convert_weight_to_int4pack(weight.codes, 8)
        return packed, group, _pairs(weight)

    def multiply(x: Tensor, held: tuple[Any, ...]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, *held)

    copies = copies_of(make, read_bytes(name, shape), device)
    return Product(name, torch.bfloat16, multiply, copies)


def _pairs(weight: Quantized) -> Tensor:
    assert weight.zeros is not None, "int4 weights have zeros"
    return torch.stack((weight.scales, weight.zeros), -1).transpose(0, 1).contiguous()


def _text(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
