"""Decode token ids greedily and write what happened in every round as JSON.

fasteagle trace --prompt_ids prompts.json --max_new_tokens 64 --out trace.json
fasteagle trace --checkpoint_path base --draft_checkpoint_path head --tree dynamic \\
    --total_tokens 26 --depth 5 --top_k 6 --prompt_ids prompts.json --max_new_tokens 64 \\
    --out trace.json

The prompts file is a JSON list of lists of token ids; no tokenizer is needed. For each prompt
`cases` holds `prompt`, `output` (new tokens), `accepted` (drafted tokens accepted, a round each)
and `trees` (the tokens of every round's tree, root first, in the order of the tree's nodes; for a
tree without a fixed shape an object of `tokens` and `parents`).

A round commits its root and the accepted drafts. Rounds run until max_new_tokens or more are
committed, or a stop token is; `output` is cut there, `accepted` and `trees` keep the last round
whole. (EAGLE's own loop stops once it has *passed* its limit, so it may record one round more.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fasteagle.commands.compiling import warm_up
from fasteagle.commands.numbers import positive
from fasteagle.commands.options import (
    add_compile,
    add_model,
    load_engine,
)
from fasteagle.commands.prompts import check_prompts
from fasteagle.commands.report import note, output_file, write_json
from fasteagle.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fasteagle trace`; unlike elsewhere, the dtype is float32 everywhere."""
    add_model(parser, tree_top_k=("--tree_top_k", "--top_k"))
    parser.set_defaults(dtype="float32")
    parser.add_argument(
        "--prompt_ids",
        required=True,
        metavar="FILE",
        help="JSON list of prompts, each a list of token ids",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=positive,
        required=True,
        metavar="N",
        help="tokens of output a prompt; fewer only where a stop token ends it",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    add_compile(parser)


def run(args: argparse.Namespace) -> None:
    """Trace every prompt; the file appears when all are done."""
    prompts = read_prompt_ids(args.prompt_ids)
    if Path(args.prompt_ids).resolve() == Path(args.out).resolve():
        raise ValueError(f"--prompt_ids and --out both name {args.out}; give another --out")
    with output_file(args.out, "--out") as file:
        engine, loaded = load_engine(args, text=False, compiled=args.compile)
        check(engine, prompts, args.max_new_tokens)
        note(loaded)
        if args.compile:
            longest = max(map(len, prompts)) + args.max_new_tokens
            warm_up(engine, sampled=False, n_tokens=longest)
        cases = [trace(engine, prompt, args.max_new_tokens) for prompt in prompts]
        tree = engine.drafter.tree_name
        header = {
            "checkpoint": args.checkpoint_path,
            "draft": args.draft_checkpoint_path,
            "drafter": engine.drafter.words,
            "tree": f"{tree} ({engine.drafter.n_nodes} rows with the root)" if tree else None,
            "dtype": args.dtype,
            "temperature": 0,
        }
        write_json(file, header | {"cases": cases})
    note(f"wrote {len(cases)} cases to {args.out}")


def read_prompt_ids(name: str) -> list[list[int]]:
    """The prompts of a JSON file; ValueError if it is no list of lists of token ids."""
    try:
        prompts = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(
            f"--prompt_ids {name} cannot be read ({error.strerror}); give a JSON file of prompts"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--prompt_ids {name} is not JSON ({error})") from error
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"--prompt_ids {name}: expected a list of lists of token ids")
    for number, prompt in enumerate(prompts, 1):
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not ids or not prompt:
            raise ValueError(
                f"--prompt_ids {name}: prompt {number} is {json.dumps(prompt)[:40]}; "
                "expected a list of token ids"
            )
    return prompts


def check(engine: Engine, prompts: list[list[int]], n_tokens: int) -> None:
    """ValueError if a prompt cannot be decoded, before the first one is."""
    check_prompts(engine, prompts)
    longest = max(map(len, prompts))
    if longest + n_tokens > engine.max_length:
        raise ValueError(
            f"the longest prompt, {longest} tokens, and {n_tokens} new ones exceed the context of "
            f"{engine.max_length}; ask for less"
        )


def trace(engine: Engine, prompt: list[int], n_tokens: int) -> dict[str, Any]:
    """One case. The newest token that decoding gives, the next root, is not committed yet."""
    rows = engine.rows([engine.request(prompt, max_new_tokens=n_tokens + 1)])
    rows[0].room = n_tokens + 1  # as it is not, it may be the first one past the context
    engine.ahead = False  # the state is to be that of the round just read
    trees = [_tree(engine) for _ in engine.decode(rows)]
    accepted = rows[0].stats.accepted
    return {
        "prompt": prompt,
        "output": rows[0].tokens[:n_tokens],
        "accepted": accepted,
        "trees": trees[: len(accepted)],
    }


def _tree(engine: Engine) -> Any:
    """The tree to verify next: tokens, with parents where they may change from round to round."""
    tokens, parents = (part[0].tolist() for part in engine.state.tree)
    return tokens if engine.drafter.is_static else {"tokens": tokens, "parents": parents}
