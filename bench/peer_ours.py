"""How do the workers of peers.py run fasteagle? `plain` and `eagle`, compiled."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fasteagle.assemble import load as load_engine


def load(args: argparse.Namespace) -> Callable[[list[int], int], dict[str, Any]]:
    """All steps are built before it returns; stop ids are off."""
    drafts = args.engine == "eagle"
    engine = load_engine(
        args.base,
        args.head if drafts else "none",
        tree=args.tree if drafts else None,
        dtype=args.dtype,
        device=args.device,
        compiled=True,
    )
    engine.warm_up()

    def generate(prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        [result] = engine.generate([prompt], max_new_tokens=max_new_tokens, stop_ids=[])
        answer: dict[str, Any] = {"tokens": result.tokens}
        if drafts:
            accepted = result.stats.accepted
            answer |= {"rounds": len(accepted), "advanced": sum(accepted) + len(accepted)}
        return answer

    return generate
