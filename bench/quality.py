"""What does quantizing cost the embedded pair? Size, perplexity, agreement, accept length.

python bench/quality.py --out bench/results/quality_demo.json
python bench/quality.py --text held_out.py other.py --rows fp32 bf16 --heads 16-bit

Scored on sources that the base was not trained on: the standard library's own tests. Weights are
quantized in a temporary folder by the scripts in quantize/ and read back as --dtype of their row,
so figures are those of the rounded weights, whatever kernel multiplies them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.environment import describe, finish, say, significant  # noqa: E402
from fasteagle import demo  # noqa: E402
from fasteagle.assemble import DTYPES, load_drafter  # noqa: E402
from fasteagle.checkpoint import convert, load_target  # noqa: E402
from fasteagle.engine import Engine  # noqa: E402
from fasteagle.evaluate.agreement import merge, text_agreement  # noqa: E402
from fasteagle.evaluate.passes import Text, encode_text  # noqa: E402
from fasteagle.evaluate.perplexity import perplexity, token_losses  # noqa: E402
from fasteagle.metrics import merge as merge_stats  # noqa: E402
from fasteagle.model import Transformer  # noqa: E402
from fasteagle.tokenizer import load_tokenizer  # noqa: E402

# The base's corpus left out the standard library's tests.
HELD_OUT = ("test_heapq", "test_shlex", "test_csv", "test_fractions", "test_textwrap")
CALIBRATION = ("random", "argparse", "tempfile", "statistics")  # of the corpus, for GPTQ
PROMPT_TOKENS = 64


class Row(NamedTuple):
    """A base or head as it is measured."""

    mode: str | None  # of the quantizer; None: the checkpoint's own weights
    group: int | None  # group size of int4
    dtype: str  # that the weights are written in (mode None) or read back as


ROWS = {
    "fp32": Row(None, None, "float32"),
    "bf16": Row(None, None, "bfloat16"),
    "int8": Row("int8", None, "float32"),
    "int4 g32": Row("int4", 32, "float32"),
    "int4 g64": Row("int4", 64, "float32"),
    "int4 g128": Row("int4", 128, "float32"),
    "gptq g32": Row("int4-gptq", 32, "float32"),
    "gptq g64": Row("int4-gptq", 64, "float32"),
    "gptq g128": Row("int4-gptq", 128, "float32"),
}
HEADS = {"16-bit": Row(None, None, "float16"), "int4": Row("int4", 32, "float32")}


def make(source: Path, row: Row, folder: Path, *, script: str, calibration: Path) -> Path:
    """The weight file of `row`, made of the demo checkpoint `source` in the new `folder`."""
    if row.mode is None:
        return convert(source, folder, dtype=DTYPES[row.dtype]) / "model.safetensors"
    shutil.copytree(source, folder)
    words = [sys.executable, f"quantize/{script}", "--checkpoint_path", str(folder)]
    words += ["--mode", row.mode]
    if row.group is not None:
        words += ["--groupsize", str(row.group), "--pad"]
    if row.mode.endswith("gptq"):
        words += ["--calibration", str(calibration)]
    say(f"$ {' '.join(words[1:])}")
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{words[1]} ended with status {done.returncode}; its own message is above")
    return Path(done.stdout.splitlines()[-1])  # the quantizer prints the file that it wrote


def score(target: Transformer, reference: Transformer, texts: Sequence[Text]) -> dict[str, Any]:
    """Perplexity of all texts, and agreement with the reference along them."""
    losses = torch.cat([token_losses(target, text.tokens) for text in texts])
    found = perplexity(losses, sum(text.n_bytes for text in texts))
    close = merge([text_agreement(target, reference, text.tokens) for text in texts])
    return {
        "perplexity": significant(found.perplexity, 6),
        "bits_per_byte": significant(found.bits_per_byte, 6),
        "agreement": significant(close.share, 6),
        "kl_nats": significant(close.kl, 4),
    }


def accept_length(
    target: Transformer, head: Path, texts: Sequence[Text], limits: dict[str, int]
) -> float:
    """Tokens a round on the head's own tree, after prompts from all over the texts."""
    engine = Engine(target, load_drafter(head, target))
    prompts = []
    for index in range(limits["prompts"]):
        bos, *tokens = texts[index % len(texts)].tokens.tolist()
        start = index * len(tokens) // limits["prompts"]
        prompts.append([bos, *tokens[start : start + PROMPT_TOKENS - 1]])
    found = engine.generate(prompts, max_new_tokens=limits["max_new_tokens"], stop_ids=[])
    return significant(merge_stats([result.stats for result in found]).accept_length)


