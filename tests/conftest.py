"""What do the tests share? Tiny random models, slow twins, every drafter, and the command line.

B batch  S new tokens  C model dim  V vocabulary
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from drafter_kinds import (  # noqa: F401
    DRAFTERS,
    DRAFTS,
    EXPERTS,
    KINDS,
    SCRIPTED,
    SMALL,
    short_engine,
    tiny_drafter,
    tiny_weights,
)
from hf_folders import everything
from scripted_drafters import VOCAB  # noqa: F401
from tiny_models import (  # noqa: F401
    BUSHY,
    CPU,
    MC_SIM,
    eagle,
    prompt,
    randomize,
    tiny_head,
    tiny_target,
    tree_choices,
)
from tokenizer_folders import write_tokenizers
from torch import Tensor

from fasteagle import load
from fasteagle.checkpoint import load_head, load_target
from fasteagle.commands.main import main
from fasteagle.draft.eagle import EagleHead
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Generation, Request
from fasteagle.sample import Knobs, SamplingParams, distribution, new_knobs
from fasteagle.tree import causal_mask

torch.set_num_threads(1)
os.environ["FASTEAGLE_CACHE"] = "off"  # what an earlier run compiled would hide what this one does

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_pair() -> tuple[Transformer, EagleHead]:
    target = load_target(GOLDEN / "byte_pair" / "base", dtype=torch.float32)
    return target, load_head(GOLDEN / "byte_pair" / "eagle1", target)


# ------------------------------------------------------------------------------------ running


def full_pass(target: Transformer, tokens: Sequence[int]) -> Tensor:
    """Hidden states `[1, S, C]` of a whole sequence in one pass on a fresh cache."""
    slots = torch.arange(len(tokens), device=target.device)[None]
    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.inference_mode():
        kv = target.new_cache(1, len(tokens))
        return target(ids, slots, slots, causal_mask(slots, len(tokens)), kv)[0]


def first_gaps(
    target: Transformer, prompts: list[list[int]], texts: list[list[list[int]]]
) -> list[float]:
    """For every prompt whose two texts differ: the gap of the two best logits where they part."""
    gaps = []
    for tokens, one, other in zip(prompts, *texts, strict=True):
        assert len(one) == len(other)
        parts = [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if parts:
            hidden = full_pass(target, [*tokens, *one[: parts[0]]])[0, -1]
            best = target.logits(hidden).float().topk(2).values
            gaps.append(float(best[0] - best[1]))
    return gaps


@cache
def _plain(target: Transformer, tokens: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    sequence = list(tokens)
    for _ in range(n_tokens):
        sequence.append(int(target.logits(full_pass(target, sequence)[0, -1]).argmax()))
    return tuple(sequence[len(tokens) :])


def plain_decode(target: Transformer, tokens: Sequence[int], n_tokens: int) -> list[int]:
    """The slow twin: greedy decoding that computes the whole sequence again for every token."""
    return list(_plain(target, tuple(tokens), n_tokens))


def decode(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Requests of any mix of limits and sampling, as one batch."""
    rows = engine.rows(requests)
    for _ in engine.decode(rows):
        pass
    return [row.result() for row in rows]


def tokens_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def seeded(engine: Engine, seeds: Sequence[int], tokens: Sequence[int], **sampling: float) -> list:
    """One request a seed for the same prompt, with 3 new tokens unless told otherwise."""
    limit = int(sampling.pop("max_new_tokens", 3))
    return [
        engine.request(
            tokens,
            max_new_tokens=limit,
            sampling=SamplingParams(seed=seed, **sampling),
            stop_ids=[],
        )
        for seed in seeds
    ]


SAMPLED = SamplingParams(temperature=0.9, top_k=6, top_p=0.9, seed=3)
SAMPLINGS = {
    "hot": {"temperature": 1.0},
    "top_k": {"temperature": 0.7, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
}


def knobs_of(n_slots: int = 8, **sampling: float) -> Knobs:
    knobs = new_knobs(1, n_slots, CPU)
    knobs.load(0, SamplingParams(seed=0, **sampling))
    return knobs


def processed(logits: Tensor, **sampling: float) -> Tensor:
    """Probabilities `[V]` in token order."""
    probs, ids = distribution(logits[None, None], knobs_of(**sampling))
    return torch.zeros_like(logits).scatter(0, ids[0, 0], probs[0, 0])


# ------------------------------------------------------------------------------------ commands

Run = Callable[..., tuple[str, str]]
Refused = Callable[..., None]


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The embedded pair; tests leave it as it is."""
    return load(dtype="float32", device="cpu")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line with `typed` on stdin; gives its stdout and stderr."""

    def call(*argv: str | Path, typed: str = "", status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main([str(part) for part in argv]) == status
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command line in an empty folder; it must fail, name `words` and change no file."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str | Path, words: str) -> None:
        before = everything(tmp_path)
        status = main([str(part) for part in argv])
        out, error = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert len(error.splitlines()) == 1, error
        assert error.startswith("error: ")
        assert words in error
        assert everything(tmp_path) == before

    return call


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder of every kind."""
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
