"""Is any smaller checkpoint a draft model, and is what does not fit one clear line?"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    GOLDEN,
    Refused,
    tokens_of,
)
from hf_folders import write
from safetensors.torch import load_file
from test_standalone import draft_by_paths

from fasteagle import EagleModel, assemble, demo, load
from fasteagle.assemble import load_drafter
from fasteagle.checkpoint import convert, load_target
from fasteagle.commands import options, plan
from fasteagle.draft.choice import Asked
from fasteagle.draft.standalone import check_tokenizers
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from fasteagle.tree import chain

PAIR = GOLDEN / "byte_pair"
CASES = json.loads((GOLDEN / "eagle1.json").read_text())["cases"]


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the golden base as its draft model, in every form."""
    folder = tmp_path_factory.mktemp("draft")
    config = json.loads((PAIR / "base/config.json").read_text()) | {"num_hidden_layers": 4}
    tensors = load_file(PAIR / "base/model.safetensors")
    cut = {n: t for n, t in tensors.items() if ".layers." not in n or int(n.split(".")[2]) < 4}
    write(folder / "hf", config, cut)
    convert(folder / "hf", folder / "ours")
    quantize_checkpoint(plan_quantization(folder / "ours", Recipe(8)))
    return folder


@pytest.mark.parametrize("form", ["hf", "ours", "ours/model_int8.safetensors"])
def test_any_form_of_a_smaller_model_drafts(form: str, drafts: Path) -> None:
    engine = load(PAIR / "base", drafts / form)
    assert engine.drafter.words == "draft model, tree chain-5"
    model = load_target(drafts / form, dtype=engine.drafter.model.dtype)
    # A quantized one is in bfloat16 beside a float32 target: that is where its kernels are.
    assert model.dtype == (torch.bfloat16 if "int8" in form else torch.float32)
    assert engine.target.dtype == torch.float32
    tokens = CASES[0]["prompt"]
    result = engine.generate([tokens], max_new_tokens=24, stop_ids=[])[0]
    assert result.tokens == CASES[0]["output"][:24]
    if model.dtype == torch.float32:
        rows = engine.rows([engine.request(tokens, max_new_tokens=3, stop_ids=[])])
        next(engine.decode(rows))
        expected = draft_by_paths(model, chain(5), [*tokens, *rows[0].tokens])
        assert engine.state.tree.tokens[0].tolist() == expected


@pytest.mark.parametrize("flags", [[], ["--dtype", "float32"]], ids=["default", "float32"])
def test_the_flags_of_a_command_leave_the_draft_its_dtype(flags: list[str], drafts: Path) -> None:
    parser = argparse.ArgumentParser()
    options.add_model(parser)
    file = drafts / "ours/model_int8.safetensors"
    pair = ["--checkpoint_path", str(PAIR / "base"), "--draft_checkpoint_path", str(file)]
    engine, said = options.load_engine(parser.parse_args([*pair, *flags]), text=False)
    assert engine.target.dtype == torch.float32
    assert engine.drafter.model.dtype == (torch.float32 if flags else torch.bfloat16)
    assert "draft model, tree chain-5 in" in said


def test_a_dtype_that_is_asked_for_is_the_drafts_too(drafts: Path) -> None:
    file = drafts / "ours/model_int8.safetensors"
    assert load(PAIR / "base", file, dtype="float32").drafter.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "tree"),
    [
        ({"speculate_k": 3}, "chain-3"),
        ({"tree": "dynamic-12-3-4"}, "dynamic-12-3-4"),
        ({"tree": "mc_sim_7b_63"}, "mc_sim_7b_63"),
    ],
)
def test_speculate_k_or_any_tree_shapes_the_guess(
    flags: dict[str, Any], tree: str, drafts: Path
) -> None:
    engine = load(PAIR / "base", drafts / "ours", dtype="float32", **flags)
    assert engine.drafter.tree_name == tree
    results = engine.generate([CASES[1]["prompt"]], max_new_tokens=16, stop_ids=[])
    assert tokens_of(results) == [CASES[1]["output"][:16]]


