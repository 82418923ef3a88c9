"""Do quantized models and heads decode, in any combination, and is EAGLE's text the plain one?

The float32 path multiplies by exactly the weights that the codes stand for.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, MC_SIM, Run, first_gaps, tokens_of

from fasteagle import checkpoint, demo, load
from fasteagle.checkpoint import load_head, load_target, read_target
from fasteagle.commands.main import main
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.footprint import loaded_bytes
from fasteagle.quant.layout import Quantized, dequantize
from fasteagle.quant.linear import QuantLinear
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from fasteagle.quantize_gptq import quantize_on
from fasteagle.source import open_checkpoint

N_NEW = 48
PROMPTS = [case["prompt"] for case in json.loads((GOLDEN / "eagle1.json").read_text())["cases"]]
DEMO_PROMPTS = ["def read_lines(path):\n", "import os\n\nclass Walker:\n", "x = ", "# The file "]
FILES = {
    "int8": "model_int8.safetensors",
    "int4": "model_int4.g32.safetensors",
    "int4-gptq": "model_int4-gptq.g32.safetensors",
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden byte pair, which has no tokenizer, with every quantized file beside."""
    folder = tmp_path_factory.mktemp("golden")
    for source, name in (("base", "base"), ("eagle1", "head")):
        shutil.copytree(GOLDEN / "byte_pair" / source, folder / name)
        for bits in (8, 4):
            quantize_checkpoint(plan_quantization(folder / name, Recipe(bits)))
        target = load_target(folder / "base", dtype=torch.float32) if name == "head" else None
        windows = torch.tensor([(prompt * 40)[:128] for prompt in PROMPTS])
        plan = plan_quantization(folder / name, Recipe(4, gptq=True))
        quantize_on(plan, windows, target=target)
    return folder


