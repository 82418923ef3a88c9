"""What did tuning find? A table, a line, the file beside the head and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from fasteagle.metrics import significant
from fasteagle.tree import StaticTree, Tree
from fasteagle.tuning.candidates import Candidate
from fasteagle.tuning.costs import Costs
from fasteagle.tuning.result import PLAIN, Tuning
from fasteagle.tuning.setting import Settings
from fasteagle.tuning.shapes import paths_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TREES, CHAINS, CHOSEN = "#3b6ea5", "#d98032", "#b03030"


def rounded(value: Any) -> Any:
    """Numbers of nested values cut to their significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return significant(value) if isinstance(value, float) else value


def tree_value(tree: Tree) -> Any:
    """A tree as JSON: paths of ranks, or a dynamic tree's numbers."""
    return paths_of(tree) if isinstance(tree, StaticTree) else asdict(tree)


def rows_of(result: Tuning) -> dict[str, dict[str, Any]]:
    """The race, by name of what ran."""
    plain = result.speeds[PLAIN]
    rows: dict[str, dict[str, Any]] = {
        PLAIN: {"rows": 1, "depth": 0, "tokens_a_round": plain.tokens_a_round}
        | {"by_parts": None, "predicted": None}
    }
    for name, candidate in result.raced.items():
        rows[name] = {
            "rows": candidate.tree.n_nodes,
            "depth": candidate.depth,
            "tokens_a_round": result.speeds[name].tokens_a_round,
            "by_parts": result.by_parts[name].speed,
            "predicted": candidate.speed,
        }
    for name, row in rows.items():
        row["measured"] = result.measured(name)
        row["over_plain"] = result.speeds[name].over(plain)
        row["round_ms"] = 1000 * row["tokens_a_round"] / row["measured"]
    return rows


def table(result: Tuning) -> str:
    """The race for people, fastest first."""
    line = "{:<20}{:>6}{:>7}{:>10}{:>10}{:>11}{:>10}{:>9}\n"
    text = line.format("tree", "rows", "depth", "tokens", "ms", "predicted", "measured", "x plain")
    ordered = sorted(rows_of(result).items(), key=lambda row: -row[1]["over_plain"])
    for name, row in ordered:
        predicted = "-" if row["predicted"] is None else f"{row['predicted']:.4g}"
        mark = " *" if name == result.name else ""
        text += line.format(
            name + mark,
            row["rows"],
            row["depth"],
            f"{row['tokens_a_round']:.2f}",
            f"{row['round_ms']:.4g}",
            predicted,
            f"{row['measured']:.4g}",
            f"{row['over_plain']:.2f}",
        )
    return text + (
        "tokens and ms a round; predicted and measured tokens/s, prefill left out; x plain: the "
        "median of the repeats' ratios, which measured is plain's times\n"
    )


def summary(result: Tuning) -> str:
    """What was chosen, in a line."""
    name, ratio = result.name, result.gain
    if result.plain_is_faster:
        return (
            f"plain decoding is faster here: {result.plain:.4g} tokens/s, {ratio:.2f} of it with "
            f"the best tree, {name}\n"
        )
    return (
        f"{name} is the fastest: {result.measured(name):.4g} tokens/s, {ratio:.2f}x plain decoding "
        f"(predicted {result.best.speed:.4g})\n"
    )


