"""Which draft heads are known, and what are their config fields and tensors called?

To add a kind of head, add a row to HEADS and a class to config.py.

V vocabulary  C model dim  F feature dim  I MLP dim
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fasteagle.config import DraftConfig, Eagle3Config, HeadConfig, MedusaConfig
from fasteagle.families import (
    EMBEDDING,
    LM_HEAD,
    Shape,
    Weight,
    head_dim_of,
    kv_heads_of,
    layer_weights,
    refuse_unsupported,
    single,
)
from fasteagle.hf_config import count, dtype_name, flag, layer_ids, number, optional_count, rope

LAYER = "layers.0."
FEATURES = 3  # of an EAGLE-3 head whose config does not list them
Shapes = Mapping[str, Shape]


class HeadKind(NamedTuple):
    """How a kind of head is known by its tensors, read and stored."""

    words: str  # with their article
    sign: Callable[[Shapes], bool]  # of canonical names
    read: Callable[[Mapping[str, Any], Shapes], HeadConfig]
    weights: Callable[[Any], list[Weight]]  # of its config, under canonical names
    leftovers: tuple[str, ...] = ()  # tensors that decoding does not need


def canonical(name: str) -> str:
    """What a tensor is called here: without a `model.` or `medusa_head.` prefix, layers.0 for
    midlayer.
    """
    name = name.removeprefix("model.").removeprefix("medusa_head.")
    return LAYER + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def head_kind(tensors: Shapes) -> str | None:
    """Which row of HEADS a file of these tensors is; None if it is no head."""
    shapes = {canonical(name): shape for name, shape in tensors.items()}
    return next((kind for kind, row in HEADS.items() if row.sign(shapes)), None)


def read_draft_config(hf: Mapping[str, Any], tensors: Shapes) -> DraftConfig:
    """The DraftConfig of an EAGLE-1/2 head, from its own config.json and its tensors' shapes.

    A field that the config states is kept (a tensor of another shape is an error later); one that
    it leaves out is read off the tensors. Biases are always what the tensors hold: they win over
    the fields "bias" and "qkv_bias", which published heads do not keep in step with their weights.
    """
    shapes = {canonical(name): shape for name, shape in tensors.items()}
    return DraftConfig(kind="eagle", **_common(hf, shapes))


def _common(hf: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The fields that EAGLE heads share."""
    refuse_unsupported(hf)

    def rows(name: str) -> int | None:
        return shapes[name][0] if shapes.get(name) else None

    dim = optional_count(hf, "hidden_size") or rows("fc.weight") or count(hf, "hidden_size")
    n_heads = count(hf, "num_attention_heads")
    head_dim = head_dim_of(hf, dim, n_heads, absent=None)
    kv_heads = (rows(f"{LAYER}self_attn.k_proj.weight") or n_heads * head_dim) // head_dim
    max_positions = optional_count(hf, "max_position_embeddings", "max_sequence_length")
    theta, scaling = rope(hf, max_positions or DraftConfig.max_positions)
    return {
        "vocab_size": optional_count(hf, "vocab_size") or rows(EMBEDDING) or 32000,
        "dim": dim,
        "n_layers": optional_count(hf, "num_hidden_layers") or _n_layers(shapes),
        "n_heads": n_heads,
        "n_kv_heads": kv_heads_of(optional_count(hf, "num_key_value_heads") or kv_heads, n_heads),
        "head_dim": head_dim,
        "intermediate_size": optional_count(hf, "intermediate_size")
        or rows(f"{LAYER}mlp.gate_proj.weight")
        or count(hf, "intermediate_size"),
        "max_positions": max_positions or DraftConfig.max_positions,
        "norm_eps": number(hf, "rms_norm_eps", default=DraftConfig.norm_eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "fc_bias": "fc.bias" in shapes,
        "qkv_bias": f"{LAYER}self_attn.q_proj.bias" in shapes,
        "o_bias": f"{LAYER}self_attn.o_proj.bias" in shapes,
        "mlp_bias": f"{LAYER}mlp.gate_proj.bias" in shapes,
        "qk_norm": f"{LAYER}self_attn.q_norm.weight" in shapes,
        "own_embedding": EMBEDDING in shapes,
        "dtype": dtype_name(hf) or DraftConfig.dtype,
    }


def read_eagle3_config(hf: Mapping[str, Any], tensors: Shapes) -> Eagle3Config:
    """The Eagle3Config of a head as EAGLE, SpecForge, vLLM or speculators write it.

    speculators puts the layer's fields into transformer_layer_config and norms the residual by
    default. Which norms and biases there are, the tensors tell.
    """
    shapes = {canonical(name): shape for name, shape in tensors.items()}
    layer = hf.get("transformer_layer_config")
    speculators = isinstance(layer, dict)
    fields: Mapping[str, Any] = {**hf, **layer} if isinstance(layer, dict) else hf
    common = _common(fields, shapes)
    layers = _feature_layers(hf)
    n_features = len(layers) or FEATURES
    wide, rest = divmod(shapes.get("fc.weight", (0, 0))[-1], n_features)
    norms: dict[str, Any] = {
        "norm_before_fc": flag(hf, "norm_before_fc", default=False)
        or "input_norm.weight" in shapes,
        "fc_norm": flag(hf, "fc_norm", default=False) or "fc_norm.0.weight" in shapes,
    }
    if all(norms.values()):
        raise ValueError("norm_before_fc and fc_norm exclude each other; the head has both")
    vocab_size, tied = common["vocab_size"], flag(fields, "tie_word_embeddings", default=False)
    own = LM_HEAD in shapes
    size = optional_count(hf, "draft_vocab_size") or (shapes[LM_HEAD][0] if own else vocab_size)
    return Eagle3Config(
        kind="eagle3",
        **common,
        **norms,
        target_dim=optional_count(hf, "target_hidden_size") or (not rest and wide) or common["dim"],
        feature_layers=layers,
        n_features=n_features,
        draft_vocab_size=size,
        maps_vocab=size != vocab_size,
        own_lm_head=own or size != vocab_size,  # then a missing one is an error
        tie_embeddings=tied and not own,
        norm_before_residual=flag(hf, "norm_before_residual", default=speculators),
        norm_output=flag(hf, "norm_output", default=False),
    )


def _feature_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers whose inputs are the features: as stated, or one past those whose outputs are.

    vLLM and speculators count inputs at the top level; SGLang and SpecForge count outputs in
    eagle_config.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    if hf.get(name):
        return layer_ids(hf, name)
    nested = hf.get("eagle_config")
    if not isinstance(nested, dict):
        return ()
    if not flag(nested, "use_aux_hidden_state", default=True):
        raise ValueError("eagle_config asks for no aux hidden states; an EAGLE-3 head needs them")
    return tuple(layer + 1 for layer in layer_ids(nested, name))


def draft_weights(config: DraftConfig) -> list[Weight]:
    """Every parameter of an EAGLE-1/2 head and its file's tensors, under canonical names."""
    C = config.dim
    plan = [single("fc.weight", (C, 2 * C), "")]
    if config.fc_bias:
        plan.append(single("fc.bias", (C,), ""))
    for index in range(config.n_layers):
        plan += layer_weights(config, f"layers.{index}.", prefix="", input_norm=index > 0)
    table = single(EMBEDDING, (config.vocab_size, C), "")
    return [*plan, table] if config.own_embedding else plan


def eagle3_weights(config: Eagle3Config) -> list[Weight]:
    """The same for an EAGLE-3 head."""
    C, wide = config.dim, config.n_features * config.target_dim
    plan = [single("fc.weight", (C, wide), "")]
    if config.fc_bias:
        plan.append(single("fc.bias", (C,), ""))
    if config.norm_before_fc:
        plan.append(single("input_norm.weight", (wide,), ""))
    if config.fc_norm:
        sizes = range(config.n_features)
        plan += [single(f"fc_norm.{index}.weight", (config.target_dim,), "") for index in sizes]
    plan.append(single(f"{LAYER}hidden_norm.weight", (C,), ""))
    for index in range(config.n_layers):
        width = C if index else 2 * C
        layer = f"layers.{index}."
        plan += layer_weights(config, layer, prefix="", input_norm=True, in_dim=width)
    plan.append(single("norm.weight", (C,), ""))
    if config.own_lm_head:
        plan.append(single(LM_HEAD, (config.draft_vocab_size, C), ""))
    if config.maps_vocab:
        plan.append(single("d2t", (config.draft_vocab_size,), "")._replace(whole=True))
    table = single(EMBEDDING, (config.vocab_size, C), "")
    return [*plan, table] if config.own_embedding else plan


def read_medusa_config(hf: Mapping[str, Any], tensors: Shapes) -> MedusaConfig:
    """The MedusaConfig of a medusa_lm_head file; its config.json leaves most to the tensors.

    All heads of the file are used, if more than stated: published configs say 2 beside files of 5,
    and Medusa's own loader takes 5.
    """
    refuse_unsupported(hf)
    shapes = {canonical(name): shape for name, shape in tensors.items()}
    parts = [name.split(".") for name in shapes]
    heads = [int(p[0]) for p in parts if p[0].isdecimal()]
    layers = [int(p[1]) for p in parts if p[0] == "0" and p[2:3] == ["linear"]]
    n_layers = optional_count(hf, "medusa_num_layers") or max(layers) + 1
    stated = optional_count(hf, "medusa_num_heads") or 1
    lm_head = shapes.get(f"0.{n_layers}.weight", (32000,))  # a missing one is an error later
    return MedusaConfig(
        kind="medusa",
        vocab_size=optional_count(hf, "vocab_size") or lm_head[0],
        dim=optional_count(hf, "hidden_size") or shapes["0.0.linear.weight"][0],
        n_heads=max(stated, max(heads) + 1),
        n_layers=n_layers,
        dtype=dtype_name(hf) or MedusaConfig.dtype,
    )


def medusa_weights(config: MedusaConfig) -> list[Weight]:
    """Every parameter of Medusa heads and its file's tensors, under canonical names."""
    C, plan = config.dim, []
    for head in range(config.n_heads):
        for layer in range(config.n_layers):
            ours, theirs = f"heads.{head}.layers.{layer}", f"{head}.{layer}.linear"
            plan.append(Weight(f"{ours}.weight", (f"{theirs}.weight",), ((C, C),)))
            plan.append(Weight(f"{ours}.bias", (f"{theirs}.bias",), ((C,),)))
        lm_head = f"{head}.{config.n_layers}.weight"
        plan.append(Weight(f"heads.{head}.lm_head.weight", (lm_head,), ((config.vocab_size, C),)))
    return plan


def _is_medusa(shapes: Shapes) -> bool:
    return "0.0.linear.weight" in shapes and EMBEDDING not in shapes  # else a model has them


def _is_eagle3(shapes: Shapes) -> bool:
    return f"{LAYER}hidden_norm.weight" in shapes or "d2t" in shapes


# The first that fits is taken.
HEADS: dict[str, HeadKind] = {
    "eagle3": HeadKind(
        "an EAGLE-3 head", _is_eagle3, read_eagle3_config, eagle3_weights, leftovers=("d2t", "t2d")
    ),
    "eagle": HeadKind(
        "an EAGLE-1 head", lambda shapes: "fc.weight" in shapes, read_draft_config, draft_weights
    ),
    "medusa": HeadKind("a set of Medusa heads", _is_medusa, read_medusa_config, medusa_weights),
}


def _n_layers(shapes: Shapes) -> int:
    """How many layers a head's tensors show; at least 1, so that a missing layer is named."""
    parts = [name.split(".") for name in shapes if name.startswith("layers.")]
    return max((int(p[1]) + 1 for p in parts if p[1].isdecimal()), default=1)
