"""Do the benchmark scripts run, count right, and say where their numbers come from?"""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.demo_pair import fresh_rounds, fresh_tokens
from bench.environment import command, describe, spread
from bench.kernels import MODELS
from bench.kernels import summarize as summarize_kernels
from bench.launches import PROFILED_ROUNDS, summarize
from bench.products import products, read_bytes
from bench.random_pair import (
    SIZES,
    Pair,
    drafted_levels,
    eagle_config,
    kv_bytes,
    random_pair,
    weigh,
)
from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.draft.none import NoDrafter
from fasteagle.metrics import Stats
from fasteagle.model import Transformer
from fasteagle.request import Generation
from fasteagle.rope import RoPE
from fasteagle.tree import chain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "bench/results").glob("*.json"))
SCRIPTS = (
    "acceptance", "attention", "batch", "demo_pair", "drafters", "environment", "kernels",
    "peer_worker", "peers", "plot_drafters", "quality", "scaling", "speed", "start",
    "summarize", "train_heads", "tuned", "waterfall",
)  # fmt: skip


def assert_says_where_it_comes_from(result):
    environment = result["environment"]
    assert environment["command"]
    assert not any(word.startswith("/") for word in environment["command"].split())
    assert environment["machine"]["processor"]
    assert environment["torch"]
    assert environment["commit"]["sha"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_two_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"bench/{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.count(f"python bench/{name}.py") == 2


@pytest.mark.parametrize("flags", [["--size", "9b"], ["--device", "tpu"], ["--tree", "x"]])
def test_wrong_flag_ends_with_status_2(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "bench/speed.py"), run_name="__main__")
    assert end.value.code == 2
    assert flags[1] in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_script_runs_dry_on_the_cpu(tmp_path):
    call = ["bash", "bench/gpu.sh", "--device", "cpu", "--size", "tiny"]
    variables = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "GPU_TESTS": "0"}
    done = subprocess.run(call, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["failed"] == []
    speeds = {"speed_tiny_float32", "speed_tiny_int4"}
    assert set(summary["results"]) == speeds | {"acceptance_cpu", "scaling_cpu", "attention_cpu"}
    assert summary["results"]["speed_tiny_int4"]["acceptance"] == "simulated"
    assert summary["results"]["acceptance_cpu"]["tau_0"] > 1
    assert len(list(tmp_path.iterdir())) <= 8
    limits = re.findall(r"^  (?:speed|acceptance|attention|scaling) (\d+) ", gpu_stages(), re.M)
    tests = re.search(r"stage tests (\d+)", (ROOT / "bench/gpu.sh").read_text())
    assert sum(map(int, [*limits, tests[1]])) <= 570


def gpu_stages():
    """The stages of one call on a GPU."""
    text = (ROOT / "bench/gpu.sh").read_text()
    return text[text.rindex("\nelse\n") : text.rindex("  if more; then")]


def run_script(name, flags, tmp_path, monkeypatch):
    out = tmp_path / f"{name}.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split(), "--out", str(out)])
    runpy.run_path(str(ROOT / f"bench/{name}.py"), run_name="__main__")
    return json.loads(out.read_text())


def test_products_are_timed_by_kernel_and_rows(tmp_path, monkeypatch):
    flags = "--device cpu --shape 256x256 --repeats 2 --rounds 1 --rows 1 16 32"
    kernels = run_script("kernels", flags, tmp_path, monkeypatch)
    [timed] = kernels["layers"].values()
    names = {row["kernel"] for row in timed}
    assert names >= {"dense bf16", "int8pack bf16", "int4pack.g32 bf16", "int4.g32 ours bf16"}
    assert [row["rows"] for row in timed] == [1, 16, 32] * len(names)
    assert all(row["over_least_rows"] == 1 for row in timed if row["rows"] == 1)
    assert not kernels["out_of_time"]


def test_rounds_of_drafters_are_timed_on_random_weights(tmp_path, monkeypatch):
    flags = "--size tiny --drafters eagle2 lookup --no-compile --repeats 2"
    drafters = run_script("drafters", flags, tmp_path, monkeypatch)
    assert set(drafters["simulated"]) == {"plain", "eagle2", "lookup"}
    assert drafters["simulated"]["eagle2"]["accept_length"] == 4.7
    assert drafters["rounds"]["eagle2"]["nodes"] == 60


def test_engines_of_the_demo_pair_take_turns(tmp_path, monkeypatch):
    flags = "--no-compile --prompts 1 --repeats 1 --max_new_tokens 16"
    demo = run_script("demo_pair", flags, tmp_path, monkeypatch)
    assert demo["identical_tokens"]
    assert demo["eagle_over_plain"] > 0
    assert demo["engines"]["eagle"]["accept_length"] > 1


def test_batches_are_compared_on_one_queue(tmp_path, monkeypatch, capsys):
    out = tmp_path / "batch.json"
    flags = ["--batch_sizes", "2", "1", "--prompts", "3", "--max_new_tokens", "5", "--no-compile"]
    call = ["batch.py", *flags, "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", call)
    runpy.run_path(str(ROOT / "bench/batch.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["identical_tokens"]
    assert list(result["batches"]) == ["1", "2"]
    one, two = (result["batches"][batch] for batch in ("1", "2"))
    assert one["plain_over_batch_1"] == one["eagle_over_batch_1"] == 1
    assert one["eagle_over_plain"] > 0
    # Two prompts, then the third: all texts are as long.
    for row, counts in ((one, [3, 12, 1.0]), (two, [2, 8, 1.5])):
        found = row["engines"]["plain"]
        assert [found[key] for key in ("prefills", "rounds", "tokens_per_round")] == counts
        assert row["engines"]["eagle"]["accept_length"] > 1
        assert 0 < row["engines"]["eagle"]["prefill_share"] < 1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_result_says_where_it_comes_from(path):
    assert_says_where_it_comes_from(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("drafters.py --prompts 0", "--prompts: '0' is not a whole number above 0"),
        ("drafters.py --repeats 0", "--repeats: '0' is not a whole number above 0"),
        ("drafters.py --no-compile --prompts 999", "--prompts 999; there are 10 of each kind"),
        ("drafters.py --no-compile --max_new_tokens 999", "a prompt leaves room for 192"),
        ("attention.py --rows 0", "--rows: '0' is not a whole number above 0"),
        (
            "peers.py --base fasteagle/demo/base --head fasteagle/demo/base",
            "--head fasteagle/demo/base is a target model; give an EAGLE-1 head",
        ),
        ("peers.py --base fasteagle/demo/base --head nope", "--head: nope does not exist"),
        ("peers.py --max_new_tokens 999", "a prompt leaves room for 192"),
        ("batch.py --batch_sizes 0", "--batch_sizes: '0' is not a whole number above 0"),
        ("scaling.py --plot nope/x.png", "--plot nope/x.png: there is no folder nope"),
        ("waterfall.py --device cpu --plot --out nope/x.json", "there is no folder nope"),
        ("train_heads.py --kind medusa --minutes 0 --out x", "--minutes: '0' is not a time above"),
    ],
)
def test_sizes_that_cannot_be_end_in_a_line(line, words):
    script, *flags = line.split()
    call = [sys.executable, f"bench/{script}", *flags]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_environment_names_commit_and_command(monkeypatch):
    monkeypatch.setenv("COMMIT", "abc")  # for a copy of the tree without git
    found = describe(str(ROOT / "bench/speed.py"), ["--size", "7b"], device=torch.device("cpu"))
    assert_says_where_it_comes_from({"environment": found})
    assert found["command"] == "python bench/speed.py --size 7b"
    assert command("/elsewhere/run.py", ["a b"]) == "python run.py 'a b'"


@pytest.mark.parametrize("shape", ["4096", "4096x100", "0x128", "17x128", "axb"])
def test_wrong_shape_ends_with_status_2(shape, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", "--shape", shape])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "bench/kernels.py"), run_name="__main__")
    assert end.value.code == 2
    assert shape in capsys.readouterr().err


def test_a_models_products_are_added_up_as_often_as_a_step_does_them():
    def us(kernel, rows, median):
        return {"kernel": kernel, "rows": rows, "us": {"median": median}}

    names = [f"{o}x{i}" for o, i, _ in MODELS["LLaMA2-7B"].values()]
    layers = {name: [us("a", 1, 10.0), us("a", 16, 15.0), us("b", 16, 1.0)] for name in names}
    found = summarize_kernels(layers)
    assert set(found) == {"LLaMA2-7B"}  # the other's shapes were not measured
    assert found["LLaMA2-7B"]["a"] == {"step_ms": 1.29, "verify_16_over_step": 1.5}
    assert found["LLaMA2-7B"]["b"] == {}


def test_bytes_of_a_weight_go_by_the_kernels_name():
    assert read_bytes("dense fp16", (64, 128)) == 2 * 64 * 128
    assert read_bytes("int8 triton bf16", (64, 128)) == 64 * 128 + 2 * 64
    assert read_bytes("int4.g32 tinygemm bf16", (64, 128)) == 64 * 128 / 2 + 4 * 64 * 4


def test_every_kernel_of_the_cpu_multiplies():
    with torch.inference_mode():
        for maker in products((64, 128), torch.device("cpu")):
            product = maker.build()
            y = product.multiply(torch.ones(3, 128, dtype=product.dtype), product.copies[0])
            assert y.shape == (3, 64)
            assert y.isfinite().all()
            assert (y != 0).any()


def test_bytes_are_those_of_llama2_7b():
    with torch.device("meta"):
        target = Transformer(SIZES["7b"])
        head = EagleHead(eagle_config(SIZES["7b"]))
    weight = weigh(Pair(target, head))
    assert weight.step / 4 == 6_607_077_376  # 32 layers and lm_head, no embedding
    per_level = weight.head + weight.lm_head
    assert weight.round(5) == weight.step + 5 * per_level
    assert per_level / 4 == pytest.approx(367e6, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_pair_keeps_rope_in_float32(dtype):
    pair = random_pair("tiny", dtype=dtype, device=torch.device("cpu"))
    wanted = RoPE(16, 10000.0, None).inv_freq
    for model in pair:
        assert torch.equal(model.rope.inv_freq, wanted)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(p.is_meta for p in model.parameters())


def test_random_pair_is_the_same_for_the_same_seed():
    one, two = (random_pair("tiny", dtype=torch.float32, device=torch.device("cpu")) for _ in "ab")
    for left, right in zip(one, two, strict=True):
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_round_runs_the_head_once_a_level():
    pair = random_pair("tiny", dtype=torch.float32, device=torch.device("cpu"))
    assert drafted_levels(EagleDrafter(pair.head, pair.target, chain(4))) == 4
    assert drafted_levels(NoDrafter()) == 0
    cache = pair.target.new_cache(1, 64)
    assert kv_bytes(cache, 32) == cache.n_bytes // 2
    assert kv_bytes(None, 32) == 0


def test_a_loop_begins_where_the_circle_closes():
    word = list(range(10, 20))
    assert fresh_tokens([1, 2, *word, *word, *word[:3]]) == 12
    assert fresh_tokens([*word, *word[:7]]) == 17  # too short to call it a loop
    assert fresh_tokens(word) == 10
    # The first token is prefill's; rounds of 3 and 5 tokens end at 4 and 9, one of 5 at 14.
    stats = Stats(accepted=[2, 4, 4])
    looping = Generation([1, 2, *word, *word], "", "length", stats)
    assert fresh_rounds(looping) == [2, 4]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_launches_are_counted_a_round(tmp_path, name):
    kinds = [("kernel", "gemm"), ("kernel", "add"), ("cuda_runtime", "cudaGraphLaunch")]
    events = [
        {"ph": "X", "cat": kind, "name": call, "dur": 10}
        for kind, call in [*kinds, ("cuda_runtime", "cudaStreamSynchronize"), ("gpu_memcpy", "x")]
        for _ in range(PROFILED_ROUNDS)
    ]
    text = json.dumps({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]})
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = summarize(path)
    assert found["kernels"] == 2
    assert found["graph_launches"] == found["waits"] == found["copies"] == 1
    assert found["kernel_launches"] == found["memsets"] == 0
    assert found["device_busy_ms"] == 0.03
    assert [row["kernel"] for row in found["longest"]] == ["gemm", "add"]
    assert found["longest"][0] == {"kernel": "gemm", "calls": 1, "us": 10}


def test_spread_is_median_least_and_greatest():
    assert spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0}
