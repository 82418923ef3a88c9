"""What does a tiny Mixtral checkpoint hold, in both layouts?

E experts  C model dim  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import full_pass
from hf_folders import Tensors, random_tensors
from quant_files import CONFIG, hf_shapes
from torch import Tensor

from fasteagle.model import Transformer

MIXTRAL: dict[str, Any] = CONFIG | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "torch_dtype": "float32",
}
E, V, C = 4, MIXTRAL["vocab_size"], MIXTRAL["hidden_size"]
MOE = "model.layers.{}.block_sparse_moe."
WINDOWS = torch.randint(V, (6, 20), generator=torch.Generator().manual_seed(5))


def mixtral_tensors(seed: int = 0) -> Tensors:
    tensors = random_tensors(hf_shapes(MIXTRAL), seed)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensor.mul_((3.0 if "self_attn" in name else 1.0) / tensor.shape[-1] ** 0.5)
    return tensors


def fused(tensors: Tensors) -> Tensors:
    """The layout that transformers 5 computes with, by plain loops."""
    left = dict(tensors)
    for index in range(MIXTRAL["num_hidden_layers"]):
        old, new = MOE.format(index), f"model.layers.{index}.mlp."
        matrices = [
            [left.pop(f"{old}experts.{e}.{name}.weight") for name in ("w1", "w3", "w2")]
            for e in range(E)
        ]
        left[f"{new}gate.weight"] = left.pop(f"{old}gate.weight")
        left[f"{new}experts.gate_up_proj"] = torch.stack(
            [torch.cat((gate, up)) for gate, up, _ in matrices]
        )
        left[f"{new}experts.down_proj"] = torch.stack([down for _, _, down in matrices])
    return left


WRITERS: dict[str, Callable[[Tensors], Tensors]] = {"mixtral": dict, "fused": fused}


def logits_of(target: Transformer, tokens: list[int]) -> Tensor:
    return target.logits(full_pass(target, tokens))[0]
