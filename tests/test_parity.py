"""Does a checkpoint of every family, in every variant, compute what transformers computes?

B batch  S new tokens  T cache slots  V vocabulary  L layers

A tiny random model is made with transformers, written with save_pretrained, and read back with
our own loader. The family table is the list of cases, so a new row is tested once it has a twin.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import full_pass, prompt, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasteagle.checkpoint import load_target
from fasteagle.families import FAMILIES
from fasteagle.model import Transformer
from fasteagle.source import open_checkpoint
from fasteagle.tree import causal_mask

transformers = pytest.importorskip("transformers")

# The class that makes a config of each family; the model class is the family's own name.
TWINS = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "MixtralForCausalLM": "MixtralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
}
VOCAB, LENGTH = 40, 20
SIZES: dict[str, Any] = {  # heads [4, 8] of 32, two query heads a kv head
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# The trained contexts are short, so that a few pairs are stretched, a few kept, a few between.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 48},
}
YARN_IN_FULL = {
    "factor": 4.0,
    "original_max_position_embeddings": 48,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 0.3,
    "truncate": False,
}


def scaled(kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **scaling}}


VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "window": {"sliding_window": LENGTH, "use_sliding_window": True, "max_window_layers": 0},
    **{kind: scaled(kind, scaling) for kind, scaling in ROPES.items()},
    "yarn_in_full": scaled("yarn", YARN_IN_FULL),
}
# Hidden states are about 1 and logits a few units; what is off by one shows as 0.1 or more.
CLOSE = {"atol": 1e-4, "rtol": 0.0}


class Pair(NamedTuple):
    folder: Path  # what save_pretrained wrote
    target: Transformer  # as read from there
    tokens: list[int]
    logits: Tensor  # [S, V] transformers' for `tokens`


@torch.inference_mode()
def make_pair(folder: Path, architecture: str, **changes: Any) -> Pair:
    """A random model of transformers, the folder it writes and what we read there."""
    assert architecture in TWINS, f"name the transformers config class of {architecture} in TWINS"
    config = getattr(transformers, TWINS[architecture])(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    # A fresh model's biases are 0 and its norms 1, where one that is forgotten would not show.
    twin = randomize(getattr(transformers, architecture)(config).float(), seed=7)
    twin.save_pretrained(folder)
    tokens = prompt(LENGTH, vocab=VOCAB)
    target = load_target(folder, dtype=torch.float32)
    return Pair(folder, target, tokens, twin(torch.tensor([tokens])).logits[0])


@pytest.fixture(scope="module", params=FAMILIES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder = tmp_path_factory.mktemp(f"{architecture}-{request.param}")
    return make_pair(folder, architecture, **VARIANTS[request.param])


@pytest.fixture
def plain(architecture: str, tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "plain", architecture)


@torch.inference_mode()
def prefill(target: Transformer, tokens: list[int]) -> Tensor:
    """Logits `[S, V]` of one pass over the whole prompt."""
    return target.logits(full_pass(target, tokens))[0]


@torch.inference_mode()
def step_by_step(target: Transformer, tokens: list[int]) -> Tensor:
    """Logits `[S, V]`, each from its one token and the cache of those before."""
    n_slots = len(tokens) + 5  # those past the end are never read
    cache, rows = target.new_cache(1, n_slots), []
    for position, token in enumerate(tokens):
        slot = torch.tensor([[position]])
        mask = causal_mask(slot, n_slots)
        hidden, _ = target(torch.tensor([[token]]), slot, slot, mask, cache)
        rows.append(target.logits(hidden)[0])
    return torch.cat(rows)


def test_prefill_gives_the_logits_of_transformers(pair: Pair) -> None:
    torch.testing.assert_close(prefill(pair.target, pair.tokens), pair.logits, **CLOSE)


def test_one_token_at_a_time_gives_the_logits_of_transformers(pair: Pair) -> None:
    torch.testing.assert_close(step_by_step(pair.target, pair.tokens), pair.logits, **CLOSE)


def test_every_tensor_of_the_checkpoint_is_read_and_none_left(pair: Pair) -> None:
    written = {name: tensor.shape for name, tensor in saved(pair.folder).items()}
    plan = open_checkpoint(pair.folder).plan
    read = [pair for w in plan for pair in zip(w.sources, w.shapes, strict=True)]
    assert len(read) == len(dict(read)), "a tensor is read twice"
    assert dict(read) == written
    assert {weight.name for weight in plan} == pair.target.state_dict().keys()


# ------------------------------------------------------------------------------ what is written


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def spelled(stated: dict[str, Any], version: int) -> dict[str, Any]:
    """A config.json in the words of transformers 4 or 5."""
    stated = dict(stated)
    rope = stated.pop("rope_parameters", None) or {
        "rope_theta": stated.pop("rope_theta"),
        **(stated.pop("rope_scaling", None) or {"rope_type": "default"}),
    }
    dtype = stated.pop("dtype", None) or stated.pop("torch_dtype")
    if version == 5:
        return {**stated, "rope_parameters": rope, "dtype": dtype}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    scales = scaling["rope_type"] != "default"
    return {
        **stated,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if scales else None,
        "torch_dtype": dtype,
    }


@pytest.mark.parametrize("version", [4, 5])
def test_either_spelling_of_the_config_gives_the_logits_of_transformers(
    pair: Pair, version: int, tmp_path: Path
) -> None:
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    stated = spelled(json.loads((pair.folder / "config.json").read_text()), version)
    fields = {"rope_theta", "rope_scaling", "torch_dtype"}
    assert fields & stated.keys() == (fields if version == 4 else set())
    (tmp_path / "config.json").write_text(json.dumps(stated))
    target = load_target(tmp_path)
    assert target.config == pair.target.config
    assert target.dtype == torch.float32
    torch.testing.assert_close(prefill(target, pair.tokens), pair.logits, **CLOSE)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.scale", "score.weight"])
def test_a_tensor_of_no_use_is_named(plain: Pair, name: str) -> None:
    tensors = saved(plain.folder) | {name: torch.ones(3)}
    save_file(tensors, plain.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"unknown {name}"):
        load_target(plain.folder)


def test_each_missing_tensor_is_named(plain: Pair) -> None:
    tensors = saved(plain.folder)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, plain.folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"missing {name}"):
            load_target(plain.folder)


# ---------------------------------------------------------------------------- what could be idle


def test_every_scaling_changes_the_logits(architecture: str, plain: Pair, tmp_path: Path) -> None:
    # Else the parity above could hold because nobody scales.
    for kind, scaling in ROPES.items():
        other = make_pair(tmp_path / kind, architecture, **scaled(kind, scaling))
        assert float((other.logits - plain.logits).abs().max()) > 0.1, kind


def test_a_forgotten_bias_or_norm_would_be_found(pair: Pair) -> None:
    # Else the parity above could hold because all of them are 0 or 1.
    held = pair.target.state_dict()
    for name in (n for n, tensor in held.items() if tensor.dim() == 1):
        kept = held[name].clone()
        held[name].fill_(1.0 if "norm" in name else 0.0)
        gap = (prefill(pair.target, pair.tokens) - pair.logits).abs().max()
        held[name].copy_(kept)
        assert float(gap) > 10 * CLOSE["atol"], name
