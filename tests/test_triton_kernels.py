"""Do the Triton kernels multiply by the weight that the codes stand for? Interpreted, on the CPU.

A child process runs all cases at once (triton_cases.py): Triton interprets kernels or not from its
import on, and other tests of this process want the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from triton_cases import CASES, COMPILED, SPLITS, name
from triton_expert_cases import EXPERT_CASES, EXPERT_KERNELS

ROOT = Path(__file__).parents[1]
ERROR = {"fp16": 2e-3, "bf16": 1e-2}
MULTIPROCESSORS = 82  # of an RTX 3090

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_cases(*words: str, **variables: str) -> dict[str, Any]:
    call = [sys.executable, "tests/triton_cases.py", *words]
    variables |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        call, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def need_interpreter() -> None:
    """Skip where Triton's interpreter is known not to run."""
    triton, numpy = (Version(version(package)) for package in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton} fails on numpy {numpy}; try numpy 2.3")


def interpret(*words: str) -> dict[str, Any]:
    """The interpreted cases."""
    need_interpreter()
    return run_cases(*words, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpret()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_product_is_that_of_the_dequantized_weight(found: dict[str, Any], case: Any) -> None:
    error = found[name(case)]
    assert error < ERROR[case.dtype]  # not so for NaN, which padding holds
    assert error > 0, "16 bits cannot be this exact: nothing was compared"


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_product_is_that_of_the_chosen_experts_alone(found: dict[str, Any], case: str) -> None:
    error = found[case]
    assert error < ERROR[case.split()[-1]]  # not so for NaN, which unused experts hold
    assert error > 0, "16 bits cannot be this exact: nothing was compared"


@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_of_inputs_add_up_to_one_product(found: dict[str, Any], bits: int) -> None:
    errors = [found[f"int{bits} splits {splits}"] for splits in SPLITS]
    assert max(errors) < 5e-4  # one rounding to fp16: a lost range would be far off


@pytest.mark.parametrize("bits", [4, 8])
def test_operator_is_one_opaque_call_in_a_full_graph(found: dict[str, Any], bits: int) -> None:
    assert found[f"int{bits} compiled"]


def test_tiles_fill_a_gpu_and_sum_every_row_the_same_way(found: dict[str, Any]) -> None:
    steps_of: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for bits, rows, n_outputs, row_bytes, outputs, splits, step_bytes, *_ in found["tiles"]:
        steps_of.setdefault((bits, n_outputs, row_bytes), set()).add((splits, step_bytes))
        programs = math.ceil(n_outputs / outputs) * splits
        assert programs >= (3 if rows <= 16 else 1.5) * MULTIPROCESSORS
        assert row_bytes // step_bytes // splits >= 8
    assert all(len(steps) == 1 for steps in steps_of.values()), "rows change how a sum is made"


def test_kernels_compile_for_a_gpu_and_load_ahead(tmp_path: Path) -> None:
    found = run_cases("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert len(found) == len(COMPILED) + len(EXPERT_KERNELS)
    for counts in found.values():
        assert counts["mma.sync"] > 0  # on tensor cores
        assert counts["cp.async.cg"] >= 6  # codes and activations, two steps before and in the loop
