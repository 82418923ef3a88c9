"""Does choosing follow the processed distribution, whoever drafts?

    B batch  N positions  V vocabulary

A token is the inverse CDF of one uniform a position. So the laws come in three steps: the processed
distribution is Hugging Face's; the map from uniform to token has its probabilities as lengths; and
drafting leaves that map as it is. A chi-square test of whole texts then needs none of that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import (
    DRAFTERS,
    RandomDrafter,
    decode,
    eagle,
    full_pass,
    plain_decode,
    prompt,
    seeded,
    tiny_target,
    tokens_of,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasteagle import rounds
from fasteagle.accept import Verdict, accept
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.sample import Knobs, SamplingParams, choose, distribution, new_knobs
from fasteagle.tree import DraftTree, static_tree

CPU = torch.device("cpu")
SETTINGS = {
    "hot": {"temperature": 1.0},
    "top_k": {"temperature": 0.7, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
}
SMALL = 5  # vocabulary: 125 texts of 3 tokens
N_SEEDS = 2400
TINY_TREE = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def knobs_of(n_slots: int = 8, **sampling: float) -> Knobs:
    knobs = new_knobs(1, n_slots, CPU)
    knobs.load(0, SamplingParams(seed=0, **sampling))
    return knobs


def processed(logits: Tensor, **sampling: float) -> Tensor:
    """Probabilities `[V]` in token order."""
    probs, ids = distribution(logits[None, None], knobs_of(**sampling))
    return torch.zeros_like(logits).scatter(0, ids[0, 0], probs[0, 0])


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


@pytest.mark.parametrize("name", SETTINGS)
def test_uniforms_map_to_tokens_with_the_processed_lengths(name: str) -> None:
    # Over a grid of n midpoints a token's share is its interval's length to within one cell.
    n_cells = 20_000
    grid = (torch.arange(n_cells) + 0.5) / n_cells
    for seed in range(5):
        logits = 2 * torch.randn(7, generator=torch.Generator().manual_seed(seed))
        knobs = knobs_of(n_cells, **SETTINGS[name])
        knobs.uniforms[0] = grid
        positions = torch.arange(n_cells)[None]
        chosen = choose(logits.expand(1, n_cells, -1), positions, knobs, sampled=True)[0]
        n_changes = int((chosen.diff() != 0).sum())
        expected = processed(logits, **SETTINGS[name])
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


# ---------------------------------------------------------------- whole texts


def small_target() -> Transformer:
    return tiny_target(seed=3, vocab_size=SMALL, max_positions=64)


def small_drafters() -> dict[str, Callable[[Transformer], Drafter]]:
    return {
        "eagle": lambda target: eagle(target, TINY_TREE),
        "random": lambda target: RandomDrafter(8, 4, SMALL),
    }


@pytest.mark.parametrize("drafter", small_drafters())
@pytest.mark.parametrize("name", SETTINGS)
def test_drafting_leaves_the_map_from_uniforms_to_texts_alone(
    name: str, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All texts of 3 tokens over a grid of uniforms, one cell a row: the joint law, bonus included.
    target, tokens, n_cells = small_target(), prompt(4, vocab=SMALL), 7
    cells = list(itertools.product(range(n_cells), repeat=3))
    grid = torch.full((len(cells), 64 + 32), torch.nan)
    grid[:, len(tokens) - 1 : len(tokens) + 2] = (torch.tensor(cells) + 0.5) / n_cells
    monkeypatch.setattr(Knobs, "load", load_from(grid))
    engines = [Engine(target, batch=len(cells)), None]
    engines[1] = Engine(target, small_drafters()[drafter](target), batch=len(cells))
    plain, drafted = (
        decode(engine, seeded(engine, range(len(cells)), tokens, **SETTINGS[name]))
        for engine in engines
    )
    assert tokens_of(plain) == tokens_of(drafted)
    assert len({tuple(text) for text in tokens_of(plain)}) > 15
    assert sum(sum(one.stats.accepted) for one in drafted) > len(cells) / 4, "nothing accepted"


def load_from(grid: Tensor) -> Callable[[Knobs, int, SamplingParams], None]:
    def load(knobs: Knobs, row: int, params: SamplingParams) -> None:
        knobs.temperature[row], knobs.top_p[row] = params.temperature, params.top_p
        knobs.top_k[row] = params.top_k
        knobs.uniforms[row] = grid[row, : knobs.uniforms.shape[1]]

    return load


def exact_law(target: Transformer, tokens: list[int], **sampling: float) -> Iterator[float]:
    """Probability of every text of 3 tokens, in lexicographic order, from whole-sequence passes."""

    def after(text: tuple[int, ...]) -> Tensor:
        logits = target.logits(full_pass(target, [*tokens, *text])[0, -1])
        return processed(logits, **sampling)

    ids = range(target.config.vocab_size)
    first = after(())
    for a in ids:
        second = after((a,))
        for b in ids:
            third = after((a, b))
            yield from (float(first[a] * second[b] * third[c]) for c in ids)


def p_value(counts: list[int], law: list[float]) -> float:
    """Chi-square test of counts against a law; cells that expect under 5 are pooled."""
    n_draws = sum(counts)
    if any(count and not p for count, p in zip(counts, law, strict=True)):
        return 0.0
    cells = [(c, p * n_draws) for c, p in zip(counts, law, strict=True)]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = (
        sum(c for c, e in cells if e < 5),
        sum(e for _, e in cells if e < 5),
    )
    tested = [*large, rest] if rest[1] >= 1 else large
    chi = sum((c - e) ** 2 / e for c, e in tested)
    half_df = torch.tensor((len(tested) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_df, torch.tensor(chi / 2, dtype=torch.float64)))


def p_value_of(engine: Engine, name: str) -> float:
    """How likely the texts of `N_SEEDS` seeds are under the exact law."""
    tokens = prompt(4, vocab=SMALL)
    counts = [0] * SMALL**3
    for first in range(0, N_SEEDS, engine.batch):
        seeds = range(first, first + engine.batch)
        for a, b, c in tokens_of(decode(engine, seeded(engine, seeds, tokens, **SETTINGS[name]))):
            counts[(a * SMALL + b) * SMALL + c] += 1
    law = list(exact_law(engine.target, tokens, **SETTINGS[name]))
    assert sum(counts) == N_SEEDS
    assert math.isclose(sum(law), 1, abs_tol=1e-5)
    return p_value(counts, law)


@pytest.mark.parametrize("drafter", [*small_drafters(), "none"])
@pytest.mark.parametrize("name", SETTINGS)
def test_texts_follow_the_exact_law(name: str, drafter: str) -> None:
    target = small_target()
    drafting = small_drafters().get(drafter, lambda target: None)(target)
    assert p_value_of(Engine(target, drafting, batch=300), name) > 0.01


def raw_bonus(logits: Tensor, positions: Tensor, knobs: Knobs, *, sampled: bool) -> Tensor:
    """The defect of older code: temperature, top-k and top-p are forgotten."""
    n = knobs.top_k.shape[0]
    plain = new_knobs(n, 1, CPU)
    plain.temperature.fill_(1.0)
    return choose(logits, positions, plain._replace(uniforms=knobs.uniforms), sampled=sampled)


def one_uniform(logits: Tensor, positions: Tensor, knobs: Knobs, *, sampled: bool) -> Tensor:
    """Every token alone is right, but they are not independent draws."""
    return choose(logits, torch.full_like(positions, 3), knobs, sampled=sampled)


def eager_accept(tree: DraftTree, above: Tensor, chosen: Tensor, *, n_path: int) -> Verdict:
    """Takes the likeliest draft for the second choice as well as for the first."""
    second = chosen[:, :1] + 1 == tree.tokens[:, 1:2]
    lenient = chosen.clone()
    lenient[:, :1] = torch.where(second, tree.tokens[:, 1:2], chosen[:, :1])
    return accept(tree, above, lenient, n_path=n_path)


@pytest.mark.parametrize(
    ("name", "part", "broken"),
    [
        ("top_k", "choose", raw_bonus),
        ("top_p", "choose", raw_bonus),
        ("hot", "choose", one_uniform),
        ("hot", "accept", eager_accept),
    ],
    ids=["raw_top_k", "raw_top_p", "one_uniform", "lenient"],
)
def test_a_broken_decoder_fails_the_chi_square(
    name: str, part: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, part, broken)
    target = small_target()
    assert p_value_of(Engine(target, eagle(target, TINY_TREE), batch=300), name) < 1e-6


# ---------------------------------------------------------------- seeds and rows


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_seed_gives_the_same_text_with_any_drafter(name: str, drafter: str) -> None:
    target, tokens = tiny_target(), prompt(9)
    plain = Engine(target, batch=2)
    options = {"max_new_tokens": 30, **SETTINGS[name]}
    expected = tokens_of(decode(plain, seeded(plain, [5, 6], tokens, **options)))
    truth = [tokens + text for text in expected]
    engine = Engine(target, DRAFTERS[drafter](target, truth), batch=2)
    results = decode(engine, seeded(engine, [5, 6], tokens, **options))
    assert tokens_of(results) == expected
    assert expected[0] != expected[1]
    if drafter == "oracle":
        assert results[0].stats.accepted[:-1] == [5] * (len(results[0].stats.accepted) - 1)


def test_without_a_seed_texts_differ() -> None:
    engine = Engine(tiny_target())
    sampling = SamplingParams(temperature=2.0)
    texts = [engine.generate([prompt(5)], max_new_tokens=20, sampling=sampling) for _ in range(3)]
    assert len({tuple(text[0].tokens) for text in texts}) == 3


def test_a_rows_text_does_not_depend_on_the_other_rows() -> None:
    target = tiny_target()
    engine = Engine(target, eagle(target), batch=4, prefill_chunk=8)
    kinds = [{}, {"temperature": 0.8, "top_k": 4}, {"temperature": 1.5}, {"temperature": 0.0}]
    requests = [
        engine.request(
            prompt(3 + 9 * row),
            max_new_tokens=25,
            sampling=SamplingParams(seed=row, **kind),
            stop_ids=[],
        )
        for row, kind in enumerate(kinds)
    ]
    together = tokens_of(decode(engine, requests))
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        mixed = tokens_of(decode(engine, [requests[row] for row in order]))
        assert mixed == [together[row] for row in order]
    single = Engine(target, eagle(target))
    assert [tokens_of(decode(single, [request]))[0] for request in requests] == together
    for row in (0, 3):  # greedy rows of a sampled batch
        assert together[row] == plain_decode(target, prompt(3 + 9 * row), 25)


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
