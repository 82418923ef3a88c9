"""Do the Triton kernels multiply by the chosen experts, and read no other? Interpreted, on the CPU.

A child process runs all cases at once (triton_expert_cases.py); see test_triton_kernels.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from test_triton_kernels import ERROR, interpreted, run_cases
from triton_expert_cases import CASES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreted("triton_expert_cases")


@pytest.mark.parametrize("case", CASES)
def test_product_is_that_of_the_chosen_experts_alone(found: dict[str, Any], case: str) -> None:
    error = found[case]
    assert error < ERROR[case.split()[-1]]  # not so for NaN, which unused experts hold
    assert error > 0, "16 bits cannot be this exact: nothing was compared"


def test_kernels_of_experts_compile_for_a_gpu_and_load_ahead(tmp_path: Path) -> None:
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    found = run_cases("compile", cases="triton_expert_cases", **settings)
    assert set(found) == {"int4", "int8", "dense"}
    for counts in found.values():
        assert counts["mma.sync"] > 0  # on tensor cores
        assert counts["cp.async.cg"] >= 6  # codes and activations, two steps before and in the loop
