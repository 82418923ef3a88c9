"""What is an engine, in words? Architecture, precision and drafter."""

from __future__ import annotations

import torch

from fasteagle.engine import Engine
from fasteagle.families import target_weights
from fasteagle.tree_file import precision


def describe(engine: Engine) -> str:
    """An engine in words: architecture, size, dtype, device, drafter."""
    target = engine.target
    n_parameters = sum(torch.Size(w.shape).numel() for w in target_weights(target.config))
    shape = f"{n_parameters / 1e6:,.1f}M, {precision(target)}, {target.device}"
    model = f"{target.config.architecture} ({shape})"
    return f"{model}, {'no draft' if engine.drafter.n_nodes == 1 else engine.drafter.words}"
