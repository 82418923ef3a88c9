"""Does choosing one token follow the processed distribution?

    B batch  N positions  V vocabulary

A token is the inverse CDF of one uniform a position: the processed distribution is Hugging Face's,
and the map from uniform to token has its probabilities as lengths.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SAMPLINGS, knobs_of, processed
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasteagle.sample import SamplingParams, choose


def hugging_face(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    transformers = pytest.importorskip("transformers")
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    ties=st.booleans(),
    vocab=st.integers(2, 40),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.3, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 100]),
    top_p=st.sampled_from([0.01, 0.3, 0.8, 0.95, 1.0]),
)
def test_the_processed_distribution_is_hugging_faces(
    seed: int, ties: bool, vocab: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    ours = processed(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    theirs = hugging_face(logits, temperature, top_k, top_p)
    if top_p < 1:
        # Where the mass reaches p within rounding, either side is right.
        mass = hugging_face(logits, temperature, top_k, 1.0).sort(descending=True).values.cumsum(0)
        assume(float((mass - top_p).abs().min()) > 1e-5)
    if ties and top_p < 1:  # which of two equal tokens top-p keeps is nobody's promise
        ours, theirs = ours.sort().values, theirs.sort().values
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_ties_with_the_kth_token_stay() -> None:
    probs = processed(torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]), temperature=1.0, top_k=2)
    assert (probs > 0).tolist() == [True, True, True, False, True]


def test_top_p_never_keeps_less_than_one_token() -> None:
    assert processed(torch.tensor([0.0, 3.0, 1.0]), temperature=1.0, top_p=1e-6).tolist() == [
        0.0,
        1.0,
        0.0,
    ]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_uniforms_map_to_tokens_with_the_processed_lengths(name: str) -> None:
    # Over a grid of n midpoints a token's share is its interval's length to within one cell.
    n_cells = 20_000
    grid = (torch.arange(n_cells) + 0.5) / n_cells
    for seed in range(5):
        logits = 2 * torch.randn(7, generator=torch.Generator().manual_seed(seed))
        knobs = knobs_of(n_cells, **SAMPLINGS[name])
        knobs.uniforms[0] = grid
        positions = torch.arange(n_cells)[None]
        chosen = choose(logits.expand(1, n_cells, -1), positions, knobs, sampled=True)[0]
        n_changes = int((chosen.diff() != 0).sum())
        expected = processed(logits, **SAMPLINGS[name])
        assert n_changes + 1 == int((expected > 0).sum()), "a token must own one interval"
        share = chosen.bincount(minlength=7) / n_cells
        torch.testing.assert_close(share, expected, atol=2 / n_cells, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_outermost_uniforms_choose_kept_tokens(uniform: float) -> None:
    logits = torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(0))
    knobs = knobs_of(1, temperature=1.0, top_p=0.9)
    knobs.uniforms.fill_(uniform)
    token = int(choose(logits, torch.zeros(1, 1, dtype=torch.int64), knobs, sampled=True))
    assert processed(logits[0, 0], temperature=1.0, top_p=0.9)[token] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)
