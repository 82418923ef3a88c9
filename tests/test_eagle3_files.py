"""Does an EAGLE-3 head draft what the paper says, from every layout that its files come in?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, Refused, plain_decode, prompt
from conftest import tokens_of as texts_of
from eagle3_files import (
    CONFIG,
    DIM,
    IDS,
    KEPT,
    Case,
    SlowHead,
    inputs_of_layers,
    layer_shapes,
    more,
    official,
    plain_vocab,
    renamed,
    target,
    tensors_of,
    without,
)
from scripted_drafters import VOCAB
from torch import Tensor

from fasteagle.assemble import load_drafter
from fasteagle.checkpoint import convert, load_target
from fasteagle.draft.base import Drafter
from fasteagle.draft.eagle3 import Eagle3Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint


def drafted(drafter: Drafter) -> list[tuple[list[int], list[int]]]:
    """The text and the tree before every round."""
    tokens = prompt(7)
    engine = Engine(target(), drafter, prefill_chunk=4)
    rows = engine.rows([engine.request(tokens, max_new_tokens=7, stop_ids=[])])
    found = []
    for (row,) in engine.decode(rows):
        if not row.done:
            found.append(([*tokens, *row.tokens], engine.state.tree.tokens[0].tolist()))
    assert rows[0].tokens == plain_decode(target(), tokens, 7)
    return found


# --------------------------------------------------------------------------------------- layouts

AUX = "eagle_aux_hidden_state_layer_ids"
EMBEDDING = more("embed_tokens.weight", VOCAB, DIM)
SECOND = tensors_of(layer_shapes("layers.1.", DIM, DIM, first=False))
SPECULATORS = {
    "speculators_model_type": "eagle3",
    "draft_vocab_size": KEPT,
    "transformer_layer_config": {k: v for k, v in CONFIG.items() if k not in ("draft_vocab_size",)},
    **dict.fromkeys([k for k in CONFIG if k not in ("draft_vocab_size", "torch_dtype")]),
}
CASES: dict[str, Callable[[], Case]] = {
    "official, bin": lambda: Case(official()),
    "official, safetensors": lambda: Case(official(), layout="one.safetensors"),
    "layers.0": lambda: Case(renamed("midlayer.", "layers.0.")),
    "model. on the layer": lambda: Case(renamed("midlayer.", "model.layers.0.")),
    "model. on all": lambda: Case({f"model.{name}": t for name, t in official().items()}),
    "fc bias": lambda: Case(official() | more("fc.bias", DIM)),
    "normed residual": lambda: Case(
        official(), {"norm_before_residual": True}, normed_residual=True
    ),
    "the target's lm_head": lambda: Case(plain_vocab(), {"draft_vocab_size": None}),
    "an lm_head of all tokens": lambda: Case(
        plain_vocab() | more("lm_head.weight", VOCAB, DIM), {"draft_vocab_size": VOCAB}
    ),
    "tied to its own embedding": lambda: Case(
        plain_vocab() | EMBEDDING, {"draft_vocab_size": None, "tie_word_embeddings": True}
    ),
    "tied to the target's embedding": lambda: Case(
        plain_vocab(), {"draft_vocab_size": None, "tie_word_embeddings": True}
    ),
    "its own embedding": lambda: Case(official() | EMBEDDING),
    "a copy of the target's embedding": lambda: Case(
        official() | {"embed_tokens.weight": target().embed_tokens.weight.clone()}
    ),
    "two layers": lambda: Case(
        renamed("midlayer.", "layers.0.") | SECOND, {"num_hidden_layers": 2}
    ),
    "layers by input": lambda: Case(official(), {AUX: [1, 3, 6]}, layers=(1, 3, 6)),
    "layers by output": lambda: Case(
        official(), {"eagle_config": {AUX: [0, 2, 7]}}, layers=(1, 3, 8)
    ),
    "two features": lambda: Case(official(n_features=2), {AUX: [1, 5]}, layers=(1, 5)),
    "a norm a feature, normed output": lambda: Case(
        official() | tensors_of({f"fc_norm.{n}.weight": (DIM,) for n in range(3)}),
        {"fc_norm": True, "norm_output": True},
        norm_output=True,
    ),
    "a norm before fc": lambda: Case(
        official() | more("input_norm.weight", 3 * DIM), {"norm_before_fc": True}
    ),
    "speculators": lambda: Case(
        renamed("midlayer.", "layers.0.") | EMBEDDING,
        SPECULATORS,
        layout="one.safetensors",
        normed_residual=True,
    ),
    "speculators, residual as it is": lambda: Case(
        renamed("midlayer.", "layers.0."), SPECULATORS | {"norm_before_residual": False}
    ),
    "narrower than its target": lambda: Case(
        official(dim=16) | more("embed_tokens.weight", VOCAB, 16),
        {"hidden_size": 16, "target_hidden_size": DIM},
    ),
    "another theta": lambda: Case(official(), {"rope_theta": 5e5}, theta=5e5),
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_file_drafts_what_the_slow_head_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    slow, folder = SlowHead(case), case.write(tmp_path / "head")
    tree = json.dumps([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    rounds = drafted(load_drafter(folder, target(), tree=tree))
    for text, found in rounds:
        inputs = inputs_of_layers(text[:-1])
        assert found == slow.tree([inputs[layer] for layer in case.layers], text)
    converted = convert(folder, tmp_path / "ours", kind="eagle")
    assert drafted(load_drafter(converted, target(), tree=tree)) == rounds


# -------------------------------------------------------------------------------------- refusals


def shifted(token: int, to: int) -> Tensor:
    ids = torch.tensor(IDS)
    ids[token] = to
    return ids - torch.arange(KEPT)


REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "unknown tensors": (
        lambda: Case(
            official() | {"midlayer.self_attn.rotary": torch.ones(2), "extra": torch.ones(1)}
        ),
        "unknown midlayer.self_attn.rotary, extra",
    ),
    "a missing tensor": (
        lambda: Case(without(official(), "midlayer.mlp.up_proj.weight")),
        r"missing layers.0.mlp.up_proj.weight",
    ),
    "a missing d2t": (lambda: Case(without(official(), "d2t")), "missing d2t"),
    "a missing lm_head": (lambda: Case(without(official(), "lm_head.weight")), "missing lm_head"),
    "an id outside": (
        lambda: Case(official() | {"d2t": shifted(11, VOCAB)}),
        r"d2t leads to token \d+, but the target has",
    ),
    "an id below 0": (
        lambda: Case(official() | {"d2t": shifted(0, -1)}),
        "token -1, but the target",
    ),
    "an id twice": (
        lambda: Case(official() | {"d2t": shifted(4, 7)}),
        r"to token \d+ more than once",
    ),
    "a wide lm_head": (
        lambda: Case(official() | more("lm_head.weight", KEPT + 1, DIM)),
        r"lm_head.weight has shape \[13, 32\]; config.json asks for \[12, 32\]",
    ),
    "an EAGLE-1 q_proj": (
        lambda: Case(official() | more("midlayer.self_attn.q_proj.weight", DIM, DIM)),
        r"midlayer.self_attn.q_proj.weight has shape \[32, 32\]; config.json asks for \[32, 64\]",
    ),
    "a float d2t": (lambda: Case(official() | {"d2t": torch.ones(KEPT)}), "d2t is float32"),
    "another vocabulary": (
        lambda: Case(official(), {"vocab_size": VOCAB + 4}),
        "dim 32 and vocabulary 24, but the target has dim 32 and vocabulary 20",
    ),
    "another width": (
        lambda: Case(official(dim=16) | more("fc.weight", 16, 48), {"hidden_size": 16}),
        "dim 16 and vocabulary 20, but the target has dim 32",
    ),
    "narrow, without an embedding": (
        lambda: Case(official(dim=16), {"hidden_size": 16, "target_hidden_size": DIM}),
        "needs an embedding and an lm_head of its own",
    ),
    "layers past the target's": (
        lambda: Case(official(), {AUX: [2, 4, 9]}),
        "wants the inputs of layers 2, 4, 9, but the target has 8 layers",
    ),
    "no features": (
        lambda: Case(official(), {"eagle_config": {"use_aux_hidden_state": False}}),
        "asks for no aux hidden states",
    ),
    "both norms of features": (
        lambda: Case(official(), {"norm_before_fc": True, "fc_norm": True}),
        "norm_before_fc and fc_norm exclude each other",
    ),
    "a name twice": (
        lambda: Case(official() | {"layers.0.hidden_norm.weight": torch.ones(DIM)}),
        "hidden_norm.weight twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        load_drafter(make().write(tmp_path), target(), tree="chain-2")


# --------------------------------------------------------------------------------- a trained head

PAIR = GOLDEN / "byte_pair"
GOLDEN_CASES = json.loads((GOLDEN / "eagle3.json").read_text())["cases"]


@pytest.fixture(scope="module")
def base() -> Transformer:
    return load_target(PAIR / "base", dtype=torch.float32)


def trace(drafter: Drafter, base: Transformer, case: dict[str, Any]) -> tuple[list[int], list[Any]]:
    engine = Engine(base, drafter)
    limit = len(case["output"]) + 1
    rows = engine.rows([engine.request(case["prompt"], max_new_tokens=limit, stop_ids=[])])
    trees = [engine.state.tree.tokens[0].tolist() for _ in engine.decode(rows)]
    assert rows[0].tokens[:-1] == case["output"]
    return rows[0].stats.accepted, trees[: len(case["trees"])]


def test_a_converted_head_repeats_the_official_rounds(base: Transformer, tmp_path: Path) -> None:
    folder = convert(PAIR / "eagle3", tmp_path / "head")
    drafter = load_drafter(folder, base, tree="dynamic-32-5-8")
    for case in GOLDEN_CASES[:2]:
        accepted, trees = trace(drafter, base, case)
        assert accepted == case["accepted"]
        official_trees = [t["tokens"] if isinstance(t, dict) else t for t in case["trees"]]
        assert trees == official_trees


def test_an_int8_head_is_lossless_and_nearly_as_right(base: Transformer, tmp_path: Path) -> None:
    folder = convert(PAIR / "eagle3", tmp_path / "head")
    file = quantize_checkpoint(plan_quantization(folder, Recipe(8), kind="eagle"))
    drafter = load_drafter(file, base)
    assert isinstance(drafter, Eagle3Drafter)
    prompts = [case["prompt"] for case in GOLDEN_CASES[:3]]
    engine = Engine(base, drafter)
    results = engine.generate(prompts, max_new_tokens=48, stop_ids=[])
    assert texts_of(results) == [case["output"][:48] for case in GOLDEN_CASES[:3]]
    assert sum(each.stats.accept_length for each in results) / 3 > 2


def test_gptq_of_an_eagle3_head_is_refused(tmp_path: Path, refused: Refused) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 50)
    flags = ("--checkpoint_path", PAIR / "eagle3", "--mode", "int4-gptq", "--calibration", text)
    words = "GPTQ of an EAGLE-3 head is not supported; use --mode int4 to round to nearest"
    refused("quantize", *flags, words=words)
