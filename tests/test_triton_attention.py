"""Is tree attention attention, and keep in one kernel keep? Interpreted, on the CPU.

A child process runs all cases at once, as for test_triton_kernels.py.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from test_triton_kernels import interpret, run_cases
from triton_attention_cases import (
    ATTENTION_KERNELS,
    KEEP_CASES,
    SPLITS,
    TOKENS,
    attention_cases,
)
from triton_cases import name

ERROR = {"fp16": 1e-3, "bf16": 8e-3}
MULTIPROCESSORS = 132  # of an H200

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpret("attention")


@pytest.mark.parametrize("case", attention_cases(), ids=name)
def test_tree_attention_is_attention_over_live_slots(found: dict[str, Any], case: Any) -> None:
    error = found[name(case)]
    assert error < ERROR[case.dtype]  # not so for NaN, which slots past the newest hold
    assert error > 0, "16 bits cannot be this exact: nothing was compared"


def test_tiles_of_the_rule_give_the_same(found: dict[str, Any]) -> None:
    assert found["by the rule"] < ERROR["bf16"]


@pytest.mark.parametrize("splits", SPLITS)
def test_ranges_of_slots_add_up(found: dict[str, Any], splits: int) -> None:
    assert found[f"splits {splits}"] < ERROR["fp16"]  # a lost range would be far off


def test_a_row_that_sees_nothing_is_0_and_spoils_no_other(found: dict[str, Any]) -> None:
    error, largest = found["blind row"]
    assert 0 < error < ERROR["fp16"]
    assert largest == 0


def test_operator_is_one_opaque_call_in_a_full_graph(found: dict[str, Any]) -> None:
    assert found["operator"]


def test_compiled_code_takes_ours_where_it_was_measured_to_win(found: dict[str, Any]) -> None:
    # Rounding tells eager code, which is torch's, from the measured; then the graphs of a known
    # shape and of an unknown one.
    assert found["seam"] == [1, 1, 0]


@pytest.mark.parametrize("case", KEEP_CASES, ids=name)
def test_keep_in_one_kernel_is_gather_and_scatter(found: dict[str, Any], case: Any) -> None:
    assert found[f"keep {name(case)}"] == 0


def test_ranges_fill_a_gpu(found: dict[str, Any]) -> None:
    assert len(found["tiles"]) == 2 * len(TOKENS) * 4
    for heads, n_rows, n_slots, rows, block, splits, *_ in found["tiles"]:
        programs = heads * math.ceil(n_rows / rows) * splits
        assert 0.95 * MULTIPROCESSORS <= programs <= 2 * MULTIPROCESSORS
        assert splits <= math.ceil(n_slots / block), "a range without slots"


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    found = run_cases("attention", "compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert tuple(found) == ATTENTION_KERNELS
    for kernel, words in found.items():
        assert "ld.local" not in words, f"{kernel} runs out of registers"
        if kernel.startswith("tree"):
            assert {"mma.sync", "wgmma.mma"} & set(words), "not on tensor cores"
            assert words.count("cp.async.cg") >= 6  # keys, values and bias, a step ahead
        if kernel.startswith("keep"):
            barrier, moves = words.index("bar.sync"), [w for w in words if w != "bar.sync"]
            n_loads = moves.count("ld.global")
            assert words[:barrier] == ["ld.global"] * n_loads, "a row is read after the first write"
            assert n_loads >= 4  # start, path, keys, values
            assert moves[n_loads:] == ["st.global"] * (len(moves) - n_loads)
