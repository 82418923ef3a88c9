"""How do parameters that were read become the layers of a model?

A quantized matrix takes the place of a dense layer: as a QuantLinear in 16 bits, dequantized in
float32, where no kernel is faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fasteagle.experts import ExpertLinear
from fasteagle.families import EMBEDDING, LM_HEAD
from fasteagle.model import Linear
from fasteagle.parameters import Parameter
from fasteagle.quant.experts import QuantExperts, stack_experts
from fasteagle.quant.layout import Quantized, dequantize
from fasteagle.quant.linear import QuantLinear, Stacked
from fasteagle.quant.rounding import quantize

Model = TypeVar("Model", bound=nn.Module)


def fill(
    model: Model,
    parameters: Iterable[tuple[str, Parameter]],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    keep_dense: bool,
) -> Model:
    """Give a model on the meta device its parameters, in `dtype`, and make it ready to decode.

    keep_dense: QuantLinear's.
    """
    state = {}
    for name, value in parameters:
        if isinstance(value, Tensor):
            state[name] = value.to(device)
        elif dtype == torch.float32:
            _ensure_layer(model, name)
            state[name] = _dense(value).to(device)
        else:
            _replace(model, name, value, dtype=dtype, device=device, keep_dense=keep_dense)
            for index, part in enumerate(value if isinstance(value, list) else []):
                if isinstance(part, Tensor):  # of a Stacked layer
                    state[f"{name.removesuffix('.weight')}.parts.{index}.weight"] = part.to(device)
    model.load_state_dict(state, assign=True, strict=True)
    model.to(device).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ExpertLinear):
            module.choose_kernel()
    return model


def quantize_(
    model: Model,
    *,
    bits: int,
    group_size: int = 32,
    lm_head_bits: int | None = None,
    keep_dense: bool = False,
) -> Model:
    """Round a loaded 16-bit model's matrices to nearest, in place; embeddings stay.

    lm_head_bits None takes `bits`. For weights in memory; `fasteagle quantize` makes files.
    """
    # Names only: a list of layers would keep every replaced one in memory.
    kinds = (Linear, ExpertLinear)
    for name in [name for name, part in model.named_modules() if isinstance(part, kinds)]:
        layer = model.get_submodule(name)
        if isinstance(layer, kinds):
            weight = layer.weight
            chosen = bits if name != "lm_head" else lm_head_bits or bits
            made = quantize(weight, bits=chosen, group_size=group_size)
            _replace(
                model,
                f"{name}.weight",
                made,
                dtype=weight.dtype,
                device=weight.device,
                keep_dense=keep_dense,
            )
            new = model.get_submodule(name)
            if isinstance(layer, Linear) and layer.bias is not None:
                new.load_state_dict({"bias": layer.bias})
    return model


def _dense(value: Quantized | list[Tensor | Quantized]) -> Tensor:
    if isinstance(value, Quantized):
        return dequantize(value)
    return torch.cat([part if isinstance(part, Tensor) else dequantize(part) for part in value])


def _ensure_layer(model: nn.Module, name: str) -> None:
    """Tied embeddings with an lm_head of its own precision: that makes it a layer of its own."""
    if name == LM_HEAD and getattr(model, "lm_head", None) is None:
        n_outputs, n_inputs = model.get_parameter(EMBEDDING).shape
        with torch.device("meta"):
            model.lm_head = Linear(n_inputs, n_outputs, bias=False)


def _replace(
    model: nn.Module,
    name: str,
    value: Quantized | list[Tensor | Quantized],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    keep_dense: bool,
) -> None:
    """Put a quantized layer in the place of the dense one that has the parameter `name`."""
    _ensure_layer(model, name)
    path = name.removesuffix(".weight")
    old = model.get_submodule(path)
    bias = getattr(old, "bias", None) is not None
    # A draft vocabulary takes its rows of the lm_head from the codes.
    keep_codes = name == LM_HEAD

    def layer(part: Tensor | Quantized, bias: bool) -> Linear | QuantLinear:
        if isinstance(part, Quantized):
            return QuantLinear(
                part,
                bias=bias,
                dtype=dtype,
                device=device,
                keep_dense=keep_dense,
                keep_codes=keep_codes,
            )
        with torch.device("meta"):
            return Linear(part.shape[1], part.shape[0], bias=bias)

    new: nn.Module
    if isinstance(old, ExpertLinear):
        new = _experts(name, value, old.n_experts, dtype=dtype, device=device, keep=keep_dense)
    elif isinstance(value, Quantized):
        new = layer(value, bias)
    else:
        new = Stacked([layer(part, False) for part in value], bias=bias, dtype=dtype)
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def _experts(
    name: str,
    value: Quantized | list[Tensor | Quantized],
    n_experts: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    keep: bool,
) -> QuantExperts:
    orders = None
    if not isinstance(value, Quantized):
        parts = [part for part in value if isinstance(part, Quantized)]
        assert len(parts) == len(value), f"{name} has dense experts, which opening it refuses"
        try:
            value, orders = stack_experts(parts, n_experts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return QuantExperts(
        value, n_experts, orders=orders, dtype=dtype, device=device, keep_dense=keep
    )
