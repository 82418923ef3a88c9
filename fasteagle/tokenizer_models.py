"""How do tokenizer.json and tokenizer.model cut text into ids, and which bytes is an id?"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from fasteagle.tokenizer_files import AGAIN, TokenizerSettings, read_content, read_json

SPACE = "\u2581"  # how sentencepiece writes a space
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# A protobuf field given again at the end overrides: normalizer_spec { add_dummy_prefix: false }.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write each byte: "A" is 0x41, U+0120 is 0x20."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    stand_ins = [*printable, *range(256, 256 + len(others))]
    return {chr(code): byte for code, byte in zip(stand_ins, printable + others, strict=True)}


BYTE_OF = _byte_level_alphabet()


class JsonBackend:
    """A tokenizer.json, read by `tokenizers`."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        content = read_json(path)
        if not isinstance(content.get("model"), dict):
            raise ValueError(f"{path} has no tokenizer model in it; {AGAIN}")  # noqa: TRY004
        with _RefuseBadFile(path):
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_missing(path, settings)
        self._rule = _read_piece_rule(path, content.get("decoder"))
        self._lock = Lock()
        known = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(n for n, token in known.items() if token.special)
        self.drop_spaces = self._rule.drop_spaces
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        opening = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self._opens_with = next((token for token in opening if token in self.special_ids), None)
        self.adds_bos = settings.llama or self._opens_with is not None

    def usual_tokens(self) -> dict[str, str | None]:
        """Special tokens that no settings file need name."""
        usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        found: dict[str, str | None] = {
            name: content
            for name, content in usual.items()
            if self.token_id(content) in self.special_ids
        }
        if self._opens_with is not None:
            found["bos_token"] = self._tokenizer.id_to_token(self._opens_with)
        return found

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of the text; `special` reads special tokens in it."""
        with self._lock:
            self._tokenizer.encode_special_tokens = not special
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int) -> bytes | None:
        """The bytes that a token stands for."""
        content = self._tokenizer.id_to_token(token)
        return None if content is None else self._rule.piece(content)

    def token_id(self, content: str) -> int | None:
        """The id of the token written exactly so."""
        return self._tokenizer.token_to_id(content)

    def _add_missing(self, path: Path, settings: TokenizerSettings) -> None:
        known = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}
        for wanted, token in sorted(settings.added.items()):
            if token.content not in known:
                self._tokenizer.add_tokens([token])
            found = self._tokenizer.token_to_id(token.content)
            if found != wanted:
                raise ValueError(
                    f"{token.content!r} is token {wanted} in the files beside {path}, {found} in "
                    "it; take all the tokenizer files from one checkpoint"
                )
        # A named token that the file lists as ordinary is special all the same.
        named = sorted(settings.special)
        self._tokenizer.add_special_tokens([s for s in named if self.token_id(s) is not None])


@dataclass(frozen=True)
class PieceRule:
    """A tokenizer.json's decoder, as a rule for one token."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    drop_spaces: int

    def piece(self, content: str) -> bytes:
        for old, new in self.replacements:
            content = content.replace(old, new)
        if self.byte_fallback and (byte := BYTE_TOKEN.fullmatch(content)):
            return bytes([int(byte[1], 16)])
        if self.byte_level and all(char in BYTE_OF for char in content):
            return bytes(BYTE_OF[char] for char in content)
        return content.encode()


def _read_piece_rule(path: Path, decoder: dict[str, Any] | None) -> PieceRule:
    decoder = decoder or {"type": None}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    replacements: list[tuple[str, str]] = []
    drop_spaces = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                drop_spaces = start
            case {"type": "Metaspace", "replacement": old}:
                replacements.append((old, " "))
                drop_spaces = int(step.get("prepend_scheme", "always") != "never")
            case _:
                raise ValueError(
                    f"{path} decodes with {step['type']}, which is not supported; expected "
                    "ByteLevel, or Replace, ByteFallback, Fuse and Strip as LLaMA has"
                )
    return PieceRule(
        "ByteLevel" in kinds, "ByteFallback" in kinds, tuple(replacements), drop_spaces
    )


class SentencePieceBackend:
    """A tokenizer.model, read by sentencepiece, with the added tokens that it cannot hold."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        content = read_content(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=content + WITHOUT_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a sentencepiece model; {AGAIN}") from error
        n_pieces = self._model.vocab_size()
        ids = list(range(n_pieces))
        meta = {n for n in ids if self._model.is_control(n) or self._model.is_unknown(n)}
        self._added = {n: AddedToken(self._model.id_to_piece(n), special=True) for n in meta}
        self._added.update(settings.added)
        self._id_of = {token.content: n for n, token in self._added.items()}
        self._all = _Splitter(self._added.items())
        self._ordinary = _Splitter((n, t) for n, t in self._added.items() if not t.special)
        self._settings = settings
        self.special_ids = frozenset(n for n, token in self._added.items() if token.special)
        self.size = max([n_pieces, *(1 + n for n in self._added)])
        self.drop_spaces = self._count_dropped() if settings.add_prefix_space else 0
        self.adds_bos = True

    def usual_tokens(self) -> dict[str, str | None]:
        """Special tokens that no settings file need name."""
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.unk_id())
        names = ("bos_token", "eos_token", "unk_token")
        return {
            name: self._model.id_to_piece(token)
            for name, token in zip(names, ids, strict=True)
            if token >= 0
        }

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of the text; `special` reads special tokens in it."""
        ids: list[int] = []
        for start, segment, token in (self._all if special else self._ordinary).split(text):
            prefixed = self._settings.add_prefix_space and (self._settings.legacy or start == 0)
            ids += (self._model if prefixed else self._inner).encode(segment)
            ids += [] if token is None else [token]
        return ids

    def piece(self, token: int) -> bytes | None:
        """The bytes that a token stands for."""
        if token in self._added:
            return self._added[token].content.encode()
        if token >= self._model.vocab_size():
            return None
        content = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(content[3:5], 16)])
        return content.replace(SPACE, " ").encode()

    def token_id(self, content: str) -> int | None:
        """The id of the token written exactly so."""
        if content in self._id_of:
            return self._id_of[content]
        token = self._model.piece_to_id(content)
        return None if self._model.is_unknown(token) else token

    def _count_dropped(self) -> int:
        # The model's flags are not readable without protobuf; what it does to two spaces tells.
        space = self._model.piece_to_id(SPACE)
        if self._model.is_unknown(space):
            return 0
        n_dropped = 2 - len(self._model.decode([space, space]))
        return sys.maxsize if n_dropped == 2 else n_dropped


class _Splitter:
    """Find added tokens in text, the longest first."""

    def __init__(self, added: Iterable[tuple[int, AddedToken]]) -> None:
        ordered = sorted(added, key=lambda pair: -len(pair[1].content))
        self._ids = [token for token, _ in ordered]
        spaces = {True: r"\s*", False: ""}
        patterns = [
            f"{spaces[entry.lstrip]}({re.escape(entry.content)}){spaces[entry.rstrip]}"
            for _, entry in ordered
        ]
        self._pattern = re.compile("|".join(patterns) or "(?!)")

    def split(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Each stretch of plain text: where it starts, the text, the added token that ends it."""
        start = 0
        for match in self._pattern.finditer(text):
            assert match.lastindex is not None, "every alternative is one group"
            yield start, text[start : match.start()], self._ids[match.lastindex - 1]
            start = match.end()
        yield start, text[start:], None


class _RefuseBadFile:
    """Turn what `tokenizers` raises for a bad file, a plain Exception, into a ValueError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is Exception:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self._path} is not a tokenizer: {reason}; {AGAIN}") from error
