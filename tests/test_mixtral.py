"""Is a Mixtral checkpoint, in either layout and any precision, the model that it states?

E experts  C model dim  I inner size of an expert  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused, prompt
from hf_folders import Tensors, assert_equal, write
from mixtral_files import MIXTRAL, MOE, WRITERS, C, E, V, fused, logits_of, mixtral_tensors
from quant_files import write_gptq_folder
from safetensors.torch import load_file, save_file
from scripted_drafters import RandomDrafter

from fasteagle.checkpoint import convert, load_target, read_target, weight_bytes
from fasteagle.experts import Experts
from fasteagle.families import read_config
from fasteagle.source import open_checkpoint
from fasteagle.tree import ancestors, tree_mask


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Shards split the experts of every layer."""
    tensors = WRITERS[request.param](mixtral_tensors())
    return write(tmp_path / request.param, MIXTRAL, tensors, "shards.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixtral") / "base", MIXTRAL, mixtral_tensors())


# ----------------------------------------------------------------------------------- reading


def test_both_layouts_are_the_same_model(folder: Path, base: Path) -> None:
    held = [dict(read_target(path)[1]) for path in (folder, base)]
    assert_equal(*held)
    assert weight_bytes(folder) == weight_bytes(base)
    assert held[0]["layers.1.mlp.gate_up_proj.weight"].shape == (E * 2 * 96, C)
    assert isinstance(load_target(folder).layers[0].mlp, Experts)


def test_converting_keeps_every_number(folder: Path, tmp_path: Path) -> None:
    out = convert(folder, tmp_path / "ours")
    assert_equal(dict(read_target(out)[1]), dict(read_target(folder)[1]))
    assert load_target(out).config == load_target(folder).config


@torch.inference_mode()
def test_tree_rows_give_the_logits_of_transformers(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    target = load_target(folder, dtype=torch.float32)
    original = write(tmp_path / "original", MIXTRAL, mixtral_tensors())
    twin = transformers.MixtralForCausalLM.from_pretrained(original, dtype=torch.float32)
    n_nodes, committed = 12, prompt(9, vocab=V)
    guesses, parents = RandomDrafter(n_nodes, 5, V).grow(0, len(committed))
    tokens, above = (
        torch.tensor([[3, *guesses]]),
        ancestors(torch.tensor([[0, *parents]]), 5),
    )
    cache, start = target.new_cache(1, 32), torch.tensor([len(committed)])
    slots = torch.arange(len(committed))[None]
    mask = torch.arange(32)[None, None] <= slots[..., None]
    target(torch.tensor([committed]), slots, slots, mask, cache)
    positions = start[:, None] + above.sum(-1) - 1
    mask = tree_mask(start, above, 32)
    hidden, _ = target(tokens, positions, cache.slots(start, n_nodes), mask, cache)
    for node in range(n_nodes):
        path = [*committed, *tokens[0][above[0, node]].tolist()]
        wanted = twin(torch.tensor([path])).logits[0, -1]
        torch.testing.assert_close(target.logits(hidden[0, node]), wanted, atol=1e-4, rtol=0.0)


def test_what_transformers_writes_without_its_own_conversion_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**{k: v for k, v in MIXTRAL.items() if "dtype" not in k})
    twin = transformers.MixtralForCausalLM(config).float()
    twin.save_pretrained(tmp_path, save_original_format=False)
    assert any("gate_up_proj" in name for name in load_file(tmp_path / "model.safetensors"))
    tokens = prompt(20, vocab=V)
    with torch.inference_mode():
        wanted = twin(torch.tensor([tokens])).logits[0]
        found = logits_of(load_target(tmp_path, dtype=torch.float32), tokens)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0.0)


# ------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, (4, 2)),
        ({"num_local_experts": None, "num_experts_per_tok": None}, (8, 2)),
        ({"num_experts_per_tok": 4}, (4, 4)),
        ({"architectures": ["LlamaForCausalLM"]}, (4, 2)),
        ({"architectures": ["LlamaForCausalLM"], "num_local_experts": 0}, (0, 0)),
        ({"architectures": ["LlamaForCausalLM"], "num_local_experts": None}, (0, 0)),
    ],
)
def test_the_experts_are_those_of_the_config(change: dict[str, Any], wanted: Any) -> None:
    config = read_config(MIXTRAL | change)
    assert (config.n_experts, config.n_experts_per_token) == wanted


def test_what_a_mixtral_config_leaves_out_is_as_in_transformers() -> None:
    assert read_config(MIXTRAL).rope_theta == 1e6
    assert read_config(MIXTRAL | {"rope_theta": 500.0}).rope_theta == 500.0


def test_mixtral_slides_only_where_its_config_says() -> None:
    left_out = {name: value for name, value in MIXTRAL.items() if name != "sliding_window"}
    assert read_config(left_out).sliding_window is None
    assert read_config(MIXTRAL).sliding_window is None
    assert read_config(MIXTRAL | {"sliding_window": 16}).sliding_window == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than num_local_experts 4"),
        ({"num_local_experts": "8"}, "num_local_experts is '8'"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias is true"),
        (
            {"architectures": ["LlamaForCausalLM"], "num_experts_per_tok": None},
            "num_experts_per_tok is missing",
        ),
    ],
)
def test_experts_that_cannot_be_run_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(MIXTRAL | change)


def test_a_llama_with_experts_is_read_like_mixtral(base: Path, tmp_path: Path) -> None:
    llama = MIXTRAL | {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e6}
    other = write(tmp_path / "llama", llama, mixtral_tensors())
    tokens = prompt(12, vocab=V)
    assert torch.equal(*(logits_of(load_target(path), tokens) for path in (base, other)))


# -------------------------------------------------------------------------------- bad files


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


W3 = f"{MOE.format(1)}experts.2.w3.weight"
BAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no expert": (without(W3), f"missing {W3}"),
    "no router": (without(f"{MOE.format(0)}gate.weight"), f"missing {MOE.format(0)}gate.weight"),
    "one too many": (
        lambda t: t | {W3.replace(".2.", ".4."): t[W3].clone()},
        f"unknown {W3.replace('.2.', '.4.')}",
    ),
    "shape": (lambda t: t | {W3: t[W3].T.contiguous()}, f"{W3} has shape [64, 96]"),
    "fused shape": (
        lambda t: {n: x[:3] if "experts.down_proj" in n else x for n, x in fused(t).items()},
        "mlp.experts.down_proj has shape [3, 64, 96]",
    ),
    "both layouts": (lambda t: t | fused(mixtral_tensors()), f"unknown {MOE.format(0)}"),
    "infinity": (lambda t: t | {W3: t[W3] / 0}, f"{W3} holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_by_name(kind: str, refused: Refused, tmp_path: Path) -> None:
    change, words = BAD[kind]
    path = write(tmp_path / "bad", MIXTRAL, change(mixtral_tensors()))
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[1, 3, 5]]")
    limits = ("--prompt_ids", prompts, "--max_new_tokens", "4", "--out", tmp_path / "out.json")
    refused("trace", "--checkpoint_path", path, *limits, words=words)


def test_experts_that_are_quantized_in_part_are_refused(tmp_path: Path) -> None:
    write_gptq_folder(tmp_path, MIXTRAL)
    held = load_file(tmp_path / "model.safetensors")
    matrix = W3.removesuffix("weight")
    held = {name: tensor for name, tensor in held.items() if not name.startswith(matrix)}
    save_file(held | {W3: torch.ones(96, 64).half()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{W3} is not quantized, but other experts"):
        open_checkpoint(tmp_path)
