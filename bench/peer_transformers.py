"""How do the workers of peers.py run transformers? `generate`, greedy, in two settings of its own.

transformers           its default: a cache that grows, SDPA attention
transformers_compiled  `cache_implementation="static"` and the compiled forward that it calls for
                       (https://huggingface.co/docs/transformers/llm_optims); generate compiles by
                       itself on CUDA alone, so on the CPU it is told to
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `generate` that make an engine."""
    if args.engine == "transformers":
        return {}
    config: Any = CompileConfig(fullgraph=True, mode="reduce-overhead")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def load(args: argparse.Namespace) -> Callable[[list[int], int], dict[str, Any]]:
    """No eos id: every text gets its full length."""
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=args.torch_dtype)
    model = model.to(args.device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    chosen = settings(args)

    def generate(prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        ids = torch.tensor([prompt], device=args.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **chosen,
        )
        return {"tokens": found[0, len(prompt) :].tolist()}

    return generate
