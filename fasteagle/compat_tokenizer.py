"""Which calls do EAGLE's scripts make on a Hugging Face tokenizer? The same on ours.

B batch  S prompt length with padding  n tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasteagle.chat import Messages, render_chat
from fasteagle.tokenizer import Tokenizer

Ids = Tensor | Sequence[Sequence[int]]  # [B, S]


class Encoding(dict[str, Any]):
    """What a tokenizer call returns: `input_ids` and `attention_mask`, by key or by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"an encoding has {', '.join(self)}, not {name}") from error

    def to(self, device: torch.device | str) -> Encoding:
        """The same on a device; needs `return_tensors="pt"`."""
        return Encoding({name: value.to(device) for name, value in self.items()})


class CompatTokenizer:
    """Our tokenizer with the names of a Hugging Face one. A keyword it lacks is a TypeError."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        padding: bool = True,
    ) -> Encoding:
        """Encode one text or several, as lists of ids, one a text.

        add_special_tokens: put BOS first. `return_tensors="pt"` makes tensors `[B, S]`, which are
        always padded, on the left; lists never are. padding is accepted for old scripts' sake.
        """
        del padding
        single = isinstance(texts, str)
        listed = [texts] if isinstance(texts, str) else texts
        rows = [self.encode(text, add_special_tokens=add_special_tokens) for text in listed]
        masks = [[1] * len(row) for row in rows]
        if return_tensors is None:
            both = (rows[0], masks[0]) if single else (rows, masks)
            return Encoding(zip(("input_ids", "attention_mask"), both, strict=True))
        if return_tensors != "pt":
            raise ValueError(f'return_tensors is {return_tensors!r}; give "pt" or nothing')
        width = max(map(len, rows))
        pad = self.tokenizer.eos_id or 0
        return Encoding(
            input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + row for row in masks]),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; a special token written in it, as chat templates do, is that token."""
        return self.tokenizer.encode(text, bos=add_special_tokens, special=True)

    def apply_chat_template(
        self, messages: Messages, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> Any:
        """The conversation in the checkpoint's own format, as ids or as text."""
        tokenizer = self.tokenizer
        if tokenize:
            return tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        return render_chat(
            messages,
            template=None,
            tokenizer=tokenizer,
            add_generation_prompt=add_generation_prompt,
        )

    def decode(self, ids: Tensor | Sequence[int], **_: bool) -> str:
        """Text of ids `[n]`. Special tokens are left out whatever the keywords say."""
        return self.tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else ids)

    def batch_decode(self, rows: Ids, **_: bool) -> list[str]:
        """Text of every row of ids `[B, n]`."""
        return [self.decode(ids) for ids in rows]
