"""How does the device go on while the host reads? Another round is launched before one is read.

A round's tokens go to pinned memory behind it, with an event; the host waits for that event only,
while the round after it runs already. What a row wrote after its end is thrown away: one round at
most. Rows, stop strings and streams see what they would see without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fasteagle.cache import bucket_of
from fasteagle.request import Row
from fasteagle.rounds import State


def later(tensor: Tensor) -> Callable[[], list[list[int]]]:
    """Send a CUDA tensor to pinned memory behind what runs; the result waits for it alone."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def read() -> list[list[int]]:
        event.synchronize()
        return copy.tolist()

    return read


class Readback:
    """What a step emitted for some rows, on its way to the host."""

    @torch.inference_mode()
    def __init__(self, state: State, rows: Mapping[int, Row]) -> None:
        self.state, self.rows = state, dict(rows)
        self.read: Callable[[], list[list[int]]]
        if state.emitted.is_cuda:
            self.read = later(state.emitted)
        else:
            tokens = state.emitted.tolist()  # now: the next round writes over it
            self.read = lambda: tokens

    @torch.inference_mode()
    def deliver(self) -> None:
        """Wait for the tokens and hand them to the rows, by seat, that are not done before."""
        emitted = self.read()
        for seat, row in self.rows.items():
            if row.done:
                continue
            *tokens, count = emitted[seat]
            if row.tokens:
                row.stats.accepted.append(count - 1)
            row.take(tokens[:count], drafted=count - 1)
            if row.done:
                self.state.active[seat] = False


class Rounds:
    """Rounds one after another, for one call of Engine.decode.

    launch: run a round on caches of so many slots; buckets: the sizes it is built for; reach: slots
    behind a row's length that a round may write; n_path: tokens a row that it emits at most; ahead:
    launch a round before reading the last one.
    """

    def __init__(
        self,
        state: State,
        launch: Callable[[int], None],
        buckets: Sequence[int],
        *,
        reach: int,
        n_path: int,
        ahead: bool,
    ) -> None:
        self.state, self.launch, self.buckets = state, launch, buckets
        self.reach, self.n_path, self.ahead = reach, n_path, ahead
        self.flying: Readback | None = None  # launched, not read

    def next(self, busy: Mapping[int, Row]) -> None:
        """Hand rows the tokens of their next round; busy: all rows that are not done, by seat."""
        first = self.flying or self._launched(busy, 0)
        self.flying = None
        if self.ahead and self._is_worth(busy):
            self.flying = self._launched(busy, self.n_path)
        first.deliver()

    def land(self) -> None:
        """Hand out what is flying: before anything but a round runs."""
        if self.flying is not None:
            self.flying.deliver()
        self.flying = None

    def drop(self) -> None:
        """Wait for what is flying when nobody is left who needs it: the call that launched it pays
        for it, not the next.
        """
        if self.flying is not None:
            self.flying.read()
        self.flying = None

    def _launched(self, busy: Mapping[int, Row], unread: int) -> Readback:
        """A round, whose rows may be longer than the host knows by `unread` tokens."""
        self.launch(max(row.length for row in busy.values()) + unread + self.reach)
        return Readback(self.state, busy)

    def _is_worth(self, busy: Mapping[int, Row]) -> bool:
        """Whether a row surely goes on and a round more stays within the bucket of this one: a
        larger one may not be built yet, nor be needed in the end.
        """
        slots = max(row.length for row in busy.values()) + self.reach
        goes_on = any(row.room - len(row.tokens) > 1 for row in busy.values())
        return goes_on and slots + self.n_path <= bucket_of(self.buckets, slots)
