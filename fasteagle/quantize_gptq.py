"""How is a checkpoint quantized for the inputs that a text gives it? GPTQ, layer by layer.

calibrate.py measures each matrix's inputs behind those already quantized; quant/gptq.py chooses the
codes; quantize.py writes the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.assemble import find_tokenizer
from fasteagle.calibrate import calibrate_head, calibrate_target
from fasteagle.checkpoint import check_pair, load_target, open_kind
from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.memory import free_memory
from fasteagle.model import Transformer
from fasteagle.parameters import weight_bytes
from fasteagle.quant.gptq import gptq
from fasteagle.quant.layout import Quantized, dequantize, stack
from fasteagle.quantize import Plan, dense_parameters, path_of, quantized_file
from fasteagle.source import Checkpoint
from fasteagle.windows import LENGTH, N_WINDOWS, calibration_windows


class Calibration(NamedTuple):
    """The text to calibrate on, and where."""

    file: str
    n_windows: int = N_WINDOWS
    length: int = LENGTH  # tokens of a window; no more than the model's context
    seed: int = 0  # of the choice of windows
    target: str | None = None  # of an EAGLE head: its model
    device: torch.device = torch.device("cpu")


def quantize_calibrated(
    plan: Plan, text: Calibration, *, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Quantize a checkpoint by GPTQ on a text; returns the file that was written.

    `say` is told where the text is short of what is good. ValueError or FileNotFoundError, before
    anything is written, for a text that is too short, a model without tokenizer, or a head without
    its model.
    """
    model = _check_target(plan, text)
    windows = _windows(model, text)
    widest = max(weight.shape[-1] for weight in plan.checkpoint.plan if weight.name in plan.bits)
    if windows.numel() < widest:
        say(
            f"the calibration text gives {windows.numel()} tokens for {widest} inputs of a matrix: "
            "rounding to nearest may be better; give a longer text"
        )
    target = _load_target(text) if text.target else None
    return quantize_on(plan, windows, target=target, device=text.device, say=say)


def quantize_on(
    plan: Plan,
    windows: Tensor,
    *,
    target: Transformer | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """The same on token windows `[n, S]`; a head needs its target."""
    with quantized_file(plan) as write:
        whole = _Whole(plan, write)

        def choose(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
            bits, recipe = plan.bits.get(name), plan.recipe
            if bits is None:
                return weight
            size = recipe.group_size
            chosen = gptq(weight, hessian, bits=bits, group_size=size, clip=recipe.clip)
            whole.put(name, chosen, seen=bool(hessian.any()))
            return dequantize(chosen)

        for name, value in dense_parameters(plan):
            if name not in plan.bits:
                write(name, value)
        if target is None:
            calibrate_target(plan.checkpoint, windows, choose, device=device)
        else:
            calibrate_head(plan.checkpoint, target, windows, choose, device=device)
    if whole.unseen:
        say(
            f"no calibration token was routed to {len(whole.unseen)} matrices of experts (the "
            f"first in {whole.unseen[0]}), which are rounded to nearest; give a longer text"
        )
    return path_of(plan)


class _Whole:
    """Writes parameters when they are whole: a stack's experts come one by one, in their order."""

    def __init__(self, plan: Plan, write: Callable[[str, Tensor | Quantized], None]) -> None:
        self.write = write
        self.heights = {weight.name: weight.shape[0] for weight in plan.checkpoint.plan}
        self.parts: list[Quantized] = []  # of the parameter that is under way
        self.unseen: list[str] = []  # a parameter's name for every expert that no token reached

    def put(self, name: str, part: Quantized, *, seen: bool) -> None:
        """Take a parameter or the next expert of one; with inputs all 0, GPTQ rounds to nearest."""
        self.parts.append(part)
        if not seen and part.shape[0] < self.heights.get(name, 0):
            self.unseen.append(name)
        n_rows = sum(each.shape[0] for each in self.parts)
        if n_rows == self.heights.get(name, n_rows):  # a tied lm_head is none of the plan's
            whole = stack(self.parts)
            assert whole is not None, "the parts of a parameter share a layout"
            self.write(name, whole)
            self.parts.clear()


def _check_target(plan: Plan, text: Calibration) -> Checkpoint:
    """The checkpoint of the model that reads the text: the one to quantize, or a head's target."""
    config = plan.checkpoint.config
    if plan.checkpoint.kind not in ("target", "eagle"):
        raise ValueError(
            f"GPTQ of {plan.checkpoint.words} is not supported; use --mode int4 to round to nearest"
        )
    if not isinstance(config, DraftConfig):
        if text.target is not None:
            raise ValueError(
                f"--target_checkpoint_path is for an EAGLE head; {plan.checkpoint.folder} is a "
                "target model: drop it"
            )
        return plan.checkpoint
    if text.target is None:
        raise ValueError(
            "an EAGLE head is calibrated on its model's features; give --target_checkpoint_path"
        )
    target = open_kind(text.target, "target", revision=None)
    assert isinstance(target.config, ModelConfig), "a target has a ModelConfig"
    check_pair(plan.checkpoint.folder, config, target.config)
    return target


def _load_target(text: Calibration) -> Transformer:
    """The model of an EAGLE head; in float32 where a quarter of the free memory holds it."""
    assert text.target is not None, "it was checked"
    exact = weight_bytes(text.target, dtype=torch.float32)["total"]
    small = exact <= free_memory(text.device) / 4
    dtype = torch.float32 if small else torch.bfloat16
    return load_target(text.target, dtype=dtype, device=text.device)


def _windows(model: Checkpoint, text: Calibration) -> Tensor:
    tokenizer = find_tokenizer(model.folder)
    if tokenizer is None:
        raise ValueError(
            f"{model.folder} has no tokenizer to read the calibration text with; put its "
            "tokenizer.json or tokenizer.model beside the weights"
        )
    config = model.config
    assert isinstance(config, ModelConfig), "a target has a ModelConfig"
    length = min(text.length, config.attention_span)
    return calibration_windows(
        tokenizer, text.file, n=text.n_windows, length=length, seed=text.seed
    )
