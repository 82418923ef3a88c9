"""Do sampled texts follow the exact law, whoever drafts and whatever shares the batch?

    B batch  N positions  V vocabulary

test_sample.py shows that one uniform chooses one token by the processed distribution. Here drafting
leaves that map as it is; a chi-square test of whole texts then needs none of that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import (
    CPU,
    DRAFTERS,
    SAMPLINGS,
    decode,
    eagle,
    full_pass,
    plain_decode,
    processed,
    prompt,
    seeded,
    tiny_target,
    tokens_of,
)
from scripted_drafters import RandomDrafter
from torch import Tensor

from fasteagle import rounds
from fasteagle.accept import Verdict, accept
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.sample import Knobs, SamplingParams, choose, new_knobs
from fasteagle.tree import DraftTree, static_tree

SMALL = 5  # vocabulary: 125 texts of 3 tokens
N_SEEDS = 2400
TINY_TREE = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def small_target() -> Transformer:
    return tiny_target(seed=3, vocab_size=SMALL, max_positions=64)


def small_drafters() -> dict[str, Callable[[Transformer], Drafter]]:
    return {
        "eagle": lambda target: eagle(target, TINY_TREE),
        "random": lambda target: RandomDrafter(8, 4, SMALL),
    }


@pytest.mark.parametrize("drafter", small_drafters())
@pytest.mark.parametrize("name", SAMPLINGS)
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
        decode(engine, seeded(engine, range(len(cells)), tokens, **SAMPLINGS[name]))
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
        for a, b, c in tokens_of(decode(engine, seeded(engine, seeds, tokens, **SAMPLINGS[name]))):
            counts[(a * SMALL + b) * SMALL + c] += 1
    law = list(exact_law(engine.target, tokens, **SAMPLINGS[name]))
    assert sum(counts) == N_SEEDS
    assert math.isclose(sum(law), 1, abs_tol=1e-5)
    return p_value(counts, law)


@pytest.mark.parametrize("drafter", [*small_drafters(), "none"])
@pytest.mark.parametrize("name", SAMPLINGS)
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
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_seed_gives_the_same_text_with_any_drafter(name: str, drafter: str) -> None:
    target, tokens = tiny_target(), prompt(9)
    plain = Engine(target, batch=2)
    options = {"max_new_tokens": 30, **SAMPLINGS[name]}
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
