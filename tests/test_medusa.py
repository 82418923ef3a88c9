"""Do Medusa heads guess what their files say, from every layout that they come in?

B batch  C model dim  V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, Refused, Run, full_pass, plain_decode, prompt, tiny_target, tokens_of
from hf_folders import Tensors, random_tensors
from safetensors.torch import save_file
from scripted_drafters import VOCAB
from torch import Tensor

from fasteagle.assemble import load_drafter
from fasteagle.checkpoint import convert
from fasteagle.draft.medusa import MedusaDrafter, medusa_tree
from fasteagle.engine import Engine
from fasteagle.quantize import Recipe, plan_quantization, quantize_checkpoint
from fasteagle.tree import DynamicTree, StaticTree

C = 32  # of the tiny targets
CONFIG = {"medusa_num_heads": 3, "medusa_num_layers": 1, "base_model_name_or_path": "some/model"}
WIDE = [[0], [1], [4], [0, 0], [0, 3], [4, 1], [0, 3, 2], [4, 1, 0]]


def medusa_tensors(
    n_heads: int = 3, n_layers: int = 1, dim: int = C, vocab: int = VOCAB
) -> Tensors:
    """What Medusa's training writes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(n_heads):
        for layer in range(n_layers):
            shapes[f"{head}.{layer}.linear.weight"] = (dim, dim)
            shapes[f"{head}.{layer}.linear.bias"] = (dim,)
        shapes[f"{head}.{n_layers}.weight"] = (vocab, dim)
    return {name: tensor / 4 for name, tensor in random_tensors(shapes, seed=3).items()}


