"""What was written so far? Every sequence's tokens, on the device.

B batch  S new tokens  T cache slots
"""

from __future__ import annotations

import torch

from fasteagle.draft.base import Accepted


class History:
    """Tokens `[B, T]` by position, valid up to and with the root, which is at `length`."""

    def __init__(self, batch: int, n_slots: int, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, n_slots, dtype=torch.int64, device=device)

    @property
    def n_bytes(self) -> int:
        return self.tokens.numel() * self.tokens.element_size()

    def write(self, news: Accepted) -> None:
        """Take in a piece of the sequence and the token after it.

        Row i's token is known already, as the one after row i - 1; only a sequence's first is not.
        Padding lands behind the root.
        """
        rows = torch.arange(news.following.shape[1] + 1, device=news.start.device)
        slots = (news.start[:, None] + rows).clamp(max=self.tokens.shape[1] - 1)
        known = self.tokens.gather(1, slots[:, :1])
        first = torch.where(news.n_valid[:, None] > 0, news.tokens[:, :1], known)
        self.tokens.scatter_(1, slots, torch.cat((first, news.following), 1))
