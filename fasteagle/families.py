"""Which Hugging Face architectures are known, and what are their config fields and weights called?

To add a family, add a row to FAMILIES.

V vocabulary  C model dim  H query heads  G kv heads  D head dim
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.expert_names import expert_sources
from fasteagle.hf_config import (
    WindowKind,
    count,
    dtype_name,
    experts,
    flag,
    number,
    optional_count,
    rope,
    token_ids,
    window,
)

Shape = tuple[int, ...]
EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"  # of our parameters


@dataclass(frozen=True)
class Family:
    """What one Hugging Face architecture adds to the plain LLaMA block."""

    covers: str
    qkv_bias: bool = False  # q, k and v always have a bias
    attention_bias: bool = False  # the config field attention_bias adds one to q, k, v and o
    mlp_bias: bool = False  # the config field mlp_bias adds one to gate, up and down
    qk_norm: bool = False
    window: WindowKind = "none"  # what sliding_window applies to
    head_dim: int | None = None  # when the config leaves it out; None is hidden_size / heads
    rope_theta: float = 10000.0  # when the config leaves it out
    experts: tuple[int, int] = (0, 0)  # all and a token's, when the config leaves them out


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "LLaMA 1, 2, 3, 3.1, 3.2 and Vicuna", attention_bias=True, mlp_bias=True
    ),
    "MistralForCausalLM": Family("Mistral 7B", window="all layers"),
    "MixtralForCausalLM": Family(
        "Mixtral", window="all layers if stated", rope_theta=1e6, experts=(8, 2)
    ),
    "Qwen2ForCausalLM": Family("Qwen2 and Qwen2.5", qkv_bias=True, window="by layer"),
    "Qwen3ForCausalLM": Family(
        "Qwen3, dense", attention_bias=True, qk_norm=True, window="by layer", head_dim=128
    ),
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, as transformers 4 or 5 wrote it."""
    architecture = _architecture(hf)
    family = FAMILIES[architecture]
    refuse_unsupported(hf)
    dim, n_heads = count(hf, "hidden_size"), count(hf, "num_attention_heads")
    n_layers = count(hf, "num_hidden_layers")
    max_positions = count(hf, "max_position_embeddings", "max_sequence_length")
    theta, scaling = rope(hf, max_positions, absent=family.rope_theta)
    attention_bias = family.attention_bias and flag(hf, "attention_bias", default=False)
    mlp_bias = family.mlp_bias and flag(hf, "mlp_bias", default=False)
    n_experts, n_experts_per_token = experts(hf, absent=family.experts)
    if n_experts and mlp_bias:
        raise ValueError("mlp_bias is true, and experts with biases are not supported")
    return ModelConfig(
        architecture=architecture,
        vocab_size=count(hf, "vocab_size"),
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=kv_heads_of(optional_count(hf, "num_key_value_heads") or n_heads, n_heads),
        head_dim=head_dim_of(hf, dim, n_heads, absent=family.head_dim),
        intermediate_size=count(hf, "intermediate_size"),
        max_positions=max_positions,
        norm_eps=number(hf, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=flag(hf, "tie_word_embeddings", default=False),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        n_experts=n_experts,
        n_experts_per_token=n_experts_per_token,
        sliding_window=window(hf, family.window, n_layers=n_layers, max_positions=max_positions),
        bos_id=next(iter(token_ids(hf, "bos_token_id")), None),
        eos_ids=token_ids(hf, "eos_token_id"),
        dtype=dtype_name(hf) or ModelConfig.dtype,
    )


class Weight(NamedTuple):
    """One parameter of ours and the tensors of a Hugging Face file that it stacks, top to bottom.

    q [8, 4], k [2, 4], v [2, 4] -> qkv_proj [12, 4]; experts [3, 8, 4] are 24 rows
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    whole: bool = False  # int64, whatever the model's dtype

    @property
    def heights(self) -> list[int]:
        """How many rows of the stacked parameter each tensor makes."""
        return [shape[0] * shape[1] if len(shape) == 3 else shape[0] for shape in self.shapes]

    @property
    def shape(self) -> Shape:
        """The shape of the stacked parameter."""
        first = self.shapes[0]
        return (sum(self.heights), *first[2 if len(first) == 3 else 1 :])


def target_weights(config: ModelConfig, *, fused_experts: bool = False) -> list[Weight]:
    """Every parameter of a target model and the Hugging Face tensors it comes from.

    fused_experts: a layer's experts are tensors of three dimensions (expert_names.py).
    """
    table = (config.vocab_size, config.dim)
    plan = [single(EMBEDDING, table, "model.")]
    for index in range(config.n_layers):
        layer = layer_weights(config, f"layers.{index}.", prefix="model.", input_norm=True)
        if config.n_experts:
            layer = [weight for weight in layer if ".mlp." not in weight.name]
            layer += _experts(config, f"layers.{index}.", fused=fused_experts)
        plan += layer
    plan.append(single("norm.weight", (config.dim,), "model."))
    return plan if config.tie_embeddings else [*plan, single(LM_HEAD, table, "")]


def single(name: str, shape: Shape, prefix: str) -> Weight:
    """A parameter that is one tensor of the file, under its own name after `prefix`."""
    return Weight(name, (prefix + name,), (shape,))


def layer_weights(
    config: ModelConfig | DraftConfig,
    layer: str,
    *,
    prefix: str,
    input_norm: bool,
    in_dim: int | None = None,
) -> list[Weight]:
    """A decoder layer's parameters; in_dim is how wide its attention's input is, if not C."""
    C, D, inner = config.dim, config.head_dim, config.intermediate_size
    width = in_dim or C
    q, kv, up = (config.n_heads * D, width), (config.n_kv_heads * D, width), (inner, C)
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    norms = {f"{layer}input_layernorm.weight": C} if input_norm else {}
    norms[f"{layer}post_attention_layernorm.weight"] = C
    if config.qk_norm:
        norms |= {f"{attention}q_norm.weight": D, f"{attention}k_norm.weight": D}
    linears: list[tuple[str, dict[str, Shape], bool]] = [
        (f"{attention}qkv_proj", {"q_proj": q, "k_proj": kv, "v_proj": kv}, config.qkv_bias),
        (f"{attention}o_proj", {"o_proj": (C, q[0])}, config.o_bias),
        (f"{mlp}gate_up_proj", {"gate_proj": up, "up_proj": up}, config.mlp_bias),
        (f"{mlp}down_proj", {"down_proj": (C, inner)}, config.mlp_bias),
    ]
    plan = [single(name, (size,), prefix) for name, size in norms.items()]
    for name, parts, bias in linears:
        folder = prefix + name.rpartition(".")[0]
        for kind in ("weight", "bias") if bias else ("weight",):
            sources = tuple(f"{folder}.{part}.{kind}" for part in parts)
            shapes = tuple(shape if kind == "weight" else shape[:1] for shape in parts.values())
            plan.append(Weight(f"{name}.{kind}", sources, shapes))
    return plan


def _experts(config: ModelConfig, layer: str, *, fused: bool) -> list[Weight]:
    sources = expert_sources(
        layer,
        n_experts=config.n_experts,
        dim=config.dim,
        inner=config.intermediate_size,
        fused=fused,
    )
    return [Weight(name, *parts) for name, parts in sources.items()]


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"field architectures is missing; expected one of {', '.join(FAMILIES)}")
    if names[0] not in FAMILIES:
        raise ValueError(f"architecture {names[0]} is not supported; known: {', '.join(FAMILIES)}")
    return str(names[0])


def refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """ValueError for an activation other than SwiGLU's."""
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {hf['hidden_act']!r}; only silu is supported")


def head_dim_of(hf: Mapping[str, Any], dim: int, n_heads: int, *, absent: int | None) -> int:
    """D: stated, else `absent` where the field is left out, else C / H."""
    stated = optional_count(hf, "head_dim")
    if stated is None and "head_dim" not in hf:
        stated = absent
    if stated is None and dim % n_heads:
        raise ValueError(f"hidden_size {dim} is not a multiple of num_attention_heads {n_heads}")
    head_dim = stated or dim // n_heads
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embedding needs an even one")
    return head_dim


def kv_heads_of(kv_heads: int, n_heads: int) -> int:
    """G, if H is a multiple of it."""
    if kv_heads > n_heads or n_heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return kv_heads
