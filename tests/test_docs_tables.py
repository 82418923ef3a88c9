"""Are the tables of docs/ those of the committed results, and do they hold?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "quantization.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
DRAFTERS = (ROOT / "docs" / "drafters.md").read_text()


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def table(first_cell: str, page: str = DOC) -> list[list[str]]:
    """The rows of a page's table whose heading begins with a cell, without the heading."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_quality_table_is_the_result() -> None:
    rows = result("quality_demo")["rows"]
    shown = table("base")
    assert [cells[0] for cells in shown] == list(rows)
    for name, *cells in shown:
        row = rows[name]
        change = 100 * (row["perplexity"] / rows["fp32"]["perplexity"] - 1)
        lengths = row["accept_length"]
        wanted = [
            *map(str, (row["bytes"], row["perplexity"], f"{change:+.2f} %", row["agreement"])),
            *map(str, (row["kl_nats"], lengths["16-bit"], lengths["int4"])),
        ]
        assert cells == wanted


def test_quantizing_the_demo_base_costs_little() -> None:
    perplexity = {name: row["perplexity"] for name, row in result("quality_demo")["rows"].items()}
    assert perplexity["int8"] < 1.005 * perplexity["fp32"]
    assert perplexity["gptq g32"] <= perplexity["int4 g32"]
    assert perplexity["gptq g32"] < 1.06 * perplexity["fp32"]


def test_the_kernel_table_is_the_result() -> None:
    found = result("kernels_cpu_intel")
    times = {
        (row["kernel"], row["rows"]): row["us"]["median"] for row in found["layers"]["4096x4096"]
    }
    shown = table("kernel")
    assert len(shown) == len({kernel for kernel, _ in times})
    for kernel, *cells in shown:
        assert cells == [f"{times[kernel, rows]:g}" for rows in found["rows"]]


def test_our_choice_of_kernel_is_nearly_the_best() -> None:
    found = result("kernels_cpu_intel")
    assert found["environment"]["threads"] == 1
    ratios = found["ours_over_best"]["4096x4096"]
    assert len(ratios) == 2
    for by_rows in ratios.values():
        assert [int(rows) for rows in by_rows] == [1, 2, 4, 8, 16, 26, 32, 64]
        assert max(by_rows.values()) <= 1.05


def test_the_memory_table_is_the_result() -> None:
    shown = table("checkpoint, made up, float16")
    assert len(shown) == 3
    for _, mode, shard, peak, link in shown:
        name = link.partition("results/")[2].removesuffix(".json)")
        found = result(name)
        sizes = (f"{found[key] / 1e9:.2f} GB" for key in ("largest_shard_bytes", "peak_bytes"))
        assert [mode, shard, peak] == [found["mode"], *sizes]
        assert found["peak_bytes"] < 16e9


@pytest.mark.parametrize("name", ["quantize_memory_1b", "quantize_memory_7b"])
def test_quantizing_stays_within_two_shards_and_a_gigabyte(name: str) -> None:
    found = result(name)
    assert found["shards"] > 1
    assert found["peak_bytes"] < 2 * found["largest_shard_bytes"] + 10**9


def test_the_words_on_int4_on_a_gpu_are_the_result() -> None:
    found = result("rounds_7b_int4_h200")
    row, verify = found["contexts"][0]["plain"], found["contexts"][0]["parts"]["ms"]["verify"]
    text = " ".join(DOC.split())
    assert f"{row['ms']['median']:.2f} ms a plain step" in text
    assert f"{100 * row['share_of_copy_bandwidth']:.0f} % of what copying" in text
    assert f"{verify['median']:.2f} ms to verify six rows" in text
    for launches in found["launches"].values():
        first = launches["longest"][0]
        assert "tinygemm" in first["kernel"]
        assert first["us"] > 0.75e3 * launches["device_busy_ms"]


