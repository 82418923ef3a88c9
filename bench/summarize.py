"""What came out of all the stages of bench/gpu.sh? One short table and one JSON object.

python bench/summarize.py bench/results/speed_7b_bfloat16.json bench/results/demo_pair_cuda.json
python bench/summarize.py --status stages.txt --out summary.json bench/results/*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import describe, device_argument, finish


def read_status(path: str | None) -> dict[str, dict[str, Any]]:
    """Lines of `stage exit-code seconds`."""
    rows = [line.split() for line in Path(path).read_text().splitlines()] if path else []
    return {name: {"exit": code, "seconds": int(seconds)} for name, code, seconds in rows}


def digest(found: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of a result that a goal is stated in."""
    if found["bench"] == "demo_pair":
        keys = ("eagle_over_plain", "eagle_tree_over_plain", "identical_tokens")
        return {key: found.get(key) for key in keys}
    if found["bench"] == "kernels":
        return {"models": found["models"], "out_of_time": found["out_of_time"]}
    if found["bench"] == "drafters":
        rows = found["simulated"].items()
        shares = {name: row.get("over_plain") for name, row in rows}
        return {"simulated_over_plain": shares, "size": found["size"]}
    if found["bench"] == "acceptance":
        groups = found["temperatures"].items()
        return {f"tau_{t}": kinds["all"]["accept_length"] for t, kinds in groups}
    if found["bench"] == "attention":
        return {name: [row["us"] for row in rows] for name, rows in found["attention"].items()}
    if found["bench"] == "scaling":
        return {"points": len(found["points"]), "out_of_time": len(found["out_of_time"])}
    return {"acceptance": found["acceptance"]} | {
        name: digest_speed(row) for name, row in found["precisions"].items()
    }


def digest_speed(row: dict[str, Any]) -> dict[str, Any]:
    """The same of one precision of speed.py."""
    plain, eagle = (row["engines"][name] for name in ("plain", "eagle"))
    launches = (row["launches"] or {}).get("eagle", {})
    return {
        "plain_ms": plain["device_ms"],
        "round_ms": eagle["device_ms"],
        "eagle_over_plain_decoding": row["eagle_over_plain_decoding"],
        "accept_length": eagle["accept_length"],
        "plain_share_of_copy_bandwidth": plain["share_of_copy_bandwidth"],
        "round_over_parts": row["round"].get("round_over_parts"),
        "verify_over_plain": row["round"].get("verify_over_plain"),
        "kernels": launches.get("kernels"),
        "graph_launches": launches.get("graph_launches"),
        "blocking_syncs_in_step": launches.get("blocking_syncs_in_step"),
        "first_run_seconds": row["first_run_seconds"],
        "peak_memory_gib": row["peak_memory_gib"],
    }


def main(args: argparse.Namespace) -> None:
    stages = read_status(args.status)
    found = {}
    for path in map(Path, args.files):
        # A stage that failed left no file, or one of an earlier run.
        stage = stages.get(path.stem, {"exit": None if stages else "0"})
        if path.is_file() and stage["exit"] == "0":
            found[path.stem] = digest(json.loads(path.read_text()))
    failed = sorted(name for name, stage in stages.items() if stage["exit"] != "0")  # or missing
    result = {
        "bench": "gpu_summary",
        "stages": stages,
        "failed": failed,
        "results": found,
        "environment": describe("bench/gpu.sh", [], device=args.device),
    }
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()))
    print(f"not passed: {', '.join(failed) or 'none'}")
    finish(result, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="JSON of the stages of gpu.sh")
    parser.add_argument("--status", help="a file of `stage exit-code seconds` lines")
    parser.add_argument("--device", type=device_argument, default=device_argument(None))
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
