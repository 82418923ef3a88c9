"""EAGLE-3 heads in every layout that their files come in, and what they say in plain products.

A head is computed over the whole text for every node, from the paper.

S tokens  C head dim  F feature dim
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import BUSHY, full_pass, tiny_target
from hf_folders import Tensors, random_tensors, write
from scripted_drafters import VOCAB
from torch import Tensor

from fasteagle.model import Transformer

N_LAYERS, DIM, KEPT = 8, 32, 12  # of the target; tokens of the draft vocabulary
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "vocab_size": VOCAB,
    "draft_vocab_size": KEPT,
    "hidden_size": DIM,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
IDS = [0, 1, 3, 4, 6, 7, 9, 11, 13, 14, 17, 19]  # what the draft vocabulary keeps


def target() -> Transformer:
    return tiny_target(n_layers=N_LAYERS)


# ------------------------------------------------------------------------ what a file may hold


def layer_shapes(prefix: str, dim: int, width: int, *, first: bool) -> dict[str, tuple[int, ...]]:
    kv, norms = dim // 2, ["input_layernorm", "post_attention_layernorm"]
    return {
        **{f"{prefix}{name}.weight": (dim,) for name in norms + ["hidden_norm"] * first},
        f"{prefix}self_attn.q_proj.weight": (dim, width),
        f"{prefix}self_attn.k_proj.weight": (kv, width),
        f"{prefix}self_attn.v_proj.weight": (kv, width),
        f"{prefix}self_attn.o_proj.weight": (dim, dim),
        f"{prefix}mlp.gate_proj.weight": (24, dim),
        f"{prefix}mlp.up_proj.weight": (24, dim),
        f"{prefix}mlp.down_proj.weight": (dim, 24),
    }


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Random ones: norms around 1, matrices that mix well."""
    made = random_tensors(shapes, seed=5)
    return {
        name: 1 + 0.2 * tensor if "norm" in name else tensor * (2 / tensor.shape[-1] ** 0.5)
        for name, tensor in made.items()
    }


def official(dim: int = DIM, n_features: int = 3) -> Tensors:
    """What EAGLE's own training writes."""
    shapes = {
        "fc.weight": (dim, n_features * DIM),
        **layer_shapes("midlayer.", dim, 2 * dim, first=True),
        "norm.weight": (dim,),
        "lm_head.weight": (KEPT, dim),
    }
    kept = torch.tensor(IDS)
    maps = {"d2t": kept - torch.arange(KEPT), "t2d": torch.isin(torch.arange(VOCAB), kept)}
    return tensors_of(shapes) | maps


def more(name: str, *shape: int) -> Tensors:
    return tensors_of({name: shape})


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def renamed(old: str, new: str) -> Tensors:
    return {name.replace(old, new, 1): tensor for name, tensor in official().items()}


def plain_vocab(tensors: Tensors | None = None) -> Tensors:
    """Without a draft vocabulary and an lm_head."""
    return without(tensors or official(), "lm_head.weight", "d2t", "t2d")


# --------------------------------------------------------------------------------- the slow twin