def test_the_table_of_drafters_is_the_result() -> None:
    found = result("drafters_demo_cpu")
    assert found["identical_tokens"]
    shown = table("draft", DRAFTERS)
    for (_, *cells), (name, row) in zip(shown, found["rounds"].items(), strict=True):
        numbers = [row["nodes"], row["round_ms"]["median"], row.get("share_drafting", 0.0)]
        for text in found["texts"].values():
            numbers += [text["engines"][name]["accept_length"], text.get(f"{name}_over_plain", 1.0)]
        assert cells == list(map(str, numbers))


def test_the_table_of_batches_is_the_result() -> None:
    found = result("batch_demo_cpu")
    assert found["identical_tokens"]
    assert found["batch_sizes"] == [1, 2, 4, 8, 16]
    shown = table("batch", DRAFTERS)
    for (size, *cells), (batch, row) in zip(shown, found["batches"].items(), strict=True):
        engines = [row["engines"][name] for name in ("plain", "eagle")]
        gains = [row[f"{name}_over_batch_1"] for name in ("plain", "eagle")]
        speeds = [engine["tokens_per_s"]["median"] for engine in engines]
        shares = [engine["prefill_share"] for engine in engines]
        assert size == batch
        assert cells == list(map(str, [*speeds, row["eagle_over_plain"], *gains, *shares]))


def test_what_is_said_of_trees_on_a_gpu_is_the_result() -> None:
    found = result("drafters_7b_h200")["rounds"]
    ratio = found["eagle2"]["round_over_plain"]
    assert f"EAGLE-2's {found['eagle2']['nodes']} nodes cost {ratio:.1f} plain steps" in DRAFTERS
    verify = result("rounds_7b_bfloat16_h200")["contexts"][0]["parts"]["verify_over_plain"]
    assert f"On a GPU it takes {verify:.2f}" in DRAFTERS


def json_of(link: str) -> dict[str, Any]:
    return result(link.partition("results/")[2].removesuffix(".json)"))


def test_the_table_of_a_rounds_parts_is_the_result() -> None:
    shown = table("weights", PERFORMANCE)
    assert len(shown) == 2
    for _, tree, plain, *parts, link in shown:
        found = json_of(link)
        context = found["contexts"][0]
        ms = {name: value["median"] for name, value in context["parts"]["ms"].items()}
        whole = context["eagle"]["ms"]["median"]
        wanted = [ms["draft"], ms["verify"], ms["settle"], whole]
        over_parts, over_plain = context["parts"]["round_over_parts"], "break_even_accept_length"
        assert tree == f"{found['tree']}, {found['nodes']} rows"
        assert float(plain) == context["plain"]["ms"]["median"]
        assert [float(cell) for cell in parts] == [*wanted, over_parts, context[over_plain]]
        assert over_parts <= 1.15


def test_the_table_of_processors_is_the_result() -> None:
    shown = table("processor", PERFORMANCE)
    assert len(shown) >= 2
    for _, plain, eagle, ratio, commit, link in shown:
        found = json_of(link)
        speeds = [found["engines"][name]["tokens_per_s"]["median"] for name in ("plain", "eagle")]
        assert [float(plain), float(eagle), float(ratio)] == [*speeds, found["eagle_over_plain"]]
        assert found["environment"]["commit"]["sha"].startswith(commit)
        assert found["identical_tokens"]


def test_the_table_of_peers_is_the_result() -> None:
    found = result("peers_demo_cpu_avx2")
    shown = table("engine", PERFORMANCE)
    assert [cells[0] for cells in shown] == list(found["engines"])
    for name, speed, length, same in shown:
        engine = found["engines"][name]
        assert float(speed) == engine["tokens_per_s"]["median"]
        assert length == str(engine["accept_length"] or "-")
        assert (same == "yes") == engine["same_tokens"]
    ratios = found["ratios"]
    for name in ("eagle_over_eagle_llm", "eagle_over_transformers", "plain_over_gpt_fast"):
        assert str(ratios[name]) in PERFORMANCE
    assert ratios["eagle_over_eagle_llm"] >= 2.8
    assert ratios["eagle_over_transformers"] >= 3.5
    assert ratios["plain_over_gpt_fast"] >= 1.0


