"""How do the workers of peers.py run the package eagle-llm, by the authors of EAGLE?

eagle_llm        `eagenerate`: tree mc_sim_7b_63. It ends once more than max_new_tokens are out, so
                 it is asked for one less; the tokens past what was asked for are not counted, the
                 time of its last round is.
eagle_llm_plain  `naive_generate`, its plain decoding on the same model and caches, which runs the
                 target once more after the last token.

Its eos check stays, with an id that no text holds. A tokenizer is not loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from eagle.model import ea_model
from safetensors.torch import load_file

NO_TOKENIZER = SimpleNamespace(
    from_pretrained=lambda _: SimpleNamespace(eos_token_id=-1)  # never a token
)


def head_folder(head: Path, folder: Path) -> Path:
    """A head as eagle-llm wants it: config.json and pytorch_model.bin."""
    if (head / "pytorch_model.bin").is_file():
        return head
    (folder / "config.json").write_text((head / "config.json").read_text())
    torch.save(load_file(head / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def check_context(base: str, n_tokens: int) -> None:
    """ValueError unless its caches, as long as the model's context, hold a text and a tree."""
    context = json.loads((Path(base) / "config.json").read_text())["max_position_embeddings"]
    needed = n_tokens + 2 * len(ea_model.mc_sim_7b_63)
    if needed > context:
        raise ValueError(
            f"eagle-llm's caches have {context} slots, {needed} are needed; ask for fewer tokens"
        )


def load(args: argparse.Namespace) -> Callable[[list[int], int], dict[str, Any]]:
    ea_model.AutoTokenizer = NO_TOKENIZER
    keywords = {} if args.device == "cpu" else {"device_map": {"": args.device}}
    with tempfile.TemporaryDirectory() as folder:
        model = ea_model.EaModel.from_pretrained(
            base_model_path=args.base,
            ea_model_path=str(head_folder(Path(args.head), Path(folder))),
            torch_dtype=args.torch_dtype,
            low_cpu_mem_usage=True,
            **keywords,
        ).eval()
    rounds = itertools.count()
    judge = ea_model.evaluate_posterior

    def counted(*given: Any) -> Any:
        next(rounds)
        return judge(*given)

    ea_model.evaluate_posterior = counted

    def plain(prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        ids = torch.tensor([prompt], device=args.device)
        steps = model.naive_generate(ids, max_steps=max_new_tokens)
        *_, found = steps
        return {"tokens": found[0, len(prompt) :].tolist()}

    def eagle(prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        nonlocal rounds
        check_context(args.base, len(prompt) + max_new_tokens)
        rounds = itertools.count()
        ids = torch.tensor([prompt], device=args.device)
        found = model.eagenerate(ids, max_new_tokens=max_new_tokens - 1)
        tokens = found[0, len(prompt) :].tolist()
        return {"tokens": tokens, "rounds": next(rounds), "advanced": len(tokens)}

    return eagle if args.engine == "eagle_llm" else plain
