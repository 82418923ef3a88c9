"""Where do keys and values live?

    L layers  B batch  G kv heads  S new tokens  T cache slots  D head dim  P longest path

One pair of tensors at a fixed address, allocated once and never cleared: a row's `length`, kept by
the engine, is the truth. Slots past it hold leftovers of the last tree; masks keep them unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasteagle.compile import Mode

FIRST_BUCKET = 512


class LayerCache(NamedTuple):
    k: Tensor  # [B, G, T, D]
    v: Tensor  # [B, G, T, D]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v `[B, S, G, D]` at slots `[B, S]`."""
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        self.k[rows, :, slots] = k
        self.v[rows, :, slots] = v

    def read(self, n_slots: int) -> tuple[Tensor, Tensor]:
        """The first `n_slots` slots of k and v, `[B, G, n_slots, D]`; a view."""
        return self.k[:, :, :n_slots], self.v[:, :, :n_slots]


class KVCache:
    """Keys and values of all layers, `[L, B, G, T, D]` each."""

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        # Views made once: a traced step takes each layer as an input of its own and writes it in
        # place. Selecting layers inside the graph makes Inductor copy every layer, every step.
        self.layers = [LayerCache(k, v) for k, v in zip(self.k, self.v, strict=True)]

    @property
    def n_slots(self) -> int:
        return self.k.shape[3]

    @property
    def n_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def slots(self, start: Tensor, n_rows: int) -> Tensor:
        """`start + 0 .. n_rows - 1` as slots `[B, n_rows]`.

        A padded row may point past the end; it lands in the last slot, which no sequence uses.
        """
        rows = torch.arange(n_rows, device=start.device)
        return (start[:, None] + rows).clamp(max=self.n_slots - 1)

    def keep(self, start: Tensor, path: Tensor, *, mode: Mode) -> None:
        """Move slots `start + path` to `start ..` on every layer: start `[B]`, path `[B, P]`.

        Always P rows; those past the accepted count are garbage behind `length`. A traced step
        moves one layer at a time (its inputs are the layers); otherwise all layers go together, in
        two kernels a side or, where a step is captured on CUDA, in one of Triton's.
        """
        if mode == "captured" and self.k.is_cuda:
            from fasteagle.triton_cache import move_rows

            move_rows(self.k, self.v, start, path)
            return
        # A row that ended at the context limit may point past the end; nothing reads what it moves.
        source = (start[:, None] + path).clamp(max=self.n_slots - 1)
        target = self.slots(start, path.shape[1])
        if mode == "traced":
            rows = torch.arange(path.shape[0], device=path.device)[:, None]
            for layer in self.layers:
                layer.write(target, layer.k[rows, :, source], layer.v[rows, :, source])
            return
        layers, batch, heads, _, dim = self.k.shape
        size = (layers, batch, heads, path.shape[1], dim)
        for side in (self.k, self.v):
            moved = side.gather(3, source[None, :, None, :, None].expand(size))
            side.scatter_(3, target[None, :, None, :, None].expand(size), moved)


def buckets(n_slots: int, *, compiled: bool) -> list[int]:
    """The cache lengths that attention may read: 512, 1k, 2k, ... and all `n_slots`.

    None within an eighth of `n_slots`. Eager steps get finer ones for free, multiples of 64.
    """
    if not compiled:
        return [*range(64, n_slots, 64), n_slots]
    sizes, size = [], FIRST_BUCKET
    while size * 9 < n_slots * 8:
        sizes.append(size)
        size *= 2
    return [*sizes, n_slots]


def bucket_of(sizes: Sequence[int], longest: int) -> int:
    """The smallest of rising sizes that is `longest` or more; the largest if none is."""
    return next((size for size in sizes if size >= longest), sizes[-1])