def test_the_table_of_a_cpu_round_is_the_result() -> None:
    [[*cells, _]] = table("plain step", PERFORMANCE)
    [row] = result("speed_demo_cpu")["precisions"].values()
    ms = {name: value["median"] for name, value in row["round"]["ms"].items()}
    steps = [ms[name] for name in ("plain", "draft", "verify", "settle", "eagle")]
    ratios = [row["round"]["round_over_parts"], row["round"]["break_even_accept_length"]]
    tau = row["engines"]["eagle"]["accept_length"]
    assert list(map(float, cells)) == [*steps, *ratios, tau]
    assert ratios[0] <= 1.15


def test_what_is_said_of_context_is_the_result() -> None:
    points = result("scaling_demo_cpu")["points"]
    plain = {p["context"]: p["ms"]["plain"]["median"] for p in points if p["axis"] == "context"}
    text = " ".join(PERFORMANCE.split())
    assert f"{plain[128]} ms at 128 tokens of context and {plain[8192]} at 8192" in text


def test_the_table_of_a_shape_from_memory_is_the_result() -> None:
    for threads, *cells, link in table("threads", PERFORMANCE):
        found = json_of(link)
        assert found["environment"]["threads"] == int(threads)
        assert found["acceptance"] == "simulated"
        [row] = found["precisions"].values()
        ms, engines = row["round"]["ms"], row["engines"]
        steps = [ms[name]["median"] for name in ("plain", "eagle")]
        shares = [engines["plain"]["share_of_copy_bandwidth"], engines["eagle"]["accept_length"]]
        assert list(map(float, cells)) == [*steps, *shares, row["eagle_over_plain_decoding"]]


def test_the_table_of_choices_is_the_result() -> None:
    names = {"embedded": "tuned_demo_cpu", "golden byte pair": "tuned_golden_cpu"}
    shown = table("pair", PERFORMANCE)
    assert [cells[0] for cells in shown] == list(names)
    for name, *cells, link in shown:
        found = result(names[name])
        swept = [tree for tree in found["swept"] if tree not in {"plain", "choice"}]
        shares = (
            "choice_over_best_swept",
            "predicted_over_measured",
            "by_parts_over_measured",
            "predicted_over_held_out",
        )
        wanted = [found["choice"], found["best_swept"], len(swept), *(found[key] for key in shares)]
        assert cells == [*map(str, wanted), str(found["choice_over_plain"])]
        assert f"results/{names[name]}.json" in link
        assert found["compiled"]
        assert found["identical_tokens"]
        assert len(swept) >= 12
        assert found["choice_over_best_swept"] >= 0.95
        assert abs(found["predicted_over_measured"] - 1) <= 0.1
        if found["plain_is_faster"]:
            assert (
                f"{found['choice']} at {found['tuning']['race'][found['choice']]['over_plain']}"
                in PERFORMANCE
            )


def test_the_waterfall_is_the_result() -> None:
    found = result("waterfall_demo_cpu")
    assert found["identical_tokens"]
    shown = table("step", PERFORMANCE)
    for (_, *cells), row in zip(shown, found["steps"].values(), strict=True):
        speed = row["decode_tokens_per_s"]["median"]
        assert cells == list(map(str, (speed, row["times_before"], row["times_first"])))


def test_the_table_of_starts_is_the_result() -> None:
    found = result("start_demo_cpu")
    assert found["same_text"]
    seconds = found["seconds"]
    shown = table("start", PERFORMANCE)
    kinds = ("cold", "warm", "eager")
    for (_, *cells), kind in zip(shown, kinds, strict=True):
        compiling = "-" if kind == "eager" else str(seconds[kind]["compiling"]["median"])
        times = [
            str(seconds[kind][name]["median"]) for name in ("first_token", "first_round", "end")
        ]
        assert cells == [*times, compiling]
    assert seconds["cold"]["first_round"]["median"] < 60
    assert seconds["warm"]["first_token"]["median"] < 10
