"""How much memory do a checkpoint's weights take, and in which precision would they fit?

Headers only: nothing is read, so that a model that is too large is refused before it is loaded.
"""

from __future__ import annotations

import torch

from fasteagle.config import ModelConfig
from fasteagle.expert_names import ROUTER
from fasteagle.families import EMBEDDING, LM_HEAD, Weight
from fasteagle.memory import free_memory, size_text
from fasteagle.quant.kernels import (
    CPU_INT4,
    CPU_INT8,
    DENSE,
    TINYGEMM,
    TRITON,
    Range,
    expert_kernels,
    kernels,
)
from fasteagle.quant.native import Native
from fasteagle.source import Checkpoint, Config, matrix_of, packed_matrices, tensors_of

QUANTIZE = "fasteagle quantize --mode"
# What a user may do, from the most precise: flags, bits, group size.
MODES = (
    (f"{QUANTIZE} int8", 8, 0),
    (f"{QUANTIZE} int4 --groupsize 32", 4, 32),
    (f"{QUANTIZE} int4 --groupsize 128", 4, 128),
)


def is_expert(config: Config, name: str) -> bool:
    """Whether a parameter holds the matrices of a layer's experts."""
    has_experts = isinstance(config, ModelConfig) and config.n_experts > 0
    return has_experts and ".mlp." in name and not name.endswith(ROUTER)


def is_quantizable(weight: Weight) -> bool:
    """Whether a parameter is a matrix that our quantizers round."""
    other = weight.name == EMBEDDING or weight.name.endswith(ROUTER)
    return len(weight.shape) == 2 and not other


def kernels_of(
    config: Config, name: str, bits: int, *, device: torch.device, dtype: torch.dtype
) -> list[Range]:
    """Who multiplies by a quantized parameter; see kernels.py."""
    find = expert_kernels if is_expert(config, name) else kernels
    return find(bits, device=device, dtype=dtype)


def keeps_dense(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether quantized layers keep a 16-bit copy for products of many rows.

    On the CPU, where unpacking takes longer than the product, and if half of the free memory holds
    the copies.
    """
    if device.type != "cpu":
        return False
    n_weights = sum(
        torch.Size(shape).numel()
        for weight in checkpoint.plan
        for source, shape in zip(weight.sources, weight.shapes, strict=True)
        if matrix_of(source, checkpoint.weights, checkpoint.packed)
    )
    return n_weights * 2 <= free_memory(device) / 2


def loaded_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, keep_dense: bool
) -> int:
    """Bytes of a checkpoint's weights in memory, with what its kernels want besides the codes."""
    packed, config, total = packed_matrices(checkpoint), checkpoint.config, 0
    for weight in checkpoint.plan:
        dense = torch.Size(weight.shape).numel() * dtype.itemsize
        bits = packed.get(weight.name.removesuffix(".weight"))
        if bits is None or dtype == torch.float32:
            total += dense
        else:
            stored = _stored_bytes(checkpoint, weight)
            ranges = kernels_of(config, weight.name, bits, device=device, dtype=dtype)
            copies = _copies(ranges, keep_dense=keep_dense and weight.name != LM_HEAD)
            total += copies * stored + (dense if keep_dense else 0)
    return total


def scratch_bytes(checkpoint: Checkpoint, dtype: torch.dtype, *, keep_dense: bool) -> int:
    """Bytes of the largest matrix that a product of many rows dequantizes first; 0 if none does."""
    if dtype == torch.float32 or keep_dense:
        return 0
    packed, config = packed_matrices(checkpoint), checkpoint.config
    largest = 0
    for weight in checkpoint.plan:
        if weight.name.removesuffix(".weight") in packed:
            size = torch.Size(weight.shape).numel() * dtype.itemsize
            if isinstance(config, ModelConfig) and is_expert(config, weight.name):
                size //= config.n_experts  # one at a time
            largest = max(largest, size)
    return largest


def smaller(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """What a user may do instead of loading in `dtype`, and the bytes of the weights then."""
    found: dict[str, int] = {}
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    if dtype == torch.float32:
        found["--dtype bfloat16"] = loaded_bytes(checkpoint, half, device, keep_dense=False)
    if checkpoint.packed is not None:
        return found
    for name, bits, group_size in MODES:
        try:
            found[name] = sum(
                _rounded_bytes(checkpoint.config, weight, bits, group_size, half, device)
                for weight in checkpoint.plan
            )
        except ValueError:  # no kernel here, so it is nothing to advise
            continue
    return found


def check_room(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, keep_dense: bool
) -> None:
    """ValueError if the weights alone are larger than the device's free memory."""
    needed = loaded_bytes(checkpoint, dtype, device, keep_dense=keep_dense)
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"{checkpoint.folder}: the weights take {size_text(needed)} in memory, and {device} "
            f"has {size_text(free)} free; {advice(smaller(checkpoint, dtype, device), free)}"
        )


def advice(options: dict[str, int], room: float) -> str:
    """Which of `smaller`'s options fits, in words."""
    for name, needed in options.items():
        if needed <= room:
            return f"they fit with {name} ({size_text(needed)})"
    if not options:
        return "use a device with more memory"
    name, needed = list(options.items())[-1]
    return f"not even {name} would fit ({size_text(needed)}): use a device with more memory"


def _rounded_bytes(
    config: Config,
    weight: Weight,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Bytes of a parameter once a quantizer's defaults have rounded it."""
    count = torch.Size(weight.shape).numel()
    if not is_quantizable(weight):
        return count * dtype.itemsize
    bits = 8 if weight.name == LM_HEAD else bits
    ranges = kernels_of(config, weight.name, bits, device=device, dtype=dtype)
    scales = weight.shape[0] * 2 if bits == 8 else count // group_size * 4
    return _copies(ranges, keep_dense=False) * (count * bits // 8 + scales)


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