@pytest.fixture(scope="module")
def demo_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pair, quantized by the commands that a user types."""
    folder = tmp_path_factory.mktemp("demo")
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = folder / "text.py"
    text.write_text("".join(source.read_text() for source in sources))
    for source, name in ((demo.BASE, "base"), (demo.HEAD, "head")):
        shutil.copytree(source, folder / name)
        for mode in FILES:
            argv = ["quantize", "--checkpoint_path", str(folder / name), "--mode", mode, "--pad"]
            if mode == "int4-gptq":
                argv += ["--calibration", str(text), "--calibration_samples", "8"]
            if mode == "int4-gptq" and name == "head":
                argv += ["--target_checkpoint_path", str(folder / "base")]
            assert main(argv) == 0
    return folder


@pytest.mark.parametrize("mode", FILES)
def test_eagle_is_plain_over_the_golden_prompts(golden: Path, mode: str) -> None:
    file = FILES[mode]
    target = load_target(golden / "base" / file, dtype=torch.float32)
    head = load_head(golden / "head" / file, target)
    engines = [Engine(target), Engine(target, EagleDrafter(head, target, MC_SIM))]
    plain, drafted = (e.generate(PROMPTS, max_new_tokens=N_NEW, stop_ids=[]) for e in engines)
    assert tokens_of(plain) == tokens_of(drafted)
    assert sum(each.stats.accept_length for each in drafted) / len(drafted) > 3


@pytest.mark.parametrize("mode", FILES)
def test_the_float32_reference_multiplies_by_what_the_codes_stand_for(
    golden: Path, mode: str
) -> None:
    file = golden / "base" / FILES[mode]
    target, parameters = load_target(file, dtype=torch.float32), dict(read_target(file)[1])
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    for name in ("lm_head", "layers.3.self_attn.qkv_proj", "layers.7.mlp.gate_up_proj"):
        weight = parameters[f"{name}.weight"]
        assert isinstance(weight, Quantized)
        exact = x.double() @ dequantize(weight, torch.float64).T
        error = target.get_submodule(name)(x).double() - exact
        assert error.norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("head", ["float", *FILES])
@pytest.mark.parametrize("base", ["float", *FILES])
def test_any_base_goes_with_any_head(demo_pair: Path, base: str, head: str) -> None:
    paths = [demo_pair / "base" / FILES.get(base, ""), demo_pair / "head" / FILES.get(head, "")]
    engine = load(*paths, dtype="float32")
    results = engine.generate(DEMO_PROMPTS, max_new_tokens=40)
    assert tokens_of(results) == plain_texts(paths[0])
    assert sum(each.stats.accept_length for each in results) / len(DEMO_PROMPTS) > 2


@cache
def plain_texts(base: Path) -> list[list[int]]:
    return tokens_of(load(base, dtype="float32").generate(DEMO_PROMPTS, max_new_tokens=40))


@pytest.mark.parametrize("tree", [None, "mc_sim_7b_63"], ids=["chain-3", "26 nodes"])
@pytest.mark.parametrize("mode", FILES)
def test_texts_of_int_kernels_part_only_at_a_tie(
    demo_pair: Path, mode: str, tree: str | None
) -> None:
    paths = [demo_pair / part / FILES[mode] for part in ("base", "head")]
    engines = [load(paths[0]), load(*paths, tree=tree)]
    target = engines[0].target
    assert target.dtype == torch.bfloat16
    layers = [part for part in target.modules() if isinstance(part, QuantLinear)]
    assert len(layers) == 4 * 4 + 1
    ids = [engines[0].request(prompt).prompt for prompt in DEMO_PROMPTS]
    results = [e.generate(ids, max_new_tokens=40, stop_ids=[]) for e in engines]
    gaps = first_gaps(target, ids, [tokens_of(result) for result in results])
    assert all(gap < 0.25 for gap in gaps), gaps


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_generate_swaps_files_in_by_path(demo_pair: Path, run: Run, mode: str) -> None:
    call = [
        *("generate", "--prompt", "def read_lines(path):", "--max_new_tokens", "24"),
        *("--checkpoint_path", demo_pair / "base" / FILES[mode]),
        *("--draft_checkpoint_path", demo_pair / "head" / FILES[mode]),
    ]
    text, said = run(*call, "--dtype", "float32")
    assert said.count("dequantized to float32, the exact and slow reference") == 2
    for flags in ((), ("--compile",)):
        found, said = run(*call, *flags)
        assert f"{mode} and " in said
        # In 16 bits two kernels may round a near tie to either side, but not at the first words.
        assert found[:20] == text[:20]


def test_quantized_files_are_small_and_recorded(demo_pair: Path) -> None:
    folder = demo_pair / "base"
    sizes = {
        name: (folder / name).stat().st_size for name in (*FILES.values(), "model.safetensors")
    }
    assert sizes[FILES["int4"]] < sizes[FILES["int8"]] < sizes["model.safetensors"]
    records = json.loads((folder / "config.json").read_text())["fasteagle_quantized"]
    assert set(records) == set(FILES.values())
    assert records[FILES["int4-gptq"]]["method"].startswith("gptq")
    assert {record["bits"] for record in records.values()} == {4, 8}
    assert len({record["source_sha"] for record in records.values()}) == 1


@pytest.mark.parametrize("keep_dense", [True, False])
@pytest.mark.parametrize("mode", FILES)
def test_the_planned_memory_is_what_is_loaded(
    demo_pair: Path, mode: str, keep_dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "keeps_dense", lambda opened, device: keep_dense)
    file = demo_pair / "base" / FILES[mode]
    target = load_target(file, dtype=torch.bfloat16)
    held = sum(tensor.nbytes for tensor in [*target.parameters(), *target.buffers()])
    opened, place = open_checkpoint(file), torch.device("cpu")
    planned = loaded_bytes(opened, torch.bfloat16, place, keep_dense=keep_dense)
    assert abs(planned - held) < 0.01 * held


def test_a_text_that_says_little_is_noticed(tmp_path: Path, run: Run) -> None:
    shutil.copytree(demo.BASE, tmp_path / "base")
    (tmp_path / "text.py").write_text("".join(f"value_{n} = {n}\n" for n in range(600)))
    call = ["quantize", "--checkpoint_path", tmp_path / "base", "--mode", "int4-gptq", "--pad"]
    call += ["--calibration", tmp_path / "text.py", "--calibration_samples", "1"]
    _, said = run(*call)
    assert "256 tokens for 688 inputs of a matrix" in said