def file_text(
    result: Tuning, place: dict[str, Any], settings: Settings, prompts: Sequence[Sequence[int]]
) -> bytes:
    """tree.json: a line for every field, so that it reads and compares well."""
    costs = result.costs
    value = {
        "tree": tree_value(result.best.tree),
        "plain_is_faster": result.plain_is_faster,
        "predicted_tokens_per_s": result.best.speed,
        "by_parts_tokens_per_s": result.by_parts[result.name].speed,
        "measured_tokens_per_s": result.measured(result.name),
        "plain_tokens_per_s": result.plain,
        "measured_on": place,
        "compiled": settings.compiled,
        "prompts": {
            "count": len(prompts),
            "tokens": sum(map(len, prompts)),
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.sampling.temperature,
        },
        "same_tokens": result.same,
        "race": rows_of(result),
        "verify_ms": costs.verify,
        "draft_ms": {"chain": costs.chain, "first_level": costs.base, "level": costs.level},
        "rest_ms": costs.rest,
        "pace_of_race": result.pace,
        "slower_ms": result.slower,
        "acceptance": result.table,
        "best_by_rows": {
            rows: {"tree": tree_value(c.tree), "tokens_a_round": c.tokens, "predicted": c.speed}
            for rows, c in best_by_rows(result.candidates).items()
        },
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(rounded(part))}" for key, part in value.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def best_by_rows(candidates: Sequence[Candidate], *, chains: bool = False) -> dict[int, Candidate]:
    """The fastest predicted static tree of every size, or the chains."""
    found: dict[int, Candidate] = {}
    for candidate in candidates:
        if candidate.tree.is_chain or not chains:
            found.setdefault(candidate.tree.n_nodes, candidate)
    return dict(sorted(found.items()))


def most_by_rows(candidates: Sequence[Candidate]) -> dict[int, float]:
    """The most tokens a round of any static tree of every size, however slow."""
    found: dict[int, float] = {}
    for candidate in candidates:
        rows = candidate.tree.n_nodes
        found[rows] = max(found.get(rows, 0.0), candidate.tokens)
    return dict(sorted(found.items()))


def draw(result: Tuning, place: dict[str, Any], file: BinaryIO) -> None:
    """Three panels over the rows of a tree: a round's time, what it yields, tokens a second."""
    import matplotlib as mpl  # an extra: not needed without --plot

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    trees = best_by_rows(result.candidates)
    chains = best_by_rows(result.candidates, chains=True)
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    draw_times(panels[0], result.costs.scaled(result.pace), trees)
    most = most_by_rows(result.candidates)
    panels[1].plot(list(most), list(most.values()), color="#aaaaaa", label="most of any tree")
    for panel, value in ((panels[1], lambda c: c.tokens), (panels[2], lambda c: c.speed)):
        for found, colour, words in ((trees, TREES, "fastest tree"), (chains, CHAINS, "chain")):
            panel.plot(list(found), [value(c) for c in found.values()], color=colour, label=words)
    panels[1].set_title("tokens a round, counted along the texts", fontsize=10)
    panels[2].set_title("tokens/s", fontsize=10)
    draw_race(panels[2], result)
    best = result.best
    panels[1].plot(best.tree.n_nodes, best.tokens, "*", color=CHOSEN, markersize=13, label="chosen")
    for panel in panels:
        panel.set_xlabel("rows of a tree, the root included")
        panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="lower right")
    figure.suptitle(
        f"{place['name']}, {place['precision']}: {summary(result).strip()}", fontsize=10
    )
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def draw_times(panel: Axes, costs: Costs, trees: dict[int, Candidate]) -> None:
    """Verifying, as measured; what drafting and the rest of a round of the best tree add."""
    rows = sorted(n for n in costs.verify if n <= max(trees, default=1))
    verify = [costs.verify[n] for n in rows]
    panel.plot(rows, verify, "o-", color=TREES, markersize=4, label="verify, T(rows)")
    whole = [c.ms for c in trees.values()]
    panel.plot(list(trees), whole, color=CHAINS, label="a round of the fastest tree")
    panel.set_title("milliseconds", fontsize=10)


def draw_race(panel: Axes, result: Tuning) -> None:
    """What was measured, over the predictions."""
    for name, candidate in result.raced.items():
        best = name == result.name
        panel.plot(
            candidate.tree.n_nodes,
            result.measured(name),
            "*" if best else "o",
            color=CHOSEN if best else "#333333",
            markersize=13 if best else 4,
            label="chosen, measured" if best else None,
        )
    panel.axhline(result.plain, color="#888888", linestyle="--", label="plain decoding, measured")
