"""How fast is fasteagle beside its peers? Same pair, prompts and counting, one interleaved run.

python bench/peers.py --gpt_fast ../gpt-fast --out bench/results/peers_cpu.json
python bench/peers.py --base BASE --head HEAD --engines plain eagle eagle_llm transformers

Greedy, fp32, one thread, 10 prompts of 64 tokens, stop ids off: every engine makes exactly
--max_new_tokens. Each is a process of its own, and they take turns on every prompt. A peer runs in
a virtual environment that is made on first use below --venvs (PIP_ARGS="..." adds flags for pip).

plain, eagle            fasteagle, compiled; eagle on the head's own tree or --eagle_tree
transformers            generate, as it is
transformers_compiled   generate with a static cache and the compiled forward
eagle_llm, eagle_llm_plain   EAGLE's own package 1.2.0, eagenerate and naive_generate
gpt_fast                plain decoding of a checkout, --gpt_fast; on the CPU of its commit 32971d3

Seconds are those of the whole call in the worker: prompt ids in, last token out, no tokenizer.
eagle-llm decodes whole rounds: what it makes past the limit is not counted, its time is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.demo_pair import MODULES, Encoder, about, check_room, windows  # noqa: E402
from bench.environment import (  # noqa: E402
    add_run,
    describe,
    device_argument,
    finish,
    refuse,
    run,
    say,
)
from bench.peer_link import PeerError, Worker  # noqa: E402
from bench.peer_table import Answers, ratios, show, summarize, total  # noqa: E402
from bench.peer_venvs import default_folder, interpreter  # noqa: E402
from fasteagle import demo  # noqa: E402
from fasteagle.assemble import DTYPES, find_tokenizer  # noqa: E402
from fasteagle.commands.numbers import positive  # noqa: E402
from fasteagle.heads import HEADS  # noqa: E402
from fasteagle.source import Checkpoint, open_checkpoint  # noqa: E402


class Peer(NamedTuple):
    """Who decodes: bench/peer_MODULE.py, in which environment (None: this one)."""

    module: str
    environment: str | None = None


ENGINES = {
    "plain": Peer("ours"),
    "eagle": Peer("ours"),
    "transformers": Peer("transformers", "transformers"),
    "transformers_compiled": Peer("transformers", "transformers"),
    "eagle_llm_plain": Peer("eagle_llm", "eagle_llm"),
    "eagle_llm": Peer("eagle_llm", "eagle_llm"),
    "gpt_fast": Peer("gpt_fast", "transformers"),
}
BYTE_OFFSET = 3  # of a byte-level vocabulary, behind PAD, BOS and EOS
BYTE_VOCABULARY = 256 + BYTE_OFFSET


class Bytes:
    """The tokens of a byte-level base, which has no tokenizer: BOS, then byte + 3."""

    def encode(self, text: str) -> list[int]:
        return [1, *(byte + BYTE_OFFSET for byte in text.encode())]


def opened(flag: str, path: str, kind: str) -> Checkpoint:
    """The checkpoint that a flag names; ends the program if it is none, or of another kind."""
    try:
        found = open_checkpoint(path)
    except (ValueError, OSError) as error:
        refuse(f"{flag}: {error}")
    if found.kind != kind:
        wanted = "a target model" if kind == "target" else HEADS[kind].words
        refuse(f"{flag} {path} is {found.words}; give {wanted}")
    return found


def encoder(base: str, new_tokens: int) -> Encoder:
    """What encodes the prompts; ends the program if the base cannot take them."""
    config = opened("--base", base, "target").config
    try:
        tokenizer = find_tokenizer(base)
    except (ValueError, OSError) as error:
        refuse(f"--base: {error}")
    check_room(config.max_positions, new_tokens)
    if tokenizer is None and not BYTE_VOCABULARY <= config.vocab_size < 2 * BYTE_VOCABULARY:
        refuse(f"{base} has no tokenizer file and no vocabulary of bytes; add its tokenizer.json")
    return tokenizer or Bytes()


def start(name: str, args: argparse.Namespace) -> Worker:
    """A worker that is ready; PeerError if it cannot be."""
    peer = ENGINES[name]
    python = interpreter(peer.environment, args.venvs) if peer.environment else sys.executable
    words = [python, "-P", str(ROOT / "bench/peer_worker.py"), peer.module, "--engine", name]
    words += ["--base", args.base, "--head", args.head, "--device", str(args.device)]
    words += ["--dtype", args.dtype, "--threads", str(args.threads)]
    words += ["--tree", args.eagle_tree] if args.eagle_tree else []
    words += ["--gpt_fast", args.gpt_fast] if args.gpt_fast else []
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    return Worker(name, words, variables=variables, timeout=args.timeout)


def gather(
    args: argparse.Namespace, prompts: list[list[int]], stack: contextlib.ExitStack
) -> dict[str, Worker]:
    """Workers of all engines that can be had, warm; the others get a line on stderr."""
    workers: dict[str, Worker] = {}
    for name in args.engines:
        begin = time.perf_counter()
        try:
            worker = stack.enter_context(start(name, args))
            worker.warm_up(prompts, args.max_new_tokens)
        except PeerError as error:
            drop(name, error)
            continue
        workers[name] = worker
        say(f"{name}: ready in {time.perf_counter() - begin:.1f} s")
    return workers


def drop(name: str, error: PeerError) -> None:
    """Go on without a peer; without our own engines there is nothing to compare."""
    if ENGINES[name].environment is None:
        sys.exit(f"error: {error}")
    say(f"left out: {error}")


def measure(
    workers: Mapping[str, Worker], prompts: Sequence[Sequence[int]], new_tokens: int, repeats: int
) -> dict[str, list[Answers]]:
    """Answers `[repeats][prompts]` of every engine that lasts; the engines take turns."""
    left = dict(workers)
    found: dict[str, list[Answers]] = {name: [] for name in left}
    for repeat in range(repeats):
        for answers in found.values():
            answers.append([])
        for prompt in prompts:
            for name, worker in tuple(left.items()):
                try:
                    found[name][-1].append(worker.ask(prompt, new_tokens))
                except PeerError as error:
                    drop(name, error)
                    del left[name], found[name]
        times = {name: total(answers[-1]) for name, answers in found.items()}
        say(f"repeat {repeat + 1}: " + ", ".join(f"{n} {s:.2f} s" for n, s in times.items()))
    return found


def checkout(path: str | None) -> str | None:
    """The commit of --gpt_fast, where it is a git checkout."""
    if path is None or not (Path(path) / ".git").exists():
        return None
    return run("git", "-C", str(Path(path).resolve()), "rev-parse", "HEAD")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    opened("--head", args.head, "eagle")
    prompts = windows(encoder(args.base, args.max_new_tokens), args.prompts)
    with contextlib.ExitStack() as stack:
        workers = gather(args, prompts, stack)
        if not workers:
            sys.exit("error: no engine is left; see the lines above")
        found = measure(workers, prompts, args.max_new_tokens, args.repeats)
    seconds = {name: [total(one) for one in answers] for name, answers in found.items()}
    result = {
        "bench": "peers",
        "pair": "embedded" if args.embedded else [Path(args.base).name, Path(args.head).name],
        "dtype": args.dtype,
        "eagle_tree": args.eagle_tree or "the head's own",
        **about(prompts, args),
        "ratios": ratios(seconds),
        "engines": summarize(found, workers, args.max_new_tokens),
        "left_out": [name for name in args.engines if name not in found],
        "gpt_fast_commit": checkout(args.gpt_fast),
        "environment": describe(__file__, sys.argv[1:], device=args.device),
    }
    show(result)
    finish(result, args.out)
    if args.dtype == "float32" and any(
        row["same_tokens"] is False
        for name, row in result["engines"].items()
        if ENGINES[name].environment is None
    ):
        sys.exit("our engines disagree in fp32; that is a bug")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="folder of a target (default: the embedded pair)")
    parser.add_argument("--head", help="folder of its EAGLE-1 head")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all there are")
    parser.add_argument(
        "--gpt_fast", help="a checkout of gpt-fast; without it, gpt_fast is left out"
    )
    parser.add_argument("--eagle_tree", help="of fasteagle's eagle (default: the head's own)")
    parser.add_argument("--venvs", type=Path, default=default_folder(), help="default: %(default)s")
    parser.add_argument("--device", type=device_argument, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--prompts", type=positive, choices=range(1, len(MODULES) + 1), default=10)
    parser.add_argument("--timeout", type=positive, default=900, help="seconds for any answer")
    add_run(parser, new_tokens=128, repeats=5, eager=False)
    args = parser.parse_args()
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """End the program unless the flags fit each other; fill in what was not given."""
    if (args.base is None) != (args.head is None):
        refuse("--base and --head make a pair; give both, or neither for the embedded pair")
    if args.gpt_fast and not (Path(args.gpt_fast) / "generate.py").is_file():
        refuse(f"--gpt_fast {args.gpt_fast} has no generate.py; give a checkout of gpt-fast")
    if args.engines and "gpt_fast" in args.engines and not args.gpt_fast:
        refuse("--engines gpt_fast needs --gpt_fast, a checkout of gpt-fast")
    args.embedded = args.base is None
    args.base, args.head = args.base or str(demo.BASE), args.head or str(demo.HEAD)
    if not args.engines:
        args.engines = [name for name in ENGINES if name != "gpt_fast" or args.gpt_fast]
    args.engines = list(dict.fromkeys(args.engines))


if __name__ == "__main__":
    main(parse())
