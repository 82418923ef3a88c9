"""Of two ways to compute attention, is one right and is it the faster? On this GPU, for one shape.

    B batch  G kv heads  R rows of all query heads of a kv head  T cache slots  D head dim

Both run in CUDA graphs, as in a captured step, over keys and values that are together larger than
the GPU's cache: a layer finds none of its own there. All T slots are live, which is where ours has
least to win.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.clock import clock
from fasteagle.compile import captured

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, bias, newest
CLOSE = 0.02  # norm of a difference over that of the right result; bfloat16 has 3 digits
LAUNCHES = 8  # in one graph, at least
REPLAYS = 4  # timed together
REPEATS = 7
MOST_LAYERS = 64
SPARE_SLOTS = 16  # of a cache, behind those that are read


class Shape(NamedTuple):
    """All that decides how fast attention is."""

    batch: int
    heads: int  # G
    rows: int  # R
    dim: int
    slots: int  # T
    dtype: torch.dtype
    device: torch.device


class Inputs(NamedTuple):
    """Noise in the place of a layer's tensors."""

    q: Tensor  # [B, G, R, D]
    k: Tensor  # [B, G, T, D], a view of a longer cache
    v: Tensor
    bias: Tensor  # [B, 1, R, T]
    newest: Tensor  # [B] int64


def noise(shape: Shape, *, live: int, seed: int = 0) -> Inputs:
    """Inputs whose rows see a random half of the first `live` slots, and slot 0."""
    batch, heads, n_rows, dim, n_slots, dtype, device = shape
    generator = torch.Generator(device).manual_seed(seed)  # the user's random numbers stay

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    k, v = randn(2, batch, heads, n_slots + SPARE_SLOTS, dim)[:, :, :, :n_slots]
    seen = torch.rand(batch, 1, n_rows, n_slots, generator=generator, device=device) < 0.5
    seen[..., 0] = True
    seen[..., live:] = False
    bias = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
    newest = torch.full((batch,), live - 1, device=device)
    return Inputs(randn(batch, heads, n_rows, dim), k, v, bias, newest)


def agrees(ours: Attention, theirs: Attention, shape: Shape) -> bool:
    """Whether both compute the same, with a third of the slots unseen by all."""
    inputs = noise(shape, live=max(1, shape.slots * 2 // 3))
    found, wanted = ours(*inputs).float(), theirs(*inputs).float()
    return bool((found - wanted).norm() < CLOSE * wanted.norm())  # not so for NaN


def faster(ours: Attention, theirs: Attention, shape: Shape) -> bool:
    """Whether `ours` takes less time than `theirs`."""
    inputs = layers(shape)
    replays = [_replay(attention, inputs) for attention in (ours, theirs)]
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for replay, found in zip(replays, times, strict=True):
            with torch.cuda.device(shape.device):
                found += clock(replay, shape.device, repeats=1, rounds=REPLAYS, warm_up=0)
    return statistics.median(times[0]) < statistics.median(times[1])


def layers(shape: Shape) -> list[Inputs]:
    """As many layers' inputs as fill the GPU's cache twice, in reason."""
    first = noise(shape, live=shape.slots)
    cache = 0
    if shape.device.type == "cuda":
        cache = torch.cuda.get_device_properties(shape.device).L2_cache_size
    count = min(MOST_LAYERS, max(1, -(-2 * cache // (first.k.nbytes + first.v.nbytes))))
    return [first, *(noise(shape, live=shape.slots, seed=seed) for seed in range(1, count))]


def in_turn(attention: Attention, inputs: list[Inputs]) -> tuple[Callable[[], None], int]:
    """A call of attention over each of the inputs in turn, and how many times it is called."""
    n = max(LAUNCHES, len(inputs)) if inputs[0].q.is_cuda else 1

    def call() -> None:
        for index in range(n):
            attention(*inputs[index % len(inputs)])

    return call, n


def _replay(attention: Attention, inputs: list[Inputs]) -> Callable[[], None]:
    """Attention over each of the inputs in turn, as one graph."""
    call, _ = in_turn(attention, inputs)
    call()  # compiles, and makes plans
    torch.cuda.synchronize(inputs[0].q.device)
    return captured(call).replay
