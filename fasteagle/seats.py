"""Which request sits in which row of the batch, and who is next? The queue; no tensors.

Requests sit down in the order in which they were handed in. When one is done, the next takes its
seat before the others' next round. A request's first token comes with its prompt's last chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from fasteagle.request import Row


class Seats:
    """The rows of one batch and the requests that wait for one."""

    def __init__(self, rows: Sequence[Row], n_seats: int) -> None:
        self.waiting = deque(rows)
        self.taken: list[Row | None] = [None] * n_seats

    @property
    def over(self) -> bool:
        return not self.waiting and not self.busy()

    def busy(self) -> dict[int, Row]:
        """The requests that are being decoded, by seat."""
        return {seat: row for seat, row in enumerate(self.taken) if row and not row.done}

    def fill(self) -> dict[int, Row]:
        """Begin a step: drop what the last one wrote, seat who waits; returns the new by seat."""
        new = {}
        for seat, row in enumerate(self.taken):
            if row:
                row.pieces = []
            if self.waiting and (row is None or row.done):
                new[seat] = self.taken[seat] = self.waiting.popleft()
        return new


def aligned_chunks(lengths: Mapping[int, int], size: int) -> list[dict[int, range]]:
    """Which part of each prompt goes into each chunk, by seat; all prompts end in the last one.

    size 4, lengths {0: 9, 2: 3} -> [{0: 0 to 4}, {0: 4 to 8}, {0: 8 to 9, 2: 0 to 3}]
    """
    counts = {seat: -(-length // size) for seat, length in lengths.items()}
    n_chunks = max(counts.values())
    chunks: list[dict[int, range]] = [{} for _ in range(n_chunks)]
    for seat, length in lengths.items():
        for index, begin in enumerate(range(0, length, size)):
            late = n_chunks - counts[seat]
            chunks[late + index][seat] = range(begin, min(begin + size, length))
    return chunks
