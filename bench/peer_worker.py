"""How is one engine driven from outside? A worker that decodes prompts read from stdin.

echo '{"prompt": [1, 5], "max_new_tokens": 8}' | python bench/peer_worker.py ours --engine eagle
python bench/peer_worker.py transformers --engine transformers --base BASE

bench/peers.py starts one a peer, in the peer's own environment: this file and the peer files
import nothing of fasteagle's, except peer_ours.py. A peer file has `load(args)`, which returns a
function from a prompt's ids and a number of new tokens to an answer, a dictionary with "tokens"
and, where it drafts, "rounds" and "advanced", the tokens that those rounds yielded.

Lines of JSON on stdout: {"ready": ..., "versions": {...}} once, then for every line read
{"tokens": [...], "seconds": s, "graphs": compiled so far}. seconds is the whole call, from prompt
ids to the last token on the host, and tokens are cut to what was asked for. All other output goes
to stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "fasteagle/demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODULES = ("ours", "transformers", "eagle_llm", "gpt_fast")
PACKAGES = {"torch": "torch", "transformers": "transformers", "eagle-llm": "eagle"}

Answer = dict[str, Any]
Generate = Callable[[list[int], int], Answer]


def peer(name: str) -> Any:
    """The module peer_NAME.py beside this file; its folder stays off the import path."""
    path = HERE / f"peer_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, f"{path} is a Python file"
    assert spec.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_stdout() -> TextIO:
    """Stdout for answers alone: whatever else writes there, C code included, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def versions() -> dict[str, str]:
    """Of the packages that have been imported."""
    return {name: version(name) for name, module in PACKAGES.items() if module in sys.modules}


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing was compiled
    return int(dynamo.utils.counters["stats"]["unique_graphs"]) if dynamo else 0


def serve(generate: Generate, lines: Iterable[str], answers: TextIO) -> None:
    """Answer every line until stdin ends."""
    for line in lines:
        asked = json.loads(line)
        begin = time.perf_counter()
        answer = generate(asked["prompt"], asked["max_new_tokens"])
        seconds = time.perf_counter() - begin
        tokens = answer.pop("tokens")[: asked["max_new_tokens"]]
        said = {"tokens": tokens, "seconds": seconds, "graphs": graphs(), **answer}
        print(json.dumps(said), file=answers, flush=True)


def main(args: argparse.Namespace) -> None:
    answers = own_stdout()
    # Not beside other modules of this folder, whose names are those of packages (kernels).
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    torch.set_num_threads(args.threads)
    generate = peer(args.module).load(args)
    ready = {"ready": args.engine, "versions": versions()}
    print(json.dumps(ready), file=answers, flush=True)
    serve(generate, sys.stdin, answers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", choices=MODULES, help="which peer_*.py")
    parser.add_argument("--engine", required=True, help="which of its engines")
    parser.add_argument("--base", default=str(DEMO / "base"))
    parser.add_argument("--head", default=str(DEMO / "head"))
    parser.add_argument("--tree", help="of fasteagle's EAGLE (default: the head's own)")
    parser.add_argument("--gpt_fast", help="a checkout of gpt-fast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.torch_dtype = DTYPES[args.dtype]
    return args


if __name__ == "__main__":
    main(parse())
