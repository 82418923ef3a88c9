"""Is a Hugging Face config read as transformers reads it, and is a wrong field named?"""

from __future__ import annotations

from typing import Any

import pytest
from hf_folders import INNER, KV, TARGET, C, L, Q, V, head_shapes

from fasteagle.config import ModelConfig, RopeScaling, from_dict, to_dict
from fasteagle.families import read_config
from fasteagle.heads import draft_weights, read_draft_config

LLAMA: dict[str, Any] = TARGET | {
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NEEDED = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


HEAD = {name: TARGET[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
HEAD_SHAPES = without(head_shapes(), "fc.bias")


def test_a_plain_llama_config_is_read_field_by_field() -> None:
    assert read_config(LLAMA) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=V,
        dim=C,
        n_layers=L,
        n_heads=4,
        n_kv_heads=2,
        head_dim=C // 4,
        intermediate_size=INNER,
        max_positions=64,
        norm_eps=1e-5,
        rope_theta=5000.0,
        bos_id=1,
        eos_ids=(2,),
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "default"},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_transformers_4_and_5_spellings_give_the_same_config(scaling: dict[str, Any]) -> None:
    new = without(LLAMA, "rope_theta", "torch_dtype")
    new |= {"rope_parameters": {"rope_theta": 5000.0, **scaling}, "dtype": "bfloat16"}
    old = LLAMA | {"rope_scaling": scaling}
    oldest = LLAMA | {
        "rope_scaling": {"type": scaling["rope_type"], **without(scaling, "rope_type")}
    }
    assert read_config(new) == read_config(old) == read_config(oldest)


def test_rope_scaling_keeps_every_parameter() -> None:
    llama3 = read_config(LLAMA | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}).rope_scaling
    assert llama3 == RopeScaling("llama3", 8.0, original_max_positions=32)
    yarn = {"type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale": 0.7, "truncate": False}
    assert read_config(LLAMA | {"rope_scaling": yarn}).rope_scaling == RopeScaling(
        "yarn", 4.0, original_max_positions=64, beta_fast=16.0, mscale=0.7, truncate=False
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su"])
def test_an_unknown_rope_kind_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=f"RoPE kind '{kind}'.*llama3"):
        read_config(LLAMA | {"rope_scaling": {"type": kind, "factor": 2.0}})


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        read_config(without(LLAMA, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 30}, "hidden_size 30 .* num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "sections": [1]}}, "sections"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(LLAMA | change)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"num_key_value_heads": None}, "n_kv_heads", 4),
        ({"head_dim": None}, "head_dim", C // 4),
        ({"head_dim": 16}, "head_dim", 16),
        ({"eos_token_id": [5, 7]}, "eos_ids", (5, 7)),
        ({"eos_token_id": None}, "eos_ids", ()),
        ({"rope_theta": None}, "rope_theta", 10000.0),
        ({"attention_bias": True}, "qkv_bias", True),
        ({"attention_bias": True}, "o_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"tie_word_embeddings": None}, "tie_embeddings", False),
        ({"max_position_embeddings": None, "max_sequence_length": 50}, "max_positions", 50),
        ({"sliding_window": 16}, "sliding_window", None),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 16}, "sliding_window", 16),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, "sliding_window", None),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "qkv_bias", False),
        ({"architectures": ["Qwen2ForCausalLM"]}, "qkv_bias", True),
        ({"architectures": ["Qwen2ForCausalLM"]}, "o_bias", False),
        ({"architectures": ["Qwen3ForCausalLM"]}, "qk_norm", True),
        ({"architectures": ["Qwen3ForCausalLM"]}, "head_dim", 128),
    ],
)
def test_defaults_are_those_of_the_family(change: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(read_config(LLAMA | change), field) == value


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"use_sliding_window": False}, None),
        ({}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 16),
        ({"use_sliding_window": True, "max_window_layers": L}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * L}, 16),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * L}, None),
        ({"use_sliding_window": True, "max_window_layers": 1}, 16),
        ({"layer_types": ["sliding_attention"] * L}, 16),
        ({"layer_types": ["full_attention"] * L}, None),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4096}, None),
    ],
)
def test_qwen_slides_only_where_its_config_says(change: dict[str, Any], window: int | None) -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16} | change
    assert read_config(qwen).sliding_window == window


def test_layers_of_an_unknown_kind_are_refused() -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}
    kinds = ["full_attention"] * (L - 1) + ["chunked_attention"]
    with pytest.raises(ValueError, match="layer_types has chunked_attention"):
        read_config(qwen | {"use_sliding_window": True, "layer_types": kinds})


def test_a_head_config_that_says_little_is_completed_from_its_tensors() -> None:
    config = read_draft_config(without(HEAD, "hidden_size", "intermediate_size"), HEAD_SHAPES)
    assert (config.dim, config.intermediate_size, config.n_layers) == (C, INNER, 1)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, C // 4)
    assert (config.vocab_size, config.max_positions) == (32000, 2048)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)


@pytest.mark.parametrize("stated", [True, False])
def test_the_tensors_of_a_head_decide_its_biases(stated: bool) -> None:
    hf = HEAD | {"bias": stated, "qkv_bias": stated}
    assert not read_draft_config(hf, HEAD_SHAPES).fc_bias
    biased = HEAD_SHAPES | {"fc.bias": (C,), "layers.0.self_attn.q_proj.bias": (Q,)}
    config = read_draft_config(hf, biased)
    assert config.fc_bias
    assert config.qkv_bias


def test_a_head_keeps_its_own_kv_heads_eps_and_length() -> None:
    hf = HEAD | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_sequence_length": 512}
    config = read_draft_config(hf, {f"model.{name}": s for name, s in HEAD_SHAPES.items()})
    assert (config.n_kv_heads, config.norm_eps, config.max_positions) == (4, 1e-5, 512)


def test_the_weights_of_a_head_are_the_published_names() -> None:
    config = read_draft_config(HEAD, HEAD_SHAPES)
    plan = draft_weights(config)
    assert {
        s: shape for w in plan for s, shape in zip(w.sources, w.shapes, strict=True)
    } == HEAD_SHAPES
    assert {w.name: w.shape for w in plan}["layers.0.self_attn.qkv_proj.weight"] == (Q + 2 * KV, C)


def test_a_config_survives_its_json_form() -> None:
    config = read_config(LLAMA | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    assert from_dict(ModelConfig, to_dict(config)) == config
    with pytest.raises(ValueError, match="sections"):
        from_dict(ModelConfig, {**to_dict(config), "rope_scaling": {"sections": 1}})