@dataclass
class Case:
    """A file, and what it means."""

    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)
    layout: str = "one.bin"
    layers: tuple[int, ...] = (2, N_LAYERS // 2, N_LAYERS - 3)  # whose inputs are the features
    normed_residual: bool = False
    norm_output: bool = False
    theta: float = 1e4

    def write(self, folder: Path) -> Path:
        return write(folder, CONFIG | self.config, self.tensors, self.layout)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


class SlowHead:
    """A head over a whole text, as the paper has it."""

    def __init__(self, case: Case) -> None:
        names = {
            n: n.removeprefix("model.").replace("midlayer.", "layers.0.") for n in case.tensors
        }
        self.case, self.t = case, {names[name]: tensor for name, tensor in case.tensors.items()}

    def embed(self, tokens: list[int]) -> Tensor:
        table = self.t.get("embed_tokens.weight", target().embed_tokens.weight)
        return torch.stack([table[token] for token in tokens])

    def project(self, features: list[Tensor]) -> Tensor:
        """Features `[S, F / 3]` of each layer -> `[S, C]`."""
        if "fc_norm.0.weight" in self.t:
            features = [rms(x, self.t[f"fc_norm.{n}.weight"]) for n, x in enumerate(features)]
        x = torch.cat(features, 1)
        if "input_norm.weight" in self.t:
            x = rms(x, self.t["input_norm.weight"])
        return x @ self.t["fc.weight"].T + self.t.get("fc.bias", torch.zeros(1))

    def run(self, embedded: Tensor, states: Tensor) -> Tensor:
        """embedded, states `[S, C]` -> what is fed back, `[S, C]`."""
        layer = "layers.0."
        normed = rms(states, self.t[layer + "hidden_norm.weight"])
        wide = torch.cat((rms(embedded, self.t[layer + "input_layernorm.weight"]), normed), 1)
        x = self.block(layer, wide, normed if self.case.normed_residual else states)
        for index in range(1, self.case.config.get("num_hidden_layers") or 1):
            layer = f"layers.{index}."
            x = self.block(layer, rms(x, self.t[layer + "input_layernorm.weight"]), x)
        return rms(x, self.t["norm.weight"]) if self.case.norm_output else x

    def block(self, layer: str, x: Tensor, residual: Tensor) -> Tensor:
        q, k, v = (x @ self.t[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv")
        dim = q.shape[1] // 4
        mixed = []
        for head, one in enumerate(q.split(dim, 1)):
            keys, values = (part.split(dim, 1)[head // 2] for part in (k, v))
            scores = self.turn(one) @ self.turn(keys).T / dim**0.5
            unseen = torch.ones_like(scores).triu(1).bool()
            mixed.append(scores.masked_fill(unseen, -torch.inf).softmax(1) @ values)
        y = residual + torch.cat(mixed, 1) @ self.t[f"{layer}self_attn.o_proj.weight"].T
        z = rms(y, self.t[f"{layer}post_attention_layernorm.weight"])
        gate, up = (z @ self.t[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        return y + (gate * gate.sigmoid() * up) @ self.t[f"{layer}mlp.down_proj.weight"].T

    def turn(self, x: Tensor) -> Tensor:
        """RoPE by complex numbers: x `[S, D]` at positions 0, 1, ..."""
        half = x.shape[1] // 2
        speeds = self.case.theta ** (-torch.arange(half) / half)
        angles = torch.arange(len(x))[:, None] * speeds
        unit = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[:, :half], x[:, half:]) * unit
        return torch.cat((turned.real, turned.imag), 1)

    def ranked(self, state: Tensor) -> list[int]:
        """Tokens after a state `[C]`, likeliest first."""
        x = state if self.case.norm_output else rms(state, self.t["norm.weight"])
        tied = self.case.config.get("tie_word_embeddings")
        table = self.t.get("embed_tokens.weight", target().embed_tokens.weight)
        table = self.t.get("lm_head.weight", table if tied else target().lm_head.weight)
        order = (table @ x).argsort(descending=True).tolist()
        return [IDS[guess] for guess in order] if "d2t" in self.t else order

    def tree(self, features: list[Tensor], tokens: list[int]) -> list[int]:
        """The tokens of BUSHY after a text, whose last token is the root."""
        seen, embedded = self.project(features), self.embed(tokens[1:])
        made = {0: (tokens[1:], self.run(embedded, seen))}
        guesses = [tokens[-1]]
        for node in range(1, BUSHY.n_nodes):
            spelled, states = made[BUSHY.parents[node]]
            guesses.append(self.ranked(states[-1])[BUSHY.rank[node]])
            spelled = [*spelled, guesses[-1]]
            rows = torch.cat((seen, states[len(seen) - 1 :]))
            made[node] = spelled, self.run(self.embed(spelled), rows)
        return guesses


def inputs_of_layers(tokens: list[int]) -> list[Tensor]:
    """The inputs of all target layers, and the output of the last, `[S, C]` each."""
    inputs: list[Tensor] = []
    model = target()
    hooks = [
        part.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
        for part in (*model.layers, model.norm)
    ]
    full_pass(model, tokens)
    for hook in hooks:
        hook.remove()
    return inputs
