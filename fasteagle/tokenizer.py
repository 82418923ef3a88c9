"""How do text and token ids turn into each other? A checkpoint's tokenizer.json or tokenizer.model.

Encoding is the Hugging Face tokenizers' own. Decoding is a table, token -> bytes (detokenize.py),
so that streamed and whole text agree. It ignores `clean_up_tokenization_spaces`, which edits text,
and marks each invalid byte sequence alone, where byte fallback gives up the whole run of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fasteagle.chat import ChatTemplate, Messages, render_chat
from fasteagle.detokenize import IncrementalDecoder, StopStrings
from fasteagle.tokenizer_files import (
    TOKENIZER_FILES,
    TokenizerSettings,
    find_tokenizer_file,
    has_tokenizer,
    read_settings,
)
from fasteagle.tokenizer_models import JsonBackend, SentencePieceBackend

__all__ = [
    "TOKENIZER_FILES",
    "IncrementalDecoder",
    "StopStrings",
    "Tokenizer",
    "has_tokenizer",
    "load_tokenizer",
]


class Backend(Protocol):
    """One file format: ids of plain text, and the bytes of an id."""

    size: int
    drop_spaces: int  # leading spaces of a whole text that encoding had put there
    special_ids: frozenset[int]
    adds_bos: bool

    def encode(self, text: str, *, special: bool) -> list[int]: ...

    def usual_tokens(self) -> dict[str, str | None]: ...

    def piece(self, token: int) -> bytes | None: ...

    def token_id(self, content: str) -> int | None: ...


class Tokenizer:
    """Encode, decode and stream; build it with `load_tokenizer`."""

    def __init__(self, backend: Backend, settings: TokenizerSettings) -> None:
        self._backend = backend
        self._pieces: dict[int, bytes] = {}
        named = {**backend.usual_tokens(), **settings.named}
        self.special_tokens = {name: content for name, content in named.items() if content}
        self.chat_templates = settings.chat_templates
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        special = map(backend.token_id, settings.special)
        self.special_ids = backend.special_ids | {token for token in special if token is not None}
        self.adds_bos = backend.adds_bos if settings.add_bos is None else settings.add_bos

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._backend.size

    def token_id(self, content: str) -> int | None:
        """The id of the token written exactly so, or None."""
        return self._backend.token_id(content)

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of the text, after BOS where the model is used to one.

        `special` reads "</s>" in the text as that token, which only a chat template should write;
        otherwise it is four characters.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode, {error.reason}; fix it") from error
        ids = self._backend.encode(text, special=special)
        return [self.bos_id, *ids] if bos and self.adds_bos and self.bos_id is not None else ids

    def encode_chat(
        self,
        messages: Messages,
        template: ChatTemplate | str | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation, with one BOS whether or not the template writes it."""
        text = render_chat(
            messages,
            template=template,
            tokenizer=self,
            add_generation_prompt=add_generation_prompt,
        )
        written = self.special_tokens.get("bos_token")
        return self.encode(text, bos=not (written and text.startswith(written)), special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a whole sequence, without its special tokens."""
        decoder = self.decoder()
        return decoder.push(ids) + decoder.flush()

    def decoder(self, prompt_ids: Sequence[int] = ()) -> IncrementalDecoder:
        """Stream the text after a prompt: decode(prompt) + pushes == decode(prompt + new)."""
        decoder = IncrementalDecoder(self._piece, drop_spaces=self._backend.drop_spaces)
        decoder.push(prompt_ids)
        return decoder

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            assert token >= 0, f"token id {token} is negative"
            # Models pad their vocabulary past the tokenizer's: such ids are no text.
            skip = token in self.special_ids or token >= self._backend.size
            piece = self._pieces[token] = b"" if skip else self._backend.piece(token) or b""
        return piece

    def _named_id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self._backend.token_id(content)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder, tokenizer.json first."""
    path = find_tokenizer_file(folder)
    settings = read_settings(folder)
    kind = JsonBackend if path.suffix == ".json" else SentencePieceBackend
    return Tokenizer(kind(path, settings), settings)
