"""What is an engine, in words? Architecture, precision and drafter."""

from __future__ import annotations

import torch

from fasteagle.engine import Engine
from fasteagle.families import target_weights
from fasteagle.quant.experts import QuantExperts
from fasteagle.quant.linear import QuantLinear


def describe(engine: Engine) -> str:
    """An engine in words: architecture, size, dtype, device, drafter."""
    target = engine.target
    n_parameters = sum(torch.Size(w.shape).numel() for w in target_weights(target.config))
    kinds = QuantLinear | QuantExperts
    bits = {part.bits for part in target.modules() if isinstance(part, kinds)}
    stored = "".join(f"int{number} and " for number in sorted(bits))
    dtype = stored + str(target.dtype).removeprefix("torch.")
    model = f"{target.config.architecture} ({n_parameters / 1e6:,.1f}M, {dtype}, {target.device})"
    return f"{model}, {'no draft' if engine.drafter.n_nodes == 1 else engine.drafter.words}"
