"""How do quantized Hugging Face checkpoints store a matrix? GPTQ, AWQ and compressed-tensors.

    O outputs  I inputs  g group size  G groups of a row, I / g rounded up

`format_of` reads config.json's quantization_config; a `Format` then names the tensors that stand
for a matrix and turns them into a `Quantized`. Which matrices of a file are quantized is what the
file holds (`Format.holds`), so the lists modules_to_not_convert and ignore are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fasteagle.hf_config import flag
from fasteagle.quant.compressed import compressed
from fasteagle.quant.layout import Quantized
from fasteagle.quant.packed import (
    HALVES,
    INT32,
    Part,
    Shape,
    check_bits,
    check_finite,
    fills_words,
    from_points,
    group_order,
    n_groups_of,
    nibbles,
    stated_group_size,
)

__all__ = ["Format", "Part", "Shape", "format_of"]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # AWQ's nibble of the outputs 0..7 of a word


class Format(Protocol):
    """How one kind of file stores a matrix of shape `[O, I]`, which is a name without .weight."""

    @property
    def name(self) -> str:
        """For messages: "GPTQ"."""

    def holds(self, matrix: str, names: Container[str]) -> bool:
        """Whether a file of these tensors has the matrix quantized; if not, it is a .weight."""

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        """The tensors that stand for the matrix, by their full names."""

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        """The matrix, of those of its `tensors` that the file holds."""

    @property
    def zero_bias(self) -> bool:
        """Whether writers add a .bias, all 0, to matrices that have none."""


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that config.json's quantization_config states; ValueError if it is not known."""
    method = config.get("quant_method")
    if method not in READERS:
        raise ValueError(
            f"quant_method is {method!r}; expected {', '.join(READERS)}, or an unquantized model"
        )
    return READERS[method](config)


@dataclass(frozen=True)
class GPTQ:
    """AutoGPTQ's and GPTQModel's files, versions 1 and 2.

    qweight [I / 8, O]  nibble k of word [i, o] is the code of input 8 i + k
    qzeros  [G, O / 8]  nibble k of word [a, i] is the zero point of output 8 i + k, less 1 in
                        version 1: stored 7 -> 8, 15 -> 0
    g_idx   [I]         the group of each input, in any order after desc_act (act-order)
    """

    group_size: int | None  # None: one group a row
    version: int
    desc_act: bool
    name: str = "GPTQ"
    zero_bias: bool = True  # AutoGPTQ's

    def holds(self, matrix: str, names: Container[str]) -> bool:
        return f"{matrix}.qweight" in names

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        n_out, n_in = fills_words(matrix, shape)
        n_groups = n_groups_of(shape, self.group_size)
        return {
            f"{matrix}.qweight": Part((n_in // 8, n_out), INT32),
            f"{matrix}.qzeros": Part((n_groups, n_out // 8), INT32),
            f"{matrix}.scales": Part((n_groups, n_out), HALVES),
            f"{matrix}.g_idx": Part((n_in,), INT32, optional=not self.desc_act),
        }

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        g, order = self.group_size or shape[1], None
        if f"{matrix}.g_idx" in held:
            order = group_order(held[f"{matrix}.g_idx"], group_size=g, name=f"{matrix}.g_idx")
        codes = nibbles(held[f"{matrix}.qweight"].T).reshape(shape)
        points = nibbles(held[f"{matrix}.qzeros"]).T
        if self.version == 1:
            points = (points + 1) & 15
        scales = check_finite(held[f"{matrix}.scales"], f"{matrix}.scales").T
        if order is not None:
            codes = codes[:, order]
        return from_points(codes, scales, points, group_size=g, order=order)


def _gptq(config: Mapping[str, Any]) -> GPTQ:
    check_bits(config, "bits", method="GPTQ")
    stated = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stated not in ("gptq", "gptq_v2"):
        raise ValueError(f"GPTQ's checkpoint_format is {stated!r}; expected gptq or gptq_v2")
    if config.get("is_marlin_format") or config.get("dynamic"):
        field = "is_marlin_format" if config.get("is_marlin_format") else "dynamic"
        raise ValueError(f"GPTQ's field {field} is set; expected one plain layout for every layer")
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"GPTQ's pack_dtype is {config['pack_dtype']!r}; expected int32")
    size = stated_group_size(config, "group_size")
    act = flag(config, "desc_act", default=False)
    return GPTQ(size, version=2 if stated == "gptq_v2" else 1, desc_act=act)


@dataclass(frozen=True)
class AWQ:
    """AutoAWQ's files of version "gemm".

    qweight [I, O / 8]  nibble AWQ_ORDER[k] of word [i, j] is the code of output 8 j + k, so the
                        nibbles of a word are outputs 0 2 4 6 1 3 5 7
    qzeros  [G, O / 8]  zero points, in the same order
    scales  [G, O]
    """

    group_size: int | None
    name: str = "AWQ"
    zero_bias: bool = False

    def holds(self, matrix: str, names: Container[str]) -> bool:
        return f"{matrix}.qweight" in names

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        n_out, n_in = fills_words(matrix, shape)
        n_groups = n_groups_of(shape, self.group_size)
        return {
            f"{matrix}.qweight": Part((n_in, n_out // 8), INT32),
            f"{matrix}.qzeros": Part((n_groups, n_out // 8), INT32),
            f"{matrix}.scales": Part((n_groups, n_out), HALVES),
        }

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        codes = _in_order(held[f"{matrix}.qweight"]).T
        points = _in_order(held[f"{matrix}.qzeros"]).T
        scales = check_finite(held[f"{matrix}.scales"], f"{matrix}.scales").T
        return from_points(codes, scales, points, group_size=self.group_size or shape[1])


def _in_order(words: Tensor) -> Tensor:
    """AWQ's words `[X, O / 8]` -> values `[X, O]` uint8."""
    return nibbles(words).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)


def _awq(config: Mapping[str, Any]) -> AWQ:
    check_bits(config, "bits", "w_bit", method="AWQ")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"AWQ's version is {version!r}; expected gemm")
    if not flag(config, "zero_point", default=True):
        raise ValueError("AWQ's zero_point is false; expected a file with zero points")
    return AWQ(stated_group_size(config, "group_size", "q_group_size"))


READERS: dict[Any, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed,
}
