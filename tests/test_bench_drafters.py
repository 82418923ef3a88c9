"""Do the small heads learn what decoding asks of them, and are drafters compared on equal terms?

B batch  S tokens of a window  C model dim  V vocabulary
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plain_decode, prompt, tiny_target

from bench import head_losses
from bench.head_losses import LOSSES, Batch, Trained, start
from bench.train_heads import observe
from fasteagle import demo, load
from fasteagle.assemble import load_drafter
from fasteagle.draft.base import Accepted, Room
from fasteagle.draft.eagle3 import Eagle3Drafter, Eagle3Head
from fasteagle.engine import Engine
from fasteagle.model import Transformer, run_block
from fasteagle.tree import chain

ROOT = Path(__file__).resolve().parents[1]
HEADS = {
    "eagle3": ROOT / "bench/heads/eagle3",
    "medusa": ROOT / "bench/heads/medusa/model_int8.safetensors",
    "standalone": ROOT / "bench/heads/standalone",
}
WINDOW = 24


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(head_losses, "DRAFT_VOCAB", 8)
    return tiny_target(n_layers=6, tie_embeddings=True)


def begun(kind: str, target: Transformer) -> tuple[Trained, Batch]:
    torch.manual_seed(0)
    counts = torch.arange(target.config.vocab_size)
    trained = start(kind, target, counts)
    tokens = torch.tensor([prompt(WINDOW, 3), prompt(WINDOW, 4)])
    return trained, observe(target, tokens, trained.layers)


@pytest.mark.parametrize("kind", LOSSES)
def test_training_lowers_every_loss(kind: str, target: Transformer) -> None:
    trained, batch = begun(kind, target)
    weights = [p for p in trained.module.parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in target.state_dict().items()}
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    first = [float(loss.detach()) for loss, _ in LOSSES[kind](trained.module, batch)]
    for _ in range(30):
        optimizer.zero_grad()
        sum(loss for loss, _ in LOSSES[kind](trained.module, batch)).backward()
        optimizer.step()
    last = [float(loss.detach()) for loss, _ in LOSSES[kind](trained.module, batch)]
    # The random base is nearly undecided, and no cross-entropy falls below its entropy.
    assert all(b < a - 1e-3 for a, b in zip(first, last, strict=True)), (first, last)
    assert all(torch.equal(p, frozen[n]) for n, p in target.state_dict().items())


@torch.no_grad()
def test_training_time_test_is_what_decoding_does(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step j of row i: the state that a chain has after the tokens i + 2 .. i + 1 + j were guessed.
    trained, batch = begun("eagle3", target)
    head = trained.module
    assert isinstance(head, Eagle3Head)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        head_losses, "cross_entropy", lambda scores, *_: (seen.append(scores), (scores.sum(), 0))[1]
    )
    LOSSES["eagle3"](head, batch)
    drafter = Eagle3Drafter(head.eval(), target, chain(head_losses.STEPS))
    given = iter(())
    monkeypatch.setattr(drafter, "tokens", lambda guesses: next(given))
    for row in (0, 7, 16):
        room = Room(drafter.new_memory(1, 64), 64, run_block)
        count = torch.tensor([row + 1])
        tokens = batch.tokens[:1]
        news = Accepted(
            features=batch.features[:1, : row + 1],
            tokens=tokens[:, : row + 1],
            following=tokens[:, 1 : row + 2],
            start=torch.tensor([0]),
            n_valid=count,
        )
        state = drafter.extend(news, room)
        scores: list[torch.Tensor] = []
        make = drafter.logits
        monkeypatch.setattr(
            drafter, "logits", lambda s, make=make, scores=scores: scores.append(make(s)) or make(s)
        )
        given = iter([tokens[:, [row + 2 + j], None] for j in range(head_losses.STEPS)])
        drafter.propose(state, tokens[:, [row + 1]], count, room)
        monkeypatch.setattr(drafter, "logits", make)
        for step in range(head_losses.STEPS):
            torch.testing.assert_close(scores[step][0, 0], seen[step][0, row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_trained_head_is_stored_as_the_hub_has_them(
    kind: str, target: Transformer, tmp_path: Path
) -> None:
    trained, _ = begun(kind, target)
    trained.save(tmp_path)
    drafter = load_drafter(tmp_path, target, tree="chain-2")
    assert drafter.name == kind
    own, stored = trained.module.state_dict(), drafter.weights.state_dict()  # type: ignore[union-attr]
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, own[name].half().to(tensor.dtype), rtol=0, atol=0)
    tokens = prompt(9)
    result = Engine(target, drafter).generate([tokens], max_new_tokens=12, stop_ids=[])[0]
    assert result.tokens == plain_decode(target, tokens, 12)


@pytest.mark.parametrize("kind", HEADS)
def test_the_committed_heads_are_small_lossless_and_useful(kind: str) -> None:
    path = HEADS[kind]
    folder = path if path.is_dir() else path.parent
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000
    plain = load(None, "none", dtype="float32", device="cpu")
    engine = Engine(plain.target, load_drafter(path, plain.target), tokenizer=plain.tokenizer)
    texts = ["def read_lines(path):\n", "class Stack:\n    def __init__(self):\n"]
    limits: dict[str, Any] = {"max_new_tokens": 48, "stop_ids": []}
    results = engine.generate(texts, **limits)
    assert [r.tokens for r in results] == [r.tokens for r in plain.generate(texts, **limits)]
    assert sum(r.stats.accept_length for r in results) / 2 > 1.5
    assert demo.BASE.is_dir()


def run_script(name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    runpy.run_path(str(ROOT / f"bench/{name}.py"), run_name="__main__")


def test_drafters_take_turns_on_every_kind_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "drafters.json"
    flags = ["--prompts", "1", "--repeats", "1", "--max_new_tokens", "12", "--no-compile"]
    run_script("drafters", [*flags, "--out", str(out)], monkeypatch)
    result = json.loads(out.read_text())
    assert result["identical_tokens"]
    assert set(result["texts"]) == {"code", "prose", "repeated"}
    assert result["simulated"] == {}
    for found in result["texts"].values():
        assert set(found["engines"]) == set(result["rounds"])
        assert len(found["engines"]) == 9
    for name, row in result["rounds"].items():
        assert row["round_ms"]["median"] > 0
        assert name == "plain" or 0 < row["share_drafting"] < 1.5

    run_script("plot_drafters", [str(out)], monkeypatch)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.json"
    for text, words in (('{"bench": "rounds"}', "another bench"), ("[", "cannot be read")):
        other.write_text(text)
        with pytest.raises(SystemExit, match=words):
            run_script("plot_drafters", [str(other)], monkeypatch)
