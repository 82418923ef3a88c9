"""How do our own quantized files look? One safetensors file beside the checkpoint it was made from.

`model_int4.g32.safetensors` holds every parameter by our names (families.py); a quantized matrix
`layers.0.mlp.down_proj` is `.qweight`, `.scales` and, in 4 bits, `.zeros` (layout.py), the others
are as in the source. The header says what it is; config.json beside it has a record of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fasteagle.config import CONFIGS, AnyConfig, QuantConfig, from_dict, kind_of, to_dict
from fasteagle.quant.layout import BITS, GROUP_SIZES, Quantized
from fasteagle.quant.packed import Part, Shape, check_finite

RECORDS = "fasteagle_quantized"  # in config.json: file name -> QuantConfig
HEADER = "fasteagle_quantization"  # in the file's header
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def file_name(quant: QuantConfig) -> str:
    """`model_int8.safetensors`, `model_int4.g32.safetensors`, `model_int4-gptq.g32.safetensors`."""
    if quant.bits == 8:
        return "model_int8.safetensors"
    gptq = "-gptq" if quant.method.startswith("gptq") else ""
    return f"model_int4{gptq}.g{quant.group_size}.safetensors"


def header(config: AnyConfig, quant: QuantConfig) -> dict[str, str]:
    """The metadata of a file's header: strings, as safetensors wants them."""
    whole = {"kind": kind_of(config), "config": to_dict(config), "quantization": asdict(quant)}
    return {HEADER: json.dumps(whole)}


def read_header(metadata: Mapping[str, str]) -> tuple[AnyConfig, QuantConfig]:
    """What `header` wrote; ValueError where it is damaged or of a newer version."""
    try:
        whole: dict[str, Any] = json.loads(metadata[HEADER])
        kind, values, quant = whole["kind"], whole["config"], whole["quantization"]
        return from_dict(CONFIGS[kind], values), QuantConfig(**quant)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"its header is damaged ({error}); quantize the checkpoint again"
        ) from error


def records_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The records in a config.json: file name -> QuantConfig as a dictionary."""
    records = stated.get(RECORDS) or {}
    if not isinstance(records, dict):
        raise ValueError(f"config.json's {RECORDS} is {records!r}; expected an object: remove it")  # noqa: TRY004
    return records


class Native:
    """The reader of our own files (see formats.Format)."""

    zero_bias = False

    def __init__(self, quant: QuantConfig, names: Collection[str]) -> None:
        if quant.bits not in BITS:
            raise ValueError(
                f"weights of {quant.bits} bits are not supported; expected 4 or 8: quantize again"
            )
        has_groups = any(name.endswith(".zeros") for name in names)
        if quant.group_size not in (GROUP_SIZES if has_groups else (0, *GROUP_SIZES)):
            raise ValueError(
                f"its header states group size {quant.group_size}; expected "
                f"{', '.join(map(str, GROUP_SIZES))}: quantize the checkpoint again"
            )
        self.group_size, self.names = quant.group_size, names
        self.name = f"fasteagle int{quant.bits} ({quant.method})"

    def holds(self, matrix: str, names: Container[str]) -> bool:
        """Whether the file has this matrix quantized."""
        return f"{matrix}.qweight" in names

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        """The tensors of a matrix `[O, I]`."""
        bits = 4 if f"{matrix}.zeros" in self.names else 8
        return parts(matrix, shape, bits=bits, group_size=self.group_size)

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        """The matrix; ValueError for a scale or zero that is NaN or infinite."""
        codes, scales = held[f"{matrix}.qweight"], held[f"{matrix}.scales"]
        zeros = held.get(f"{matrix}.zeros")
        for suffix, tensor in (("scales", scales), ("zeros", zeros)):
            if tensor is not None:
                check_finite(tensor, f"{matrix}.{suffix}")
        return Quantized(4 if zeros is not None else 8, codes, scales, zeros, shape[1])


def parts(matrix: str, shape: Shape, *, bits: int, group_size: int) -> dict[str, Part]:
    """The tensors that hold a matrix `[O, I]`; of the dtypes, the first is the one we write."""
    n_outputs, n_inputs = shape
    if bits == 8:
        codes = {f"{matrix}.qweight": Part(shape, (torch.int8,))}
        return codes | {f"{matrix}.scales": Part((n_outputs, 1), FLOATS)}
    n_groups = -(-n_inputs // group_size)
    per_group = Part((n_outputs, n_groups), FLOATS)
    codes = {f"{matrix}.qweight": Part((n_outputs, n_groups * group_size // 2), (torch.uint8,))}
    return codes | {f"{matrix}.scales": per_group, f"{matrix}.zeros": per_group}
