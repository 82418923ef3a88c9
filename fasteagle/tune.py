"""Which tree is the fastest for a pair, on this device, in this precision?

1. The target writes its texts; a wide tree drafted along them tells acceptance by depth and rank.
2. The parts of a round are timed alone: verifying by rows, drafting by level and width.
3. Every size, depth and width is predicted: tokens a round over milliseconds a round.
4. The whole rounds of the best few are timed in turn. What they take longer than their parts is
   added to all, and a tree that then looks better joins them.
5. They race plain decoding on the prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fasteagle.clock import clock, own_timer
from fasteagle.engine import DEFAULT_ROOM, Engine
from fasteagle.tree import Tree
from fasteagle.tuning.acceptance import (
    Record,
    Text,
    accepted_by,
    most_tokens,
    record,
    table_of,
    tokens_a_round,
    wide_tree,
)
from fasteagle.tuning.candidates import (
    Candidate,
    by_rounds,
    counted,
    different,
    dynamic_candidates,
    later,
    second_look,
    slower_ms,
    static_candidates,
    with_a_chain,
)
from fasteagle.tuning.costs import ROWS_CPU, ROWS_CUDA, Costs, Workshop, measure
from fasteagle.tuning.race import (
    Speed,
    decode_in_turn,
    decode_ms,
    leaders,
    prepare,
    race,
    racer,
    round_step,
)
from fasteagle.tuning.result import PLAIN, Tuning, label, named
from fasteagle.tuning.setting import DEPTH, ROWS, Pair, Settings
from fasteagle.tuning.shapes import Table

GAIN = 1.15  # a dynamic tree may yield this much more than a static one of its size
DYNAMIC_RACERS = 1
HOST_RUNS = 3
RUN_OFF = 2  # times the repeats of the race


def write_texts(pair: Pair, prompts: Sequence[Sequence[int]], settings: Settings) -> list[Text]:
    """What the target answers, decoded plainly and eagerly."""
    longest = max(map(len, prompts)) + settings.max_new_tokens
    limit = min(pair.target.config.max_positions, longest)
    engine = Engine(pair.target, max_length=limit)
    found = [engine.generate([prompt], **settings.limits)[0] for prompt in prompts]
    return [Text(p, r.tokens) for p, r in zip(prompts, found, strict=True)]


def check_texts(texts: Sequence[Text]) -> None:
    """ValueError where there is nothing to count."""
    if sum(max(0, len(text.new) - 1) for text in texts) < 2:
        raise ValueError(
            "the model ends its text at once after these prompts, so no guess can be counted; give "
            "other prompts or more --max_new_tokens"
        )


def caches_for(pair: Pair, texts: Sequence[Text]) -> int:
    """How long engines' sequences may be: as far as texts go with a tree after them, filled up to
    the bucket that such texts are decoded in.
    """
    longest = max(len(text.prompt) + len(text.new) for text in texts) + 2 * ROWS
    size = 512
    while size < longest:
        size *= 2
    return min(pair.target.config.max_positions, max(size - ROWS - 1, 2), DEFAULT_ROOM)


def workshop(
    pair: Pair, texts: Sequence[Text], settings: Settings, say: Callable[[str], None]
) -> Workshop:
    """Where parts are timed: in caches as long as the texts are on average."""
    room = caches_for(pair, texts)
    mean = statistics.mean(len(text.prompt) + len(text.new) / 2 for text in texts)
    sampled = not settings.sampling.greedy
    context = max(1, min(int(mean), room - DEPTH))
    return Workshop(pair.target, pair.make, context, room, settings.compiled, sampled, say)


def tune(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Find the fastest tree for these prompts (token ids). ValueError if they give no text."""
    say(f"writing {len(prompts)} texts")
    texts = write_texts(pair, prompts, settings)
    check_texts(texts)
    found = acceptance(pair, texts, say)
    table = table_of(found)
    shop = workshop(pair, texts, settings, say)
    ladder = ROWS_CUDA if pair.target.device.type == "cuda" and settings.compiled else ROWS_CPU
    most = max(2, settings.rows)
    costs = measure(
        shop,
        rows=[*(n for n in ladder if n < most), most],
        most=most_tokens(found),
        deepest=pair.deepest,
        n_guesses=pair.n_guesses,
        seconds=settings.seconds,
    )
    if pair.target.device.type == "cuda":
        torch.cuda.empty_cache()
    return Racecourse(pair, texts, found, table, prompts, settings, shop, say).choose(costs)


def acceptance(pair: Pair, texts: Sequence[Text], say: Callable[[str], None]) -> Record:
    """Where the texts go in a wide tree."""
    depth = min(DEPTH, pair.deepest)
    tree = wide_tree(depth=depth, n_guesses=pair.n_guesses)
    n_roots = sum(max(0, len(text.new) - 1) for text in texts)
    say(f"drafting {tree.n_nodes - 1} guesses at {n_roots} places of the texts")
    return record(pair.target, pair.make(tree), tree, texts)