def write(folder: Path, tensors: Tensors, layout: str = "pt", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if layout == "safetensors":
        save_file(tensors, folder / "medusa_lm_head.safetensors")
    else:
        torch.save(tensors, folder / "medusa_lm_head.pt")
    return folder


def scores_of(tensors: Tensors, head: int, hidden: Tensor, n_layers: int = 1) -> Tensor:
    """The slow twin of a head: hidden `[C]` -> log probabilities `[V]`, in plain products."""
    for layer in range(n_layers):
        y = tensors[f"{head}.{layer}.linear.weight"] @ hidden
        y = y + tensors[f"{head}.{layer}.linear.bias"]
        hidden = hidden + y * torch.sigmoid(y)
    return torch.log_softmax(tensors[f"{head}.{n_layers}.weight"] @ hidden, 0)


def check_rounds(
    drafter: MedusaDrafter, expected: Callable[[Tensor, int], tuple[list[int], list[int]]]
) -> None:
    """Every round's tree is `expected` of the last accepted token's hidden state and the root."""
    target, tokens = tiny_target(), prompt(11)
    engine = Engine(target, drafter, prefill_chunk=8)
    rows = engine.rows([engine.request(tokens, max_new_tokens=12, stop_ids=[])])
    for (row,) in engine.decode(rows):
        if not row.done:
            so_far = [*tokens, *row.tokens]
            hidden = full_pass(target, so_far[:-1])[0, -1]
            found = tuple(part[0].tolist() for part in engine.state.tree)
            assert found == expected(hidden, so_far[-1])
    assert rows[0].tokens == plain_decode(target, tokens, 12)


def check_static(drafter: MedusaDrafter, tensors: Tensors, n_layers: int = 1) -> None:
    tree = drafter.tree
    assert isinstance(tree, StaticTree)

    def expected(hidden: Tensor, root: int) -> tuple[list[int], list[int]]:
        tokens = [root]
        for depth, rank in zip(tree.depth[1:], tree.rank[1:], strict=True):
            order = scores_of(tensors, depth - 1, hidden, n_layers).argsort(descending=True)
            tokens.append(int(order[rank]))
        return tokens, list(tree.parents)

    check_rounds(drafter, expected)


# ------------------------------------------------------------------------------------- files

LAYOUTS: dict[str, Callable[[Path], tuple[Path, Tensors, int]]] = {
    "pt": lambda path: (write(path, medusa_tensors()), medusa_tensors(), 1),
    "safetensors": lambda path: (write(path, medusa_tensors(), "safetensors"), medusa_tensors(), 1),
    "a file": lambda path: (
        write(path, medusa_tensors()) / "medusa_lm_head.pt",
        medusa_tensors(),
        1,
    ),
    "with a prefix": lambda path: (
        write(path, {f"medusa_head.{n}": t for n, t in medusa_tensors().items()}),
        medusa_tensors(),
        1,
    ),
    "two layers": lambda path: (
        write(path, medusa_tensors(3, 2), medusa_num_layers=2),
        medusa_tensors(3, 2),
        2,
    ),
    "no sizes in config.json": lambda path: (
        write(path, medusa_tensors(3, 2), medusa_num_layers=None, medusa_num_heads=None),
        medusa_tensors(3, 2),
        2,
    ),
    "converted": lambda path: (
        convert(write(path, medusa_tensors()), path.with_name("out")),
        medusa_tensors(),
        1,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_node_is_a_guess_of_the_head_of_its_depth(layout: str, tmp_path: Path) -> None:
    path, tensors, n_layers = LAYOUTS[layout](tmp_path / "heads")
    drafter = load_drafter(path, tiny_target(), tree=json.dumps(WIDE))
    assert isinstance(drafter, MedusaDrafter)
    check_static(drafter, tensors, n_layers)


@torch.inference_mode()
def test_all_heads_of_a_file_are_used_where_config_states_fewer(tmp_path: Path) -> None:
    # Published files hold 5 heads beside a config of 2.
    path = write(tmp_path, medusa_tensors(5), medusa_num_heads=2)
    drafter = load_drafter(path, tiny_target())
    assert isinstance(drafter, MedusaDrafter)
    assert len(drafter.heads) == 5
    assert (drafter.n_nodes, drafter.n_path) == (64, 5)
    check_static(drafter, medusa_tensors(5))


@pytest.mark.parametrize(("n_heads", "n_nodes"), [(1, 11), (2, 39), (3, 62), (4, 64), (5, 64)])
def test_the_own_tree_is_as_deep_as_there_are_heads(n_heads: int, n_nodes: int) -> None:
    tree = medusa_tree(n_heads)
    assert tree.n_nodes == n_nodes
    assert tree.n_path == min(n_heads, 4) + 1


# ------------------------------------------------------------------------------ dynamic trees


def dynamic_twin(levels: list[Tensor], tree: DynamicTree, root: int) -> tuple[list[int], list[int]]:
    """EAGLE-2's rule by lists: levels of log probabilities `[V]`; the tree's tokens and parents."""
    k = tree.top_k
    ranked = [level.topk(k) for level in levels]
    flat: list[tuple[float, int, int]] = []  # score, token, number of its parent or -1
    frontier = [(0.0, -1)]
    for scores, tokens in ranked:
        first = len(flat)
        for score, number in frontier:
            pairs = zip(scores.tolist(), tokens.tolist(), strict=True)
            flat += [(score + more, token, number) for more, token in pairs]
        new = sorted(range(first, len(flat)), key=lambda n: -flat[n][0])[:k]
        frontier = [(flat[n][0], n) for n in new]
    kept = sorted(sorted(range(len(flat)), key=lambda n: -flat[n][0])[: tree.n_nodes - 1])
    parents = [0 if flat[n][2] < 0 else kept.index(flat[n][2]) + 1 for n in kept]
    return [root, *(flat[n][1] for n in kept)], [0, *parents]


@pytest.mark.parametrize(
    "tree", [DynamicTree(12, 2, 4), DynamicTree(5, 1, 3), DynamicTree(3, 0, 5)]
)
@torch.inference_mode()
def test_a_dynamic_tree_holds_the_likeliest_paths(tree: DynamicTree, tmp_path: Path) -> None:
    tensors = medusa_tensors()
    drafter = load_drafter(write(tmp_path, tensors), tiny_target(), tree=tree.name)
    assert isinstance(drafter, MedusaDrafter)

    def expected(hidden: Tensor, root: int) -> tuple[list[int], list[int]]:
        levels = [scores_of(tensors, head, hidden) for head in range(tree.depth + 1)]
        return dynamic_twin(levels, tree, root)

    check_rounds(drafter, expected)


# ---------------------------------------------------------------------------------- quantizing


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_heads_load_and_change_no_text(bits: int, tmp_path: Path) -> None:
    folder, target = write(tmp_path, medusa_tensors()), tiny_target()
    file = quantize_checkpoint(plan_quantization(folder, Recipe(bits)))
    prompts = [prompt(5), prompt(19)]
    exact, rounded = (
        Engine(target, load_drafter(path, target)).generate(prompts, max_new_tokens=16, stop_ids=[])
        for path in (folder / "medusa_lm_head.pt", file)
    )
    assert tokens_of(exact) == tokens_of(rounded)
    assert tokens_of(exact) == [plain_decode(target, tokens, 16) for tokens in prompts]


def test_doctor_plans_the_heads(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = write(tmp_path, medusa_tensors(dim=96, vocab=260))
    pair = ("--checkpoint_path", GOLDEN / "byte_pair/base", "--draft_checkpoint_path", folder)
    out, _ = run("doctor", *pair, "--device", "cpu")
    assert "a set of Medusa heads, 3 heads of 1 layers of 96, vocabulary 260" in out
    assert "Medusa heads, tree of 62 nodes: 62 nodes with the root" in out
    n_bytes = 4 * sum(tensor.numel() for tensor in medusa_tensors(dim=96, vocab=260).values())
    assert f"head weights{n_bytes / 1e6:15,.1f} MB" in out


# ------------------------------------------------------------------------------------ refusals


def without(name: str) -> Tensors:
    return {n: t for n, t in medusa_tensors().items() if n != name}


REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "a bias is missing": (without("1.0.linear.bias"), {}, "missing 1.0.linear.bias"),
    "a head is missing": (without("1.1.weight"), {}, "missing 1.1.weight"),
    "fewer heads than stated": (medusa_tensors(1), {}, "missing 1.0.linear.weight"),
    "another tensor": (
        medusa_tensors() | {"0.2.scale": torch.ones(1)},
        {},
        "unknown 0.2.scale",
    ),
    "a name twice": (
        medusa_tensors() | {"medusa_head.0.1.weight": torch.ones(VOCAB, C)},
        {},
        "0.1.weight twice",
    ),
    "a wrong shape": (
        medusa_tensors() | {"2.1.weight": torch.ones(VOCAB + 1, C)},
        {},
        r"2.1.weight has shape \[21, 32\]; config.json asks for \[20, 32\]",
    ),
    "another target's width": (medusa_tensors(dim=16), {}, "for a model of dim 16"),
    "another target's vocabulary": (medusa_tensors(vocab=21), {}, "vocabulary 21, but the target"),
    "another activation": (medusa_tensors(), {"hidden_act": "gelu"}, "only silu is supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    tensors, config, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        load_drafter(write(tmp_path, tensors, **config), tiny_target())


@pytest.mark.parametrize("tree", ["chain-4", "dynamic-12-3-4"])
def test_a_tree_deeper_than_there_are_heads_is_refused(tree: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 deep, but there are 3 Medusa heads"):
        load_drafter(write(tmp_path, medusa_tensors()), tiny_target(), tree=tree)


def test_medusa_heads_take_no_draft_vocabulary(tmp_path: Path) -> None:
    folder = write(tmp_path, medusa_tensors())
    held = {"format": "fasteagle draft vocabulary", "vocab_size": VOCAB, "ids": [1, 2]}
    (folder / "draft_vocab.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match="drop --draft_vocab, or give none"):
        load_drafter(folder, tiny_target(), tree="chain-1")
    assert load_drafter(folder, tiny_target(), tree="chain-1", draft_vocab="none").n_nodes == 2


def test_medusa_heads_are_no_target_and_have_no_gptq(tmp_path: Path, refused: Refused) -> None:
    folder = write(tmp_path / "heads", medusa_tensors())
    model = ("--checkpoint_path", folder)
    flags = ("--prompt_ids", "ids.json", "--max_new_tokens", "3", "--out", "out.json")
    (tmp_path / "ids.json").write_text("[[1]]")
    refused("trace", *model, *flags, words="is a set of Medusa heads, not a target model")
    refused("doctor", *model, words="is a set of Medusa heads; give it as --draft_checkpoint_path")
    text = tmp_path / "text.txt"
    text.write_text("words " * 50)
    gptq = ("--mode", "int4-gptq", "--calibration", text)
    refused("quantize", *model, *gptq, words="GPTQ of a set of Medusa heads is not supported")
    refused("quantize", *model, "--mode", "int8", "--lm_head", "4", words="drop --lm_head")


def test_heads_under_the_names_of_a_whole_model_are_no_head_file(tmp_path: Path) -> None:
    both = medusa_tensors() | {"model.embed_tokens.weight": torch.ones(VOCAB, C)}
    with pytest.raises(ValueError, match="architecture MedusaLlama is not supported"):
        load_drafter(write(tmp_path, both, architectures=["MedusaLlama"]), tiny_target())


def test_medusa_heads_remember_nothing(tmp_path: Path) -> None:
    drafter = load_drafter(write(tmp_path, medusa_tensors()), tiny_target(), tree=json.dumps(WIDE))
    assert drafter.new_memory(1, 64) is None
    assert drafter.n_ahead == len(WIDE) + 1
