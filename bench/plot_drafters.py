"""What does a comparison of drafters look like? A picture of a JSON of bench/drafters.py.

python bench/plot_drafters.py bench/results/drafters_demo_cpu.json
python bench/plot_drafters.py bench/results/drafters_7b.json --out drafters.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#3b6ea5", "#d98032", "#5a9367", "#8c6bb1")
LABELS = {
    "plain": "plain",
    "eagle_chain": "EAGLE, chain",
    "eagle_tree": "EAGLE, 26 nodes",
    "eagle2": "EAGLE-2",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "standalone": "draft model",
    "lookup": "prompt lookup",
    "lookahead": "Lookahead",
}


def bars(result: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, tuple[float, float]]]]:
    """Drafters, and by kind of text each one's (times plain, tokens a target pass)."""
    names = list(result["rounds"])
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, found in result["texts"].items():
        groups[kind] = {
            name: (found.get(f"{name}_over_plain", 1.0), row["accept_length"])
            for name, row in found["engines"].items()
        }
    known = {n: r for n, r in result["simulated"].items() if r["accept_length"]}
    if known:
        groups["simulated acceptance"] = {
            name: (row["over_plain"], row["accept_length"]) for name, row in known.items()
        }
    return names, groups


def draw(result: dict[str, Any], out: Path) -> None:
    """Two panels side by side: speed over plain, tokens a target pass."""
    names, groups = bars(result)
    size = (11, 0.55 * len(names) + 1.8)
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    height = 0.8 / max(1, len(groups))
    for which, (panel, title) in enumerate(
        zip(panels, ("times plain decoding", "tokens a target pass"), strict=True)
    ):
        for place, (kind, rows) in enumerate(groups.items()):
            values = [rows.get(name, (0.0, 0.0))[which] for name in names]
            at = [row + height * (place - (len(groups) - 1) / 2) for row in range(len(names))]
            drawn = panel.barh(at, values, height, color=COLOURS[place], label=kind)
            panel.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
        panel.set_title(title, fontsize=10)
        panel.axvline(1.0, color="#888888", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.12)
    panels[0].set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    panels[0].invert_yaxis()
    if groups:
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    machine = result["environment"]["gpu"] or result["environment"]["machine"]
    named = machine.get("name") or machine.get("processor") or ""
    compiled = "compiled" if result["compiled"] else "not compiled"
    figure.suptitle(f"{result['size']}, {result['dtype']}, {compiled}; {named}", fontsize=10)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    path = Path(args.json)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read ({error}); give a JSON of bench/drafters.py")
    if result.get("bench") != "drafters":
        sys.exit(f"{path} is of another bench; give a JSON of bench/drafters.py")
    out = Path(args.out) if args.out else path.with_suffix(".png")
    draw(result, out)
    print(f"wrote {out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", help="what bench/drafters.py wrote")
    parser.add_argument("--out", help="PNG to write; default: beside the JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