class Racecourse(NamedTuple):
    """All that a choice needs beside costs."""

    pair: Pair
    texts: Sequence[Text]
    found: Record
    table: Table
    prompts: Sequence[Sequence[int]]
    settings: Settings
    shop: Workshop
    say: Callable[[str], None]

    def choose(self, costs: Costs) -> Tuning:
        """Predict all trees, time the rounds of those that look best, and race them."""
        engines = {PLAIN: self._engine(None)}
        self.say("timing what the host does in a round")
        host = host_ms(engines[PLAIN], *self._rehearsal())
        costs = costs._replace(rest=host)
        statics = static_candidates(self.table, self.found, costs, rows=self.rows(costs))
        trees = with_a_chain(different(statics, self.settings.racers), statics)
        raced = named([*trees, *self._dynamic(statics, costs), self._usual(costs)])
        whole = self._time_rounds(engines, raced, costs)
        new = second_look(later(statics, costs, slower_ms(raced, whole)), whole)
        if new is not None:
            self.say(f"{label(new.tree)} looks better by whole rounds: once more with it")
            raced = named([*raced.values(), new.at(costs)])
            whole = self._time_rounds(engines, raced, costs)
        speeds, same = self._race(engines)
        speeds = self._run_off(engines, list(raced), speeds)
        pace = speeds[PLAIN].ms / costs.round_ms(None)
        paced, slower = costs.scaled(pace), pace * slower_ms(raced, whole)
        return Tuning(
            table=self.table,
            costs=costs,
            candidates=later(statics, paced, slower),
            name=leaders(speeds, raced, PLAIN)[0],
            speeds=speeds,
            raced={name: c._replace(ms=pace * c.ms) for name, c in whole.items()},
            by_parts={name: c.at(paced) for name, c in raced.items()},
            pace=pace,
            slower=slower,
            same=same,
            max_length=self.shop.max_length,
        )

    def _rehearsal(self) -> tuple[Sequence[int], dict[str, Any]]:
        """The prompt with the longest text, and limits by which rounds follow for certain."""
        text = max(self.texts, key=lambda text: len(text.new))
        sure = {"max_new_tokens": len(text.new), "stop_ids": []}
        return text.prompt, self.settings.limits | sure

    def _time_rounds(
        self, engines: dict[str, Engine], raced: Mapping[str, Candidate], costs: Costs
    ) -> dict[str, Candidate]:
        """Racers with their whole rounds' time; engines that are not there yet are added."""
        new = {name: self._engine(c.tree) for name, c in raced.items() if name not in engines}
        prompt, limits = self._rehearsal()
        prepare(new, prompt, limits, say=self.say)
        engines |= new
        self.say(f"timing rounds of {len(engines)} engines in turn")
        rounds = decode_in_turn(engines, prompt, limits, seconds=self.settings.seconds)
        return by_rounds(raced, costs, rounds, plain=rounds[PLAIN])

    def rows(self, costs: Costs) -> int:
        """Of the largest tree: where verifying was not measured, it cannot pay."""
        return min(self.settings.rows, max(costs.verify))

    def _run_off(
        self, engines: Mapping[str, Engine], names: Sequence[str], speeds: Mapping[str, Speed]
    ) -> dict[str, Speed]:
        """Speeds with a longer race of those that one race cannot tell apart, and of plain."""
        close = leaders(speeds, names, PLAIN)
        if len(close) < 2:
            return dict(speeds)
        self.say(f"once more between {', '.join(close)}")
        some = {name: engines[name] for name in (PLAIN, *close)}
        settings, repeats = self.settings, RUN_OFF * self.settings.repeats
        more, _ = race(some, self.prompts, settings.limits, repeats=repeats, say=self.say)
        return {n: s.and_then(more[n]) if n in more else s for n, s in speeds.items()}

    def _dynamic(self, statics: Sequence[Candidate], costs: Costs) -> list[Candidate]:
        guesses = dynamic_candidates(
            self.table,
            statics,
            costs,
            rows=self.rows(costs),
            n_guesses=self.pair.n_guesses,
        )
        found = counted(guesses, self._count, most=2, beat=statics[0].speed / GAIN)
        return found[:DYNAMIC_RACERS]

    def _count(self, tree: Tree) -> float:
        self.say(f"counting what {tree.name} yields")
        drafter = self.pair.make(tree)
        return tokens_a_round(accepted_by(self.pair.target, drafter, self.texts))

    def _usual(self, costs: Costs) -> Candidate:
        tree = self.pair.usual
        return Candidate(tree, self._count(tree), costs.round_ms(tree))

    def _engine(self, tree: Tree | None) -> Engine:
        return racer(
            self.pair.target,
            None if tree is None else self.pair.make(tree),
            max_length=self.shop.max_length,
            compiled=self.settings.compiled,
            sampled=not self.settings.sampling.greedy,
        )

    def _race(self, engines: Mapping[str, Engine]) -> tuple[dict[str, Speed], bool]:
        settings = self.settings
        speeds, written = race(
            engines, self.prompts, settings.limits, repeats=settings.repeats, say=self.say
        )
        texts = [[result.tokens for result in found] for found in written.values()]
        return speeds, all(text == texts[0] for text in texts)


@torch.inference_mode()
def host_ms(engine: Engine, prompt: Sequence[int], limits: Mapping[str, Any]) -> float:
    """What a plain round takes beside its step, both by the timer of the parts."""
    device = engine.target.device
    found = [decode_ms(engine, prompt, limits) for _ in range(HOST_RUNS)]
    timer = own_timer(device)
    ms = clock(round_step(engine), device, repeats=9, rounds=9, timer=timer)
    return max(0.0, statistics.median(found) - statistics.median(ms))
