"""Does a pruned draft vocabulary change speed only, and is it counted right?

B batch  S rows  V vocabulary  K kept ids
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BUSHY,
    GOLDEN,
    MC_SIM,
    VOCAB,
    Refused,
    Run,
    plain_decode,
    prompt,
    tiny_head,
    tiny_target,
)

from fasteagle import EagleModel, demo
from fasteagle.assemble import load_drafter
from fasteagle.checkpoint import convert
from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.draft.grow import best
from fasteagle.draft.vocabulary import FILE, head_rows, most_frequent
from fasteagle.engine import Engine
from fasteagle.model import Linear, Transformer, pack
from fasteagle.sample import SamplingParams
from fasteagle.tree import StaticTree, chain

PAIR = GOLDEN / "byte_pair"
BYTES = 260  # ids of the golden pair: byte + 3
TEXT = b"class Reader:\n    def __init__(self, name):\n        self."
TREES = {"mc_sim": MC_SIM, "bushy": BUSHY, "chain": chain(5), "one": chain(1)}
KEPT = torch.tensor([1, 2, 5, 7, 8, 11, 12, 18])  # of the tiny vocabulary


def frequent(size: int) -> torch.Tensor:
    """The `size` bytes that this file holds most of: `[K]`."""
    ids = torch.tensor(list(Path(__file__).read_bytes())) + 3
    return most_frequent(torch.bincount(ids, minlength=BYTES), size)


def vocab_json(path: Path, **changes: Any) -> Path:
    held = {"format": "fasteagle draft vocabulary", "vocab_size": 2048, "ids": [2, 3, 5, 7, 300]}
    path.write_text(json.dumps(held | changes))
    return path


# ------------------------------------------------------------------------------------ drafting


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_output_is_that_of_plain_decoding_and_of_all_tokens(
    tree: StaticTree, size: int, golden_pair: tuple[Transformer, EagleHead]
) -> None:
    target, head = golden_pair
    drafters = [
        None,
        EagleDrafter(head, target, tree),
        EagleDrafter(head, target, tree, frequent(size)),
    ]
    tokens = [[byte + 3 for byte in TEXT]]
    sampling = SamplingParams(temperature=0.8, seed=4) if size == 8 else SamplingParams()
    limits: dict[str, Any] = {"max_new_tokens": 30, "stop_ids": [], "sampling": sampling}
    plain, full, pruned = (
        Engine(target, drafter).generate(tokens, **limits)[0] for drafter in drafters
    )
    assert plain.tokens == full.tokens == pruned.tokens
    assert pruned.stats.accept_length > 1.0


def test_all_tokens_kept_draft_what_no_vocabulary_drafts(
    golden_pair: tuple[Transformer, EagleHead],
) -> None:
    target, head = golden_pair
    engines = [
        Engine(target, EagleDrafter(head, target, MC_SIM, vocab))
        for vocab in (None, torch.arange(BYTES))
    ]
    rows = [
        e.rows([e.request([byte + 3 for byte in TEXT], max_new_tokens=24, stop_ids=[])])
        for e in engines
    ]
    for _ in zip(*(e.decode(row) for e, row in zip(engines, rows, strict=True)), strict=True):
        trees = [engine.state.tree.tokens.tolist() for engine in engines]
        assert trees[0] == trees[1]


@pytest.mark.parametrize("tree", [MC_SIM, chain(4)], ids=["mc_sim", "chain"])
def test_only_kept_tokens_are_proposed(tree: StaticTree) -> None:
    target, tokens = tiny_target(), prompt(9)
    engine = Engine(target, EagleDrafter(tiny_head(target), target, tree, KEPT))
    rows = engine.rows([engine.request(tokens, max_new_tokens=24, stop_ids=[])])
    for _ in engine.decode(rows):
        found, parents = (side[0].tolist() for side in engine.state.tree)
        assert set(found[1:]) <= set(KEPT.tolist())
        edges = list(zip(parents[1:], found[1:], strict=True))
        assert len(set(edges)) == len(edges)
    assert rows[0].tokens == plain_decode(target, tokens, 24)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_guesses_are_the_full_ranking_without_the_other_tokens(width: int) -> None:
    target = tiny_target()
    head, hidden = tiny_head(target), torch.randn(2, 3, target.config.dim)
    every, some = (EagleDrafter(head, target, chain(1), vocab) for vocab in (None, KEPT))
    full = every.tokens(best(every.logits(hidden), VOCAB))
    pruned = some.tokens(best(some.logits(hidden), width))
    kept = set(KEPT.tolist())
    for row, ranking in zip(
        pruned.flatten(0, 1).tolist(), full.flatten(0, 1).tolist(), strict=True
    ):
        assert row == [token for token in ranking if token in kept][:width]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_the_lm_head_are_a_copy(tied: bool, packed: bool) -> None:
    target = tiny_target(seed=5 + packed, tie_embeddings=tied, vocab_size=64)
    hidden, ids = torch.randn(2, 3, 32), torch.tensor([0, 17, 18, 63])
    expected = target.logits(hidden)[..., ids]
    if packed:
        pack(target)
    layer = head_rows(target, ids)
    assert isinstance(layer, Linear)
    torch.testing.assert_close(layer(hidden), expected)
    owned = [weight.untyped_storage().data_ptr() for weight in target.parameters()]
    assert layer.weight.untyped_storage().data_ptr() not in owned
    assert not layer.weight.requires_grad


def test_the_heads_own_state_is_left_alone_and_the_rows_are_packed() -> None:
    target = tiny_target(seed=8, vocab_size=64)
    head = tiny_head(target)
    before = set(head.state_dict())
    drafter = EagleDrafter(head, target, BUSHY, torch.arange(3, 51, 3))
    assert set(head.state_dict()) == before
    head.load_state_dict(head.state_dict(), strict=True)
    assert drafter.weights is not None
    assert any(part is drafter.draft_lm_head for part in drafter.weights.modules())
    Engine(target, drafter, compiled=True)
    assert drafter.draft_lm_head is not None
    assert drafter.draft_lm_head.weight.dim() == 3
    again = EagleDrafter(head, target, BUSHY, torch.arange(3, 51, 3))  # from rows of panels
    assert again.draft_lm_head is not None
    pack(again.weights)
    assert torch.equal(again.draft_lm_head.weight, drafter.draft_lm_head.weight)


def test_a_compiled_engine_writes_what_an_eager_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a step on panels, traced without generating code; sampled graphs draw, too."""
    sampling = SamplingParams(0.9, seed=2)
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda step, options, **how: traced(step, **how))
    target = tiny_target(seed=9, max_positions=48, vocab_size=64)
    drafter = EagleDrafter(tiny_head(target), target, BUSHY, torch.arange(0, 64, 2))
    eager, compiled = (
        Engine(target, drafter, compiled=on, prefill_chunk=8).generate(
            [[5, 9, 60, 3, 1]], max_new_tokens=30, stop_ids=[], sampling=sampling
        )[0]
        for on in (False, True)
    )
    assert eager.tokens == compiled.tokens
    assert eager.stats.accepted == compiled.stats.accepted


