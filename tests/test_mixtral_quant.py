"""Are quantized experts what their codes stand for, and does memory hold what was planned?

E experts  C model dim  V vocabulary
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MC_SIM, Run, full_pass, plain_decode, prompt, tokens_of
from hf_folders import HEAD as PLAIN_HEAD
from hf_folders import Tensors, random_tensors, write
from mixtral_files import MIXTRAL, MOE, WINDOWS, C, E, V, logits_of, mixtral_tensors
from quant_files import hf_shapes, write_awq_folder, write_gptq_folder
from torch import Tensor

from fasteagle import checkpoint
from fasteagle.calibrate import calibrate_target
from fasteagle.checkpoint import load_head, load_target
from fasteagle.commands import doctor
from fasteagle.commands.layers import layer_lines
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.experts import Experts
from fasteagle.footprint import loaded_bytes
from fasteagle.quant.experts import QuantExperts
from fasteagle.quant.kernels import ANY, DENSE, TRITON, Range
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from fasteagle.quantize_gptq import quantize_on
from fasteagle.source import open_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixtral") / "base", MIXTRAL, mixtral_tensors())


# ------------------------------------------------------------------------------- quantized


def stacked(weights: Tensors, layer: int) -> Tensors:
    """The experts of a layer as our parameters, from Hugging Face's names."""
    names = [f"{MOE.format(layer)}experts.{e}.{{}}.weight" for e in range(E)]
    both = [weights[name.format(kind)] for name in names for kind in ("w1", "w3")]
    down = [weights[name.format("w2")] for name in names]
    return {"gate_up_proj": torch.cat(both), "down_proj": torch.cat(down)}


@pytest.mark.parametrize("kind", ["gptq", "act-order", "awq"])
def test_experts_of_other_programs_are_read_exactly(kind: str, tmp_path: Path) -> None:
    options = {"act_order": True} if kind == "act-order" else {}
    writer = write_awq_folder if kind == "awq" else write_gptq_folder
    weights = writer(tmp_path, MIXTRAL, **options)
    target = load_target(tmp_path, dtype=torch.float32)
    for name, wanted in stacked(weights, 1).items():
        assert torch.equal(target.get_submodule(f"layers.1.mlp.{name}").weight, wanted)
    narrow = load_target(tmp_path, dtype=torch.bfloat16)
    tokens, wanted = prompt(20, vocab=V), logits_of(target, prompt(20, vocab=V))
    found = logits_of(narrow, tokens).float()
    assert isinstance(narrow.layers[0].mlp.down_proj, QuantExperts)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


@pytest.fixture(scope="module")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base with its quantized files beside it."""
    folder = tmp_path_factory.mktemp("quantized") / "base"
    shutil.copytree(base, folder)
    files = {
        f"int{bits}": quantize_checkpoint(plan_quantization(folder, Recipe(bits)))
        for bits in (8, 4)
    }
    plan = plan_quantization(folder, Recipe(4, gptq=True))
    return files | {"int4-gptq": quantize_on(plan, WINDOWS.repeat(8, 1))}


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-gptq"])
def test_quantized_experts_compute_what_their_codes_stand_for(
    quantized: dict[str, Path], base: Path, mode: str
) -> None:
    exact, plain = load_target(quantized[mode], dtype=torch.float32), load_target(base)
    for name, weight in plain.named_parameters():
        near = exact.get_parameter(name)
        error = float((near - weight).norm() / weight.norm())
        rounded = ".mlp." in name and "router" not in name
        assert rounded <= (error > 0), f"{name} is as it was"
        assert error < (0.01 if mode == "int8" else 0.2), name
        assert error == 0 or rounded or "_proj" in name or "lm_head" in name, name
    narrow = load_target(quantized[mode], dtype=torch.bfloat16)
    assert isinstance(narrow.layers[1].mlp.gate_up_proj, QuantExperts)
    tokens = prompt(20, vocab=V)
    wanted = logits_of(exact, tokens)
    assert float((logits_of(narrow, tokens) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_planned_memory_is_what_is_loaded(
    quantized: dict[str, Path], mode: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "keeps_dense", lambda opened, device: keep)
    target = load_target(quantized[mode], dtype=torch.bfloat16)
    held = sum(tensor.nbytes for tensor in [*target.parameters(), *target.buffers()])
    opened, place = open_checkpoint(quantized[mode]), torch.device("cpu")
    planned = loaded_bytes(opened, torch.bfloat16, place, keep_dense=keep)
    assert abs(planned - held) < 0.01 * held
    lines = layer_lines(opened, torch.bfloat16, place)
    assert any(f"{mode} experts, 1 to" in line for line in lines)
    assert any(line.split() == ["layers.*.mlp.router", "x2", "bfloat16"] for line in lines)


def test_a_pattern_keeps_experts_in_16_bits(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    recipe = Recipe(4, keep=("*.mlp.down_proj",))
    bits = plan_quantization(tmp_path / "base", recipe).bits
    assert "layers.0.mlp.gate_up_proj.weight" in bits
    assert not any("down_proj" in name or "router" in name for name in bits)


@torch.inference_mode()
def test_the_hessian_of_an_expert_is_that_of_the_rows_routed_to_it(base: Path) -> None:
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
        found.setdefault(name, []).append((weight.clone(), hessian.clone()))
        return weight

    calibrate_target(open_checkpoint(base), WINDOWS, keep)
    target, inputs = load_target(base), []
    hook = target.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0][0])
    )
    for window in WINDOWS.tolist():
        full_pass(target, window)
    hook.remove()
    rows, layer = torch.cat(inputs), target.layers[1].mlp
    choice = layer.router(rows)
    for expert in range(E):
        mine = rows[[expert in row for row in choice.experts.tolist()]]
        assert 0 < len(mine) < len(rows)
        gate, up = (mine @ layer.gate_up_proj.stack[expert].T).chunk(2, -1)
        for name, x in {"gate_up_proj": mine, "down_proj": gate.sigmoid() * gate * up}.items():
            weight, hessian = found[f"layers.1.mlp.{name}.weight"][expert]
            assert torch.equal(weight, layer.get_submodule(name).stack[expert])
            torch.testing.assert_close(hessian, x.T @ x, atol=1e-3, rtol=1e-4)
    assert len(found["layers.1.mlp.gate_up_proj.weight"]) == E


def test_experts_that_see_no_token_are_rounded_and_said(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    said: list[str] = []
    plan = plan_quantization(tmp_path / "base", Recipe(4, gptq=True))
    file = quantize_on(plan, torch.full((1, 2), 7), say=said.append)  # two equal tokens
    assert "no calibration token was routed to" in said[0]
    assert ".mlp.gate_up_proj.weight" in said[0]
    rounded = load_target(file, dtype=torch.float32)
    nearest = quantize_checkpoint(plan_quantization(tmp_path / "base", Recipe(4)))
    stacks = [
        model.get_submodule("layers.0.mlp.gate_up_proj").stack
        for model in (rounded, load_target(nearest, dtype=torch.float32))
    ]
    alike = [torch.equal(one, other) for one, other in zip(*stacks, strict=True)]
    assert alike.count(True) == 2, "two of four experts are a token's"


# --------------------------------------------------------------------------------- decoding


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A dense head with as many KV heads as heads, where the base has half as many."""
    config = PLAIN_HEAD | {name: MIXTRAL[name] for name in ("hidden_size", "vocab_size")}
    config |= {"intermediate_size": 96, "num_key_value_heads": 4, "num_local_experts": E}
    shapes = hf_shapes(config | {"num_hidden_layers": 1, "num_local_experts": 0})
    shapes = {
        name.removeprefix("model."): shape
        for name, shape in shapes.items()
        if "layers.0." in name and "input_layernorm" not in name
    }
    tensors = random_tensors(shapes | {"fc.weight": (C, 2 * C), "fc.bias": (C,)}, seed=3)
    return write(tmp_path / "head", config, {n: t * 0.1 for n, t in tensors.items()})


