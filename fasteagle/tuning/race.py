"""How fast are engines on real text? Rounds only, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from fasteagle.clock import own_timer, visits_in_turn
from fasteagle.compile import Step
from fasteagle.draft.base import Drafter
from fasteagle.engine import Engine
from fasteagle.metrics import Stats, merge
from fasteagle.model import Transformer
from fasteagle.parts import eager_prompts
from fasteagle.request import Generation

CLOSE = 1.12  # who is slower by less than this races once more


class Speed(NamedTuple):
    """What an engine did on all prompts, prefill left out: it is the same for all trees."""

    tokens_per_s: list[float]  # a repeat each
    round_ms: list[float]  # wall time of a round, the host's part included
    tokens_a_round: float

    @property
    def median(self) -> float:
        """Tokens a second."""
        return statistics.median(self.tokens_per_s)

    @property
    def ms(self) -> float:
        """Milliseconds of a round."""
        return statistics.median(self.round_ms)

    def and_then(self, more: Speed) -> Speed:
        """This and further repeats of the same engine on the same prompts."""
        times = self.tokens_per_s + more.tokens_per_s, self.round_ms + more.round_ms
        return Speed(*times, more.tokens_a_round)

    def over(self, other: Speed) -> float:
        """How much faster than another of the same race: the median of the repeats' ratios, which
        a machine that is slow for a while does not change.
        """
        pairs = zip(self.tokens_per_s, other.tokens_per_s, strict=False)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def beside(self, plain: Speed) -> float:
        """Tokens a second at the pace of plain decoding's median: that times the ratio to it."""
        return plain.median * self.over(plain)


def leaders(speeds: Mapping[str, Speed], names: Iterable[str], plain: str) -> list[str]:
    """Those too close to the fastest for one race to tell them apart; fastest first."""
    gains = {name: speeds[name].over(speeds[plain]) for name in names}
    ranked = sorted(gains, key=lambda name: -gains[name])
    return [name for name in ranked if gains[name] * CLOSE >= gains[ranked[0]]]


def racer(
    target: Transformer, drafter: Drafter | None, *, max_length: int, compiled: bool, sampled: bool
) -> Engine:
    """An engine whose rounds are compiled and whose prefill is not: that would be compiled for
    every tree, and is not timed.
    """
    engine = Engine(target, drafter, max_length=max_length, compiled=compiled)
    if compiled:
        eager_prompts(engine, sampled=sampled)
    return engine


def prepare(
    engines: Mapping[str, Engine],
    prompt: Sequence[int],
    limits: Mapping[str, Any],
    *,
    say: Callable[[str], None],
) -> None:
    """Decode a prompt once with every engine, which compiles what it needs."""
    for name, engine in engines.items():
        say(f"preparing {name}")
        engine.generate([prompt], **limits)


def round_step(engine: Engine) -> Step:
    """The step of whole rounds that an engine has built; the last if there are several."""
    return [step for (kind, *_), step in engine.steps.items() if kind == "round"][-1]


@torch.inference_mode()
def decode_ms(engine: Engine, prompt: Sequence[int], limits: Mapping[str, Any]) -> float:
    """Milliseconds of a round while a prompt is decoded, the host's part included, prefill not; by
    the timer of the parts. The text has two tokens or more.
    """
    timer, rows = own_timer(engine.target.device), engine.rows([engine.request(prompt, **limits)])
    steps = engine.decode(rows)
    next(steps)  # prefill
    begin, ends = timer(), [timer() for _ in steps]  # a round behind the last one is not waited for
    return (ends[-1] - begin) * 1000 / len(ends)


def decode_in_turn(
    engines: Mapping[str, Engine],
    prompt: Sequence[int],
    limits: Mapping[str, Any],
    *,
    seconds: float,
) -> dict[str, list[float]]:
    """`decode_ms` of prepared engines, in turn for `seconds` or a little more."""
    visits = {name: partial(decode_ms, e, prompt, limits) for name, e in engines.items()}
    return visits_in_turn(visits, seconds=seconds)


def race(
    engines: Mapping[str, Engine],
    prompts: Sequence[Sequence[int]],
    limits: Mapping[str, Any],
    *,
    repeats: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Speed], dict[str, list[Generation]]]:
    """Speeds by engine, which take turns on every prompt, and what they wrote last. Prepare them
    first.
    """
    runs: dict[str, list[Stats]] = {name: [] for name in engines}
    written: dict[str, list[Generation]] = {}
    for repeat in range(1, repeats + 1):
        written = {name: [] for name in engines}
        for prompt in prompts:
            for name, engine in engines.items():
                written[name] += engine.generate([prompt], **limits)
        for name, found in written.items():
            runs[name].append(merge([result.stats for result in found]))
        say(f"race {repeat} of {repeats}")
    return {name: speed_of(found, len(prompts)) for name, found in runs.items()}, written


def speed_of(runs: Sequence[Stats], n_prompts: int) -> Speed:
    """The Speed of repeats, each merged over `n_prompts`; the first token of each is prefill's."""
    seconds = [max(run.seconds - run.ttft * n_prompts, 1e-9) for run in runs]
    tokens, rounds = runs[-1].new_tokens - n_prompts, max(1, runs[-1].rounds)
    return Speed(
        [tokens / s for s in seconds], [1000 * s / rounds for s in seconds], tokens / rounds
    )