@pytest.mark.parametrize(
    ("vocab", "words"),
    [
        ([], "must list token ids"),
        ([3, 3], "lists 3 before 3"),
        ([5, 3], "lists 5 before 3"),
        ([-1, 3], "lists id -1"),
        ([3, VOCAB], f"lists id {VOCAB}; the vocabulary is 0 to {VOCAB - 1}"),
        ([3, 4, 5], "guess number 3 of a draft vocabulary of 3; use a narrower --tree or a larger"),
    ],
)
def test_ids_that_do_not_fit_are_refused(vocab: list[int], words: str) -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match=words):
        EagleDrafter(tiny_head(target), target, MC_SIM, torch.tensor(vocab, dtype=torch.int64))


# ------------------------------------------------------------------------------------- loading


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A copy of the embedded head to write beside."""
    shutil.copytree(demo.HEAD, tmp_path / "head")
    return tmp_path / "head"


def test_a_file_beside_the_head_is_found_and_can_be_switched_off(
    pair: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n    return self.x\n" * 9)
    flags = ("--checkpoint_path", demo.BASE, "--draft_checkpoint_path", pair)
    run("draft-vocab", "--size", 64, "--text", tmp_path / "a.txt", *flags)
    assert (pair / FILE).is_file()
    ask = ("generate", *flags, "--prompt", "def f(", "--max_new_tokens", 12)
    text, note = run(*ask)
    assert "tree chain-3, draft vocabulary 64 of 2048" in note
    other, note = run(*ask, "--draft_vocab", "none")
    assert "draft vocabulary" not in note
    assert other == text
    (tmp_path / "v.json").write_bytes((pair / FILE).read_bytes())
    (pair / FILE).write_text("{")
    run("draft-vocab", "--size", 32, "--text", tmp_path / "a.txt", *flags)  # replaces a broken one
    _, note = run(*ask, "--draft_vocab", tmp_path / "v.json")
    assert "draft vocabulary 64 of 2048" in note


def test_the_plan_counts_the_rows(pair: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    vocab_json(pair / FILE, ids=list(range(1000)))
    flags = ("doctor", "--draft_checkpoint_path", pair, "--device", "cpu", "--dtype", "float32")
    sizes = []
    for more in ((), ("--draft_vocab", "none")):
        out, _ = run(*flags, *more)
        assert ("draft vocabulary 1000 of 2048" in out) == (not more)
        (line,) = [line for line in out.splitlines() if line.startswith("  head weights")]
        sizes.append(float(line.split()[2]))
    assert sizes[0] - sizes[1] == pytest.approx(1000 * 256 * 4 / 1e6, abs=0.11)


def test_converting_and_the_old_names_keep_it(tmp_path: Path) -> None:
    shutil.copytree(PAIR / "eagle1", tmp_path / "head")
    vocab_json(tmp_path / "head" / FILE, vocab_size=BYTES, ids=frequent(32).tolist())
    folder = convert(tmp_path / "head", tmp_path / "out")
    model = EagleModel.from_pretrained(
        base_model_path=PAIR / "base", ea_model_path=folder, torch_dtype=torch.float32
    )
    assert torch.equal(model.drafter.vocab, frequent(32))  # type: ignore[arg-type]
    ids = [[byte + 3 for byte in TEXT]]
    limits: dict[str, Any] = {"max_new_tokens": 12, "tree_choices": [[0], [1], [0, 0]]}
    found = model.eagenerate(ids, **limits)
    assert torch.equal(found, model.naivegenerate(ids, max_new_tokens=12))
    made = {engine.drafter.weights is not None for engine in model._engines.values()}
    assert made == {True, False}
    off = load_drafter(folder, model.target, draft_vocab="none")
    assert off.vocab is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "is no draft vocabulary"),
        ({"vocab_size": "2048"}, "is no draft vocabulary"),
        ({"ids": {}}, "is no draft vocabulary"),
        ({"ids": []}, "must list token ids"),
        ({"ids": [1, 2.5]}, "must list token ids"),
        ({"ids": [1, True]}, "must list token ids"),
        ({"ids": [1, 1]}, "lists 1 before 1"),
        ({"ids": [9, 1]}, "lists 9 before 1"),
        ({"ids": [1, 2048]}, "lists id 2048"),
        ({"ids": [1, 10**30]}, "lists id 1000"),
        ({"vocab_size": 32000}, "counted for a vocabulary of 32000, but the target has 2048"),
        ({"ids": [7], "tree": ""}, ""),
    ],
)
def test_a_wrong_file_is_one_line(
    refused: Refused, run: Run, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = vocab_json(tmp_path / "v.json", **changes)
    flags = ("generate", "--prompt", "x", "--max_new_tokens", 2, "--draft_vocab", path)
    if words:
        refused(*flags, words=words)
    else:
        assert "draft vocabulary 1 of 2048" in run(*flags)[1]
