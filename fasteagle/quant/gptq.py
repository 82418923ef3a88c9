"""How are a weight's codes chosen with data? GPTQ (arXiv 2210.17323, section 3 and algorithm 1).

    O outputs  I inputs  J inputs stored  g group size  G groups of a row  K columns of a block

Columns are rounded one at a time; the error of each is made up for by the columns not yet rounded,
so that the layer's outputs on the calibration inputs change least.

Groups are static: the scale and zero of every g neighbouring columns of the *original* weight are
fixed before the first column is rounded. Columns may then be visited in any order and the result is
still in plain layout: no column order in the file, no gather in a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.quant.layout import Quantized, pack_int4
from fasteagle.quant.rounding import STORED, grid, pad, symmetric_grid

BLOCK = 128  # columns whose errors reach the rest of the weight in one product
# Of the mean of the Hessian's diagonal. The paper's 0.01 is as good with some 50 calibration tokens
# for each input and worse with fewer, where it fits those tokens and not the language.
DAMPING = 0.05
RETRIES = 3  # each with ten times the damping
LEAST_RETRY = 0.001


class Grid(NamedTuple):
    """The values that a weight may take: `code * scale + zero`, low <= code <= high."""

    scale: Tensor  # [G, O]
    zero: Tensor  # [G, O]
    low: int
    high: int
    size: int  # g

    def nearest(self, values: Tensor, group: int | Tensor) -> Tensor:
        """Signed codes of values `[..., O]` in the groups `[...]`."""
        codes = ((values - self.zero[group]) / self.scale[group]).round()
        return codes.clamp_(self.low, self.high)

    def value(self, codes: Tensor, group: int | Tensor) -> Tensor:
        """What signed codes `[..., O]` in the groups `[...]` stand for."""
        return codes * self.scale[group] + self.zero[group]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int,
    clip: str = "mse",
    act_order: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Quantized:
    """A weight `[O, I]` in `bits` bits, for inputs x `[n, I]` whose `x.T @ x` is the Hessian.

    hessian `[I, I]` is float32 or float64, in any scale, and everything is computed in its type. A
    group's range is chosen as in `rounding.quantize`, which ignores the Hessian; 8 bits have one
    scale a row and no group_size. act_order visits the columns with the largest inputs first.
    damping, a share of the diagonal's mean, is added to the diagonal. An input that was always 0
    takes no part: its column is rounded to nearest. ValueError if the Hessian holds NaN or infinity
    or is not positive definite even with much more damping.
    """
    n_inputs = weight.shape[1]
    assert hessian.shape == (n_inputs, n_inputs), f"{hessian.shape} for {n_inputs} inputs"
    size = group_size if bits == 4 else n_inputs
    rows = pad(weight.to(hessian.dtype), size)
    levels = _levels(rows, bits, size, clip)
    groups = torch.arange(rows.shape[1], device=rows.device) // size
    codes = levels.nearest(rows.T, groups).to(torch.int8)  # [J, O], stays so in the padding
    order = _order(hessian, act_order)
    factor = inverse_factor(_alive(hessian)[order][:, order], damping)
    codes[order] = _round_columns(rows.T[order], factor, levels, groups[order], block)
    scales = levels.scale.T.to(STORED)
    if bits == 8:
        return Quantized(8, codes.T.contiguous(), scales, None, n_inputs)
    packed = pack_int4(codes.T + 8, size)
    return Quantized(4, packed, scales, levels.zero.T.to(STORED), n_inputs)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U `[I, I]` with `U.T @ U = inverse(H + damping * mean(diag H) * 1)`.

    Tried in the Hessian's type, in float64, and then with more damping; ValueError after that.
    """
    tried = damping
    for _ in range(RETRIES + 1):
        for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(tried * damped.diagonal().mean())
            # H = R R^T with R upper is a Cholesky factor back to front; its inverse is U. No
            # inverse of H is formed, whose error would grow with the square of the condition.
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                upper = lower.flip(0, 1)
                one = torch.eye(len(upper), dtype=dtype, device=upper.device)
                factor = torch.linalg.solve_triangular(upper, one, upper=True)
                return factor.to(hessian.dtype)
        last, tried = tried, max(10 * tried, LEAST_RETRY)
    raise ValueError(
        f"the Hessian of {len(hessian)} inputs is not positive definite, even with {last:g} of its "
        "mean diagonal added; expected a sum of x.T @ x: calibrate again, in float32"
    )


def _levels(rows: Tensor, bits: int, size: int, clip: str) -> Grid:
    """The grid of rows `[O, J]` in groups of `size`; the same as rounding.quantize takes."""
    dtype = rows.dtype
    if bits == 8:
        scale = symmetric_grid(rows.float(), clip).T.to(dtype)
        return Grid(scale, torch.zeros_like(scale), -127, 127, size)
    scale, zero = grid(rows.float().unflatten(1, (-1, size)), clip)
    return Grid(scale[..., 0].T.to(dtype), zero[..., 0].T.to(dtype), -8, 7, size)


def _alive(hessian: Tensor) -> Tensor:
    """The Hessian `[I, I]` with an ordinary diagonal entry for each input that was always 0."""
    diagonal = hessian.diagonal()
    if not diagonal.isfinite().all() or not hessian.isfinite().all():
        raise ValueError(
            f"the Hessian of {len(hessian)} inputs holds NaN or infinity: so do the calibration "
            "inputs, or their sum overflows; check the checkpoint, calibrate in float32"
        )
    dead = diagonal == 0
    if not dead.any():
        return hessian
    usual = torch.ones_like(diagonal[:1]) if dead.all() else diagonal[~dead].mean()
    return hessian + torch.diag(torch.where(dead, usual, 0))


def _order(hessian: Tensor, act_order: bool) -> Tensor:
    """The order `[I]` in which columns are rounded."""
    diagonal = hessian.diagonal()
    if act_order:
        return diagonal.argsort(descending=True, stable=True)
    return torch.arange(len(diagonal), device=diagonal.device)


def _round_columns(
    columns: Tensor, factor: Tensor, levels: Grid, groups: Tensor, block: int
) -> Tensor:
    """Signed codes `[I, O]` int8 of columns `[I, O]`, which are changed, in their groups `[I]`."""
    codes = torch.empty_like(columns, dtype=torch.int8)
    for start in range(0, len(columns), block):
        stop = start + block
        corner = factor[start:stop, start:stop]
        errors = torch.empty_like(columns[start:stop])  # [K, O]
        for index, group in enumerate(groups[start:stop].tolist()):
            # What the columns of this block owe to this one; earlier blocks have paid theirs.
            column = columns[start + index] - corner[:index, index] @ errors[:index]
            code = levels.nearest(column, group)
            errors[index] = (column - levels.value(code, group)) / corner[index, index]
            codes[start + index] = code
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
