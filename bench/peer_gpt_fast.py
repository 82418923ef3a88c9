"""How do the workers of peers.py run gpt-fast? Its model and generate functions, from a checkout.

Weights are read from a Hugging Face folder in the layout that its convert script makes. Compiled
as its `--compile`: the decoding of one token, mode reduce-overhead, fullgraph; prefill is not (its
--compile_prefill is a flag of its own). Greedy as temperature 0, without top-k.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# The newest commit that attends by SDPA. Later ones need flex_attention, whose CPU template
# takes apart only queries of four dimensions (torch 2.13) and is slower here once it is made to.
LAST_SDPA = "32971d3"
LAYER = {  # Hugging Face's name of a layer's weight, gpt-fast's; q, k and v become one
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def model_args(model: ModuleType, config: dict[str, Any]) -> Any:
    """Its ModelArgs of a config.json; ValueError for what it does not compute."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if config.get("rope_scaling") or config.get("head_dim", head_dim) != head_dim:
        raise ValueError("this worker gives gpt-fast models of plain RoPE and head_dim only")
    return model.ModelArgs(
        block_size=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_local_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        dim=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        rope_base=config.get("rope_theta", 10000.0),
        norm_eps=config["rms_norm_eps"],
    )


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows `[H * D, C]` from halves, as Hugging Face rotates, to neighbours, as gpt-fast does.

    One head, D = 4: rows 0 1 2 3 -> 0 2 1 3.
    """
    halves = weight.view(n_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def weights(folder: Path, sizes: Any) -> dict[str, Tensor]:
    """A Hugging Face folder's tensors by gpt-fast's names."""
    read: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        read |= load_file(path)
    if not read:
        raise FileNotFoundError(f"{folder} has no *.safetensors; convert it")
    embedding = read["model.embed_tokens.weight"]
    found = {
        "tok_embeddings.weight": embedding,
        "output.weight": read.get("lm_head.weight", embedding),
        "norm.weight": read["model.norm.weight"],
    }
    for n in range(sizes.n_layer):
        theirs, ours = f"model.layers.{n}.", f"layers.{n}."
        q, k, v = (read[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv")
        joined = [interleaved(q, sizes.n_head), interleaved(k, sizes.n_local_heads), v]
        found[f"{ours}attention.wqkv.weight"] = torch.cat(joined)
        found |= {
            f"{ours}{to}.weight": read[f"{theirs}{name}.weight"] for name, to in LAYER.items()
        }
    return found


def load(args: argparse.Namespace) -> Callable[[list[int], int], dict[str, Any]]:
    sys.path.insert(0, args.gpt_fast)
    # Its tokenizers, which no token id needs, ask for packages of their own.
    sys.modules["tokenizer"] = ModuleType("tokenizer")
    sys.modules["tokenizer"].get_tokenizer = None  # type: ignore[attr-defined]
    code: Any = import_module("generate")
    model = import_module("model")
    if args.device == "cpu" and hasattr(model, "flex_attention"):
        raise ValueError(
            f"this checkout attends by flex_attention, which torch {torch.__version__} does not "
            f"compile for it on the CPU; run git checkout {LAST_SDPA} there"
        )
    folder = Path(args.base)
    sizes = model_args(model, json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        target = model.Transformer(sizes)
    target.load_state_dict(weights(folder, sizes), assign=True)
    target = target.to(device=args.device, dtype=args.torch_dtype).eval()
    code.decode_one_token = torch.compile(
        code.decode_one_token, mode="reduce-overhead", fullgraph=True
    )

    def generate(prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        ids = torch.tensor(prompt, dtype=torch.int, device=args.device)
        found, _ = code.generate(
            target,
            ids,
            max_new_tokens,
            batch_size=1,
            interactive=False,
            draft_model=None,
            temperature=0.0,
        )
        return {"tokens": found[0, len(prompt) :].tolist()}

    return generate
