"""Does bench/attention.py time torch's ways and ours side by side?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_triton_kernels import need_interpreter

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--device", "cpu", "--models", "tiny", "--rows", "1", "2", "--slots", "32", "48")


def measured(**variables: str) -> dict[str, Any]:
    # float16, because the interpreter multiplies bfloat16 as raw integers.
    call = [sys.executable, "bench/attention.py", *FLAGS, "--repeats", "1", "--dtype", "float16"]
    environment = os.environ | variables
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("interpreted", [False, True], ids=["torch", "interpreted"])
def test_attention_and_keep_are_timed_beside_torchs(interpreted: bool) -> None:
    if interpreted:
        pytest.importorskip("triton")
        need_interpreter()
    result = measured(TRITON_INTERPRET=str(int(interpreted)))
    rows = result["attention"]["tiny"]
    assert [(row["slots"], row["rows"]) for row in rows] == [(32, 1), (32, 2), (48, 1), (48, 2)]
    for row in rows:
        assert set(row["us"]) == ({"sdpa", "triton"} if interpreted else {"sdpa"})
        assert row["floor_us"] > 0
        assert all(0 < us["min"] <= us["median"] for us in row["us"].values())
    assert [row["path"] for row in result["keep"]["tiny"]] == [6, 9]
    for row in result["keep"]["tiny"]:
        assert set(row["us"]) == ({"gather", "triton"} if interpreted else {"gather"})
    environment = result["environment"]
    assert environment["commit"]["sha"]
    assert environment["command"].startswith(f"TRITON_INTERPRET={int(interpreted)} python bench/")
