"""Is a Mixtral checkpoint, in either layout and any precision, the model that it states?

E experts  C model dim  I inner size of an expert  V vocabulary
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MC_SIM, Refused, Run, full_pass, plain_decode, prompt, tokens_of
from hf_folders import HEAD as PLAIN_HEAD
from hf_folders import Tensors, assert_equal, random_tensors, write
from quant_files import CONFIG, hf_shapes, write_awq_folder, write_gptq_folder
from safetensors.torch import load_file, save_file
from scripted_drafters import RandomDrafter
from torch import Tensor

from fasteagle import checkpoint
from fasteagle.calibrate import calibrate_target
from fasteagle.checkpoint import convert, load_head, load_target, read_target, weight_bytes
from fasteagle.commands import doctor
from fasteagle.commands.layers import layer_lines
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.experts import Experts
from fasteagle.families import read_config
from fasteagle.footprint import loaded_bytes
from fasteagle.model import Transformer
from fasteagle.quant.experts import QuantExperts
from fasteagle.quant.kernels import ANY, DENSE, TRITON, Range
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from fasteagle.quantize_gptq import quantize_on
from fasteagle.source import open_checkpoint
from fasteagle.tree import ancestors, tree_mask

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


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Shards split the experts of every layer."""
    tensors = WRITERS[request.param](mixtral_tensors())
    return write(tmp_path / request.param, MIXTRAL, tensors, "shards.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixtral") / "base", MIXTRAL, mixtral_tensors())


def logits_of(target: Transformer, tokens: list[int]) -> Tensor:
    return target.logits(full_pass(target, tokens))[0]


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