def default_texts() -> list[str]:
    """The held-out files of this Python; FileNotFoundError where it came without its tests."""
    folder = Path(sysconfig.get_path("stdlib")) / "test"
    paths = [folder / f"{name}.py" for name in HELD_OUT]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"no {', '.join(HELD_OUT)} in {folder}; give files with --text")
    return [str(path) for path in paths]


def calibration_file(folder: Path) -> Path:
    """Sources that the base was trained on, one after another; no text that is scored."""
    sources = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in CALIBRATION]
    path = folder / "calibration.txt"
    path.write_text("\n".join(source.read_text("utf-8") for source in sources), encoding="utf-8")
    return path


def measure(args: argparse.Namespace, texts: Sequence[Text], folder: Path) -> dict[str, Any]:
    """Every row of the table."""
    options = {"calibration": calibration_file(folder)}
    heads = {
        name: make(demo.HEAD, HEADS[name], folder / name, script="quantize_EAGLE.py", **options)
        for name in args.heads
    }
    reference = load_target(demo.BASE, dtype=torch.float32)
    limits = {"prompts": args.prompts, "max_new_tokens": args.max_new_tokens}
    found = {}
    for name in args.rows:
        place = folder / name.replace(" ", "_")
        file = make(demo.BASE, ROWS[name], place, script="quantize_llama.py", **options)
        target = load_target(file, dtype=DTYPES[ROWS[name].dtype])
        found[name] = {"bytes": file.stat().st_size, **score(target, reference, texts)}
        found[name]["accept_length"] = {
            kind: accept_length(target, head, texts, limits) for kind, head in heads.items()
        }
        say(f"{name}: {found[name]}")
    sizes = {name: head.stat().st_size for name, head in heads.items()}
    return {"rows": found, "head_bytes": sizes}


def show(result: dict[str, Any]) -> None:
    """The table for people."""
    heads = list(result["head_bytes"])
    line = "{:>10} {:>11} {:>11} {:>10} {:>10}" + " {:>12}" * len(heads)
    accepts = [f"tau {name}" for name in heads]
    print(line.format("base", "bytes", "perplexity", "agreement", "KL, nats", *accepts))
    for name, row in result["rows"].items():
        figures = (row[key] for key in ("bytes", "perplexity", "agreement", "kl_nats"))
        print(line.format(name, *figures, *row["accept_length"].values()))
    print(f"heads: {', '.join(f'{k} {v} bytes' for k, v in result['head_bytes'].items())}")
    print(f"{result['tokens']} tokens of {', '.join(result['texts'])}")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(demo.BASE)
    paths = [Path(path) for path in args.text or default_texts()]
    texts = [
        encode_text(tokenizer, path.read_bytes().decode(), max_tokens=args.max_tokens)
        for path in paths
    ]
    with tempfile.TemporaryDirectory() as name:
        found = measure(args, texts, Path(name))
    result = {
        "bench": "quality",
        "texts": [path.name for path in paths],
        "tokens": sum(len(text.tokens) - 1 for text in texts),
        "prompts": args.prompts,
        "new_tokens": args.max_new_tokens,
        **found,
        "environment": describe(__file__, sys.argv[1:], device=torch.device("cpu")),
    }
    show(result)
    finish(result, args.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="default: tests of the library")
    parser.add_argument("--max_tokens", type=int, default=4000, help="of each text, the first N")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS))
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
