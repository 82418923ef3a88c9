"""Small random checkpoints in every layout that Hugging Face folders come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

C, V, L, Q, KV, INNER = 16, 24, 3, 16, 8, 20
TARGET: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": C,
    "intermediate_size": INNER,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
HEAD = TARGET | {"num_hidden_layers": 1, "bias": True}
LAYOUTS = ("one.safetensors", "shards.safetensors", "one.bin", "shards.bin", "legacy.bin")
Tensors = dict[str, Tensor]


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}self_attn.q_proj.weight": (Q, C),
        f"{prefix}self_attn.k_proj.weight": (KV, C),
        f"{prefix}self_attn.v_proj.weight": (KV, C),
        f"{prefix}self_attn.o_proj.weight": (C, Q),
        f"{prefix}mlp.gate_proj.weight": (INNER, C),
        f"{prefix}mlp.up_proj.weight": (INNER, C),
        f"{prefix}mlp.down_proj.weight": (C, INNER),
        f"{prefix}post_attention_layernorm.weight": (C,),
    }


def target_tensors(*, tied: bool = False) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
    for index in range(L):
        shapes |= layer_shapes(f"model.layers.{index}.")
        shapes[f"model.layers.{index}.input_layernorm.weight"] = (C,)
    shapes["model.norm.weight"] = (C,)
    return random_tensors(shapes if tied else shapes | {"lm_head.weight": (V, C)})


def head_shapes() -> dict[str, tuple[int, ...]]:
    return {"fc.weight": (C, 2 * C), "fc.bias": (C,)} | layer_shapes("layers.0.")


def head_tensors() -> Tensors:
    return random_tensors(head_shapes(), seed=1)


def fused(tensors: Tensors, layers: list[str], prefix: str = "") -> Tensors:
    """The slow twin: our parameters, by plain concatenation."""
    ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for layer in layers:
        parts = [ours.pop(f"{layer}self_attn.{n}_proj.weight") for n in "qkv"]
        ours[f"{layer}self_attn.qkv_proj.weight"] = torch.cat(parts)
        parts = [ours.pop(f"{layer}mlp.{n}_proj.weight") for n in ("gate", "up")]
        ours[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(parts)
    return ours


def fused_target(tensors: Tensors) -> Tensors:
    return fused(tensors, [f"layers.{index}." for index in range(L)], prefix="model.")


def write(folder: Path, config: dict[str, Any], tensors: Tensors, layout: str = LAYOUTS[0]) -> Path:
    """Write a Hugging Face folder in one of LAYOUTS; shards split every layer somewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, suffix = layout.split(".")
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def save(part: Tensors, name: str) -> None:
        if suffix == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            zipped = kind != "legacy"
            torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)

    if kind != "shards":
        save(tensors, f"{stem}.{suffix}")
        return folder
    names = list(tensors)
    shards = [f"{stem}-{index + 1:05}-of-00003.{suffix}" for index in range(3)]
    weight_map = {name: shards[index % 3] for index, name in enumerate(names)}
    for shard in shards:
        save({name: tensors[name] for name in names if weight_map[name] == shard}, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def everything(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder: None for a folder in it."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