def test_a_draft_model_may_bring_its_tree(drafts: Path, tmp_path: Path) -> None:
    shutil.copytree(drafts / "ours", tmp_path / "own")
    (tmp_path / "own/tree.json").write_text("[[0], [1]]")
    target = load_target(PAIR / "base", dtype=torch.float32)
    assert load_drafter(tmp_path / "own", target).n_nodes == 3
    assert load_drafter(tmp_path / "own", target, speculate_k=4).n_nodes == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--speculate_k 3", "--speculate_k is how far a draft model guesses, but"),
        ("--speculate_k 3", "is an EAGLE-1 head; give --tree chain-3"),
        ("--speculate_k 3 --tree chain-3", "both say what is guessed; drop one"),
        ("--speculate_k 3 --draft none", "--draft none guesses nothing; drop --speculate_k"),
        ("--speculate_k 3 --checkpoint_path BASE", "--speculate_k needs a drafter"),
        ("--speculate_k 0", "is not a whole number above 0"),
        ("--speculate_k 256 --draft_checkpoint_path BASE", "give 1 to 255"),
        ("--draft eagle --draft_checkpoint_path BASE", "is a target model; expected an EAGLE head"),
        ("--draft_checkpoint_path BASE --draft_vocab none --tree [[5000]]", "5000"),
        (f"--draft_checkpoint_path {PAIR}/base", "a vocabulary of 260 and the target one of 2048"),
    ],
)
def test_wrong_flags_for_a_draft_model(refused: Refused, flags: str, words: str) -> None:
    refused("generate", *flags.replace("BASE", str(demo.BASE)).split(), words=words)


def test_a_draft_model_takes_no_draft_vocabulary(drafts: Path, tmp_path: Path) -> None:
    held = {"format": "fasteagle draft vocabulary", "vocab_size": 260, "ids": [1, 2]}
    (tmp_path / "vocab.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match="guesses among all its tokens; drop --draft_vocab"):
        load(PAIR / "base", drafts / "ours", draft_vocab=str(tmp_path / "vocab.json"))


def test_a_tokenizer_that_is_not_the_targets_is_refused(folders: dict[str, Path]) -> None:
    tokenizer = assemble.find_tokenizer(folders["demo"])
    for name, folder in folders.items():
        own = assemble.find_tokenizer(folder)
        if name == "demo":
            check_tokenizers(folder, own, tokenizer)
        else:
            with pytest.raises(ValueError, match="another tokenizer than the target"):
                check_tokenizers(folder, own, tokenizer)
        check_tokenizers(folder, own, None)
    check_tokenizers(PAIR / "base", assemble.find_tokenizer(PAIR / "base"), tokenizer)  # has none


def test_eagle_model_keeps_to_eagle_heads() -> None:
    with pytest.raises(ValueError, match="is a target model; expected an EAGLE head"):
        EagleModel.from_pretrained(base_model_path=demo.BASE, ea_model_path=demo.BASE)


@pytest.mark.parametrize("form", ["ours", "ours/model_int8.safetensors"])
def test_the_plan_is_what_is_allocated(form: str, drafts: Path) -> None:
    sizes = ("total_tokens", "depth", "tree_top_k", *Asked.__annotations__)
    names = ("draft", "revision", "max_length", "dtype", *sizes)
    flags = {
        **dict.fromkeys(names),
        "checkpoint_path": str(PAIR / "base"),
        "draft_checkpoint_path": str(drafts / form),
        "speculate_k": 4,
        "batch_size": 2,
    }
    planned = plan.make_plan(argparse.Namespace(**flags), torch.float32, torch.device("cpu"))
    engine = load(PAIR / "base", drafts / form, speculate_k=4, batch=2)
    model = engine.drafter.model
    held = sum(part.nbytes for part in [*model.parameters(), *model.buffers()])
    assert abs(planned.n_bytes["draft weights"] - held) < 0.01 * held
    assert planned.n_bytes["KV cache"] == engine.builder.cache.n_bytes
    if "int8" not in form:  # the plan's is in 16 bits then, too
        assert planned.n_bytes["the draft's memory"] == engine.builder.memory.n_bytes
    assert any("draft model, tree chain-4: 5 nodes" in line for line in planned.words)
    assert "kernels of the draft:" in planned.layers
