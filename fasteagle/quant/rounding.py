"""How are a weight's codes chosen without data? Round to the nearest code of a grid.

    O outputs  I inputs  J inputs stored  g group size  G groups of a row

Scales and zeros are numbers that bfloat16 holds exactly, so that no kernel rounds them: only the
dense product in 16 bits rounds the weights that they make.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasteagle.quant.layout import Quantized, pack_int4

CLIPS = ("minmax", "mse")
STORED = torch.bfloat16  # of scales and zeros
SHRINKS = 20  # how many narrower ranges the mse search tries
NARROWEST = 0.6  # of the full range


def quantize(weight: Tensor, *, bits: int, group_size: int, clip: str = "minmax") -> Quantized:
    """A weight `[O, I]` in `bits` bits, each group's (int8: row's) range found by itself.

    clip "minmax" covers every value; "mse" takes the range, among narrower ones around the same
    middle, whose codes have the least squared error. A last group that is not full is padded; the
    padding meets zeros in every product.
    """
    rows = weight.float()
    n_inputs = rows.shape[1]
    if bits == 8:
        scale = symmetric_grid(rows, clip)
        codes = symmetric_nearest(rows, scale).to(torch.int8)
        return Quantized(8, codes, scale.to(STORED), None, n_inputs)
    grouped = pad(rows, group_size).unflatten(1, (-1, group_size))
    scale, zero = grid(grouped, clip)
    values = nearest(grouped, scale, zero).flatten(1)
    scales, zeros = scale[..., 0].to(STORED), zero[..., 0].to(STORED)
    return Quantized(4, pack_int4(values, group_size), scales, zeros, n_inputs)


def pad(rows: Tensor, group_size: int) -> Tensor:
    """Rows `[O, I]` with their last value repeated to whole groups `[O, J]`: no range grows."""
    extra = -rows.shape[1] % group_size
    return F.pad(rows[None], (0, extra), mode="replicate")[0] if extra else rows


def nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The code 0..15 nearest to each value on the grid `(code - 8) * scale + zero`."""
    return ((values - zero) / scale).round().add_(8).clamp_(0, 15)


def symmetric_nearest(rows: Tensor, scale: Tensor) -> Tensor:
    """The code -127..127 nearest to each value on the grid `code * scale`."""
    return (rows / scale).round().clamp(-127, 127)


def grid(groups: Tensor, clip: str) -> tuple[Tensor, Tensor]:
    """Scale and zero `[..., 1]` of groups `[..., g]` for codes 0..15."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = _grid(low, high)
    if clip == "minmax":
        return best
    error = _error(groups, *best)
    for step in range(1, SHRINKS):
        tried = _grid(low * _share(step), high * _share(step))
        found = _error(groups, *tried)
        better = found < error
        best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
        error = torch.where(better, found, error)
    return best


def symmetric_grid(rows: Tensor, clip: str) -> Tensor:
    """Scale `[O, 1]` of rows `[O, I]` for codes -127..127."""
    bound = rows.abs().amax(-1, keepdim=True)
    best = _stored(bound / 127)
    if clip == "minmax":
        return best
    error = _symmetric_error(rows, best)
    for step in range(1, SHRINKS):
        scale = _stored(bound * _share(step) / 127)
        found = _symmetric_error(rows, scale)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    return best


def _grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    scale = _stored((high - low) / 15)
    return scale, (low + 8 * scale).to(STORED).float()


def _stored(scale: Tensor) -> Tensor:
    """A scale as it is stored, never 0: a group of equal values has only its zero."""
    return scale.to(STORED).float().clamp(min=2.0**-100)


def _share(step: int) -> float:
    """How much of the full range a step of the search takes."""
    return 1 - (1 - NARROWEST) * step / SHRINKS


def _symmetric_error(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows - symmetric_nearest(rows, scale) * scale).square().sum(-1, keepdim=True)


def _error(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    codes = nearest(groups, scale, zero)
    return ((codes - 8) * scale + zero - groups).square().sum(-1, keepdim=True)
