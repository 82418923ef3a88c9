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

from fasteagle.quant.layout import Quantized
from fasteagle.quant.linear import QuantLinear

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


def products(shape: Shape, device: torch.device) -> list[Maker]:
    """The kernels of a device, each with a name that read_bytes understands."""
    bf16, fp16 = torch.bfloat16, torch.float16
    if device.type == "cpu":
        return cpu_products(shape)
    table = [("dense bf16", dense, {"dtype": bf16})]
    for g in (32, 128):
        table.append((f"int4.g{g} ours bf16", ours, {"bits": 4, "group": g}))
        table.append((f"int4.g{g} tinygemm bf16", tinygemm, {"group": g}))
    table.append(("int8 ours bf16", ours, {"bits": 8, "group": 32}))
    if importlib.util.find_spec("triton") is not None:
        for g in (32, 128):
            options = {"bits": 4, "group": g, "dtype": bf16}
            table.append((f"int4.g{g} triton bf16", triton, options))
        # int8 in bf16 is "ours"; fp16 takes the time of bf16 but for the conversion.
        table.append(("int4.g32 triton fp16", triton, {"bits": 4, "group": 32, "dtype": fp16}))
    return [
        Maker(name, partial(make, name, shape, device, **options)) for name, make, options in table
    ]


def cpu_products(shape: Shape) -> list[Maker]:
    """torch's kernels and our layers, which read the very same memory.

    Where a weight lies is worth 10 % of a product's time, more than what is looked for.
    """
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    eight, four = (
        QuantLinear(random_weight(bits, shape, OURS_GROUP, cpu), dtype=bf16, keep_dense=True)
        for bits in (8, 4)
    )
    eight.dense = four.dense
    scales = eight.scales[:, 0].contiguous()
    aten = torch.ops.aten
    table: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("dense bf16", lambda x: F.linear(x, four.dense)),
        ("int8pack bf16", lambda x: aten._weight_int8pack_mm(x, eight.codes, scales)),
        (
            f"int4pack.g{OURS_GROUP} bf16",
            lambda x: aten._weight_int4pack_mm_for_cpu(
                x, four.packed, OURS_GROUP, four.scales_zeros
            ),
        ),
        ("int8 ours bf16", eight),
        (f"int4.g{OURS_GROUP} ours bf16", four),
    ]
    return [
        Maker(name, partial(Product, name, bf16, lambda x, call: call(x), [call]))
        for name, call in table
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


def ours(name: str, shape: Shape, device: torch.device, *, bits: int, group: int) -> Product:
    """The package's own layer, whatever kernel it chooses."""
    bf16 = torch.bfloat16

    def make() -> QuantLinear:
        return QuantLinear(random_weight(bits, shape, group, device), dtype=bf16, device=device)

    copies = copies_of(make, read_bytes(name, shape), device)
    return Product(name, bf16, lambda x, layer: layer(x), copies)


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
