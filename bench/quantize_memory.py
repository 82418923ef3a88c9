"""How much memory does quantizing take? A made-up sharded checkpoint, watched by /usr/bin/time.

python bench/quantize_memory.py --size 1.1b --out bench/results/quantize_memory_1b.json
python bench/quantize_memory.py --size 7b --layers 2 --mode int4-gptq --calibration FILE

Weights are random. --layers cuts the model: layers are read and quantized one at a time, so the
peak of GPTQ does not depend on their number. It is measured by the system as the maximum resident
set, in which the pages of a mapped shard count.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.environment import describe, finish, say  # noqa: E402
from bench.random_pair import SIZES  # noqa: E402
from fasteagle import demo  # noqa: E402
from fasteagle.config import ModelConfig  # noqa: E402
from fasteagle.families import target_weights  # noqa: E402
from fasteagle.safewrite import Slot, safetensors_file, write_json  # noqa: E402

PEAK = re.compile(r"Maximum resident set size \(kbytes\): (\d+)")
ELAPSED = re.compile(r"Elapsed \(wall clock\) time .*: ([\d:.]+)")
MODES = ("int8", "int4", "int4-gptq")
DEMO_VOCABULARY = 2048  # the embedded tokenizer's: a text's ids fit any larger one


def write_checkpoint(folder: Path, config: ModelConfig, shard_bytes: int) -> list[Path]:
    """A Hugging Face folder of random float16 weights, in shards of about `shard_bytes`."""
    slots = [
        Slot(source, shape, torch.float16)
        for weight in target_weights(config)
        for source, shape in zip(weight.sources, weight.shapes, strict=True)
    ]
    shards = list(pack_shards(slots, shard_bytes))
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        say(f"writing {name}")
        with safetensors_file(folder / name, shard, metadata={}) as put:
            for slot in shard:
                put(slot.name, torch.empty(slot.shape).normal_(std=0.02).half())
                index[slot.name] = name
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    write_json(folder / "config.json", hf_config(config))
    (folder / "tokenizer.model").write_bytes((demo.BASE / "tokenizer.model").read_bytes())
    return sorted(folder.glob("model-*.safetensors"))


def pack_shards(slots: list[Slot], shard_bytes: int) -> Iterator[list[Slot]]:
    """The slots in their order, cut where a shard would grow too large."""
    shard: list[Slot] = []
    for slot in slots:
        if shard and sum(s.n_bytes for s in shard) + slot.n_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(slot)
    yield shard


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json as Hugging Face has it."""
    return {
        "architectures": [config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def watched(argv: list[str]) -> dict[str, Any]:
    """Run a command under /usr/bin/time -v: its peak in bytes and its time as that prints it."""
    say(f"$ {' '.join(argv[1:])}")
    done = subprocess.run(
        ["/usr/bin/time", "-v", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    peak, elapsed = PEAK.search(done.stderr), ELAPSED.search(done.stderr)
    if done.returncode or peak is None or elapsed is None:
        sys.exit(f"it ended with status {done.returncode}:\n{done.stderr}")
    return {"peak_bytes": int(peak[1]) * 1024, "elapsed": elapsed[1]}


def main(args: argparse.Namespace) -> int:
    config = SIZES[args.size]
    config = replace(config, n_layers=args.layers or config.n_layers)
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        shards = write_checkpoint(Path(name), config, args.shard_mb * 10**6)
        largest = max(shard.stat().st_size for shard in shards)
        script = [sys.executable, "quantize/quantize_llama.py", "--checkpoint_path", name]
        script += ["--mode", args.mode, "--clip", args.clip]
        script += ["--calibration", args.calibration] if args.calibration else []
        found = watched(script)
        (written,) = Path(name).glob("model_int*.safetensors")
        size = written.stat().st_size
    # With GPTQ hidden states and Hessians count, which no shard bounds.
    bound = None if args.mode == "int4-gptq" else 2 * largest + 10**9
    result = {
        "bench": "quantize_memory",
        "size": args.size,
        "layers": config.n_layers,
        "mode": args.mode,
        "clip": args.clip,
        "shards": len(shards),
        "checkpoint_bytes": sum(slot_bytes(config)),
        "largest_shard_bytes": largest,
        "written_bytes": size,
        **found,
        "bound_bytes": bound,
        "within_bound": None if bound is None else found["peak_bytes"] < bound,
        "environment": describe(__file__, sys.argv[1:], device=torch.device("cpu")),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))
    finish(result, args.out)
    return 1 if result["within_bound"] is False else 0


def slot_bytes(config: ModelConfig) -> Iterator[int]:
    for weight in target_weights(config):
        yield torch.Size(weight.shape).numel() * 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--layers", type=int, help="default: the size's own")
    parser.add_argument("--shard_mb", type=int, default=500)
    parser.add_argument("--mode", choices=MODES, default="int4")
    parser.add_argument("--clip", choices=("minmax", "mse"), default="mse")
    parser.add_argument("--calibration", help="text for int4-gptq")
    parser.add_argument("--scratch", help="folder for the checkpoint (default: the system's)")
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse()))