def test_a_dense_head_with_its_own_kv_heads_drafts_for_experts(base: Path, head: Path) -> None:
    target = load_target(base)
    drafter = EagleDrafter(load_head(head, target), target, MC_SIM)
    assert (drafter.head.config.n_kv_heads, target.config.n_kv_heads) == (4, 2)
    assert not any(isinstance(part, Experts) for part in drafter.head.modules())
    prompts = [prompt(length, vocab=V) for length in (5, 17)]
    engine = Engine(target, drafter, batch=2, max_length=64, prefill_chunk=8)
    results = engine.generate(prompts, max_new_tokens=20, stop_ids=[])
    assert tokens_of(results) == [plain_decode(target, tokens, 20) for tokens in prompts]


# ----------------------------------------------------------------------------------- memory


@pytest.fixture
def mixtral_8x7b(tmp_path: Path) -> Path:
    """The headers of Mixtral 8x7B before holes, a shard a layer: 93 GB that take no room."""
    config = MIXTRAL | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }
    shards: dict[str, dict[str, Any]] = {}
    for name, shape in hf_shapes(config).items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for shard, shapes in shards.items():
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + torch.Size(shape).numel() * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (tmp_path / shard).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    index = {name: shard for shard, shapes in shards.items() for name in shapes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


GB = 10**9


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (24, "not even fasteagle quantize --mode int4 --groupsize 128 would fit (25.1 GB)"),
        (32, "they fit with fasteagle quantize --mode int4 --groupsize 32 (29.4 GB)"),
        (80, "they fit with fasteagle quantize --mode int8 (46.9 GB)"),
    ],
)
def test_a_model_above_the_memory_is_planned_and_refused_before_it_is_read(
    mixtral_8x7b: Path, free: int, words: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    card = [Range(64, TRITON, ""), Range(ANY, DENSE, "")]  # what a GPU has for experts
    monkeypatch.setattr("fasteagle.footprint.kernels_of", lambda *_, **__: card)
    monkeypatch.setattr("fasteagle.footprint.free_memory", lambda device: free * GB)
    monkeypatch.setattr(doctor, "free_memory", lambda device: (free + 0.3) * GB)
    monkeypatch.setattr("fasteagle.weights.Weights.read", lambda *_: pytest.fail("it was read"))
    flags = ("--checkpoint_path", mixtral_8x7b, "--dtype", "bfloat16", "--device", "cpu")
    out, _ = run("doctor", *flags, "--max_length", "1024")
    assert "8 experts, 2 a token" in out
    assert "does not fit: 9" in out
    assert "the model's weights are 93.4 GB of it" in out
    assert words in out
    (mixtral_8x7b / "prompts.json").write_text("[[1, 3, 5]]")
    limits = ("--prompt_ids", mixtral_8x7b / "prompts.json", "--max_new_tokens", "4")
    _, error = run("trace", *flags, *limits, "--out", mixtral_8x7b / "out.json", status=2)
    assert f"the weights take 93.4 GB in memory, and cpu has {free}.0 GB free; {words}" in error
    assert len(error.splitlines()) == 1
