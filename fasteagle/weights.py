"""What tensors do a checkpoint's files hold? Names and shapes at once, values one tensor at a time.

Reads model.safetensors, pytorch_model.bin and their sharded forms, and Medusa's medusa_lm_head.
Only one file is open at a time and its pages are mapped, not read, so memory stays at about one
shard (the pre-2019 .bin format cannot be mapped: there a whole shard is read).
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# In the order that they are looked for, as transformers does.
LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "medusa_lm_head.safetensors",  # beside a config.json of their own
    "medusa_lm_head.pt",
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes, the format's own limit
# All that torch.load and zipfile have been seen to raise on a cut or foreign file.
UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, OSError)


class Entry(NamedTuple):
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The tensors of a checkpoint: `entries` from the headers, `read` for the values."""

    def __init__(self, path: Path) -> None:
        """path is a checkpoint folder or one of its weight files."""
        self.path = path
        self.files = weight_files(path)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._opened: tuple[Path, Callable[[str], Tensor]] | None = None
        for file in self.files:
            for name, entry in self._scan(file).items():
                if name in self.entries:
                    first = self.entries[name].file.name
                    raise ValueError(f"{path} holds {name} twice, in {first} and {file.name}")
                self.entries[name] = entry

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; it may share memory with the file, so copy what is kept."""
        file = self.entries[name].file
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # lets go of the last shard before the next is opened
            self._opened = (file, self._reader(file))
        return self._opened[1](name)

    def _scan(self, file: Path) -> dict[str, Entry]:
        if file.suffix == ".safetensors":
            try:
                with open_safetensors(file) as opened:
                    self.metadata |= opened.metadata() or {}
                    parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                    found = {n: (part.get_dtype(), part.get_shape()) for n, part in parts.items()}
            except UnmappableError:  # what its header says is enough to tell that it does not fit
                found = read_header(file)
            return {n: Entry(file, tuple(s), _dtype(file, kind)) for n, (kind, s) in found.items()}
        return {
            name: Entry(file, tuple(tensor.shape), tensor.dtype)
            for name, tensor in load_bin(file).items()
        }

    def _reader(self, file: Path) -> Callable[[str], Tensor]:
        if file.suffix == ".safetensors":
            return open_safetensors(file).get_tensor
        return load_bin(file).__getitem__


def weight_files(path: Path) -> list[Path]:
    """The weight files that a folder, a weight file or an index names; all of them exist."""
    if path.is_dir():
        found = [path / name for name in LAYOUTS if (path / name).is_file()]
        if not found:
            others = [
                f.name for f in sorted(path.iterdir()) if f.suffix in (".safetensors", ".pth")
            ]
            hint = f"; or give one of its files: {', '.join(others)}" if others else ""
            names = ", ".join(LAYOUTS)
            raise FileNotFoundError(f"{path} has no weights; expected one of {names}{hint}")
        path = found[0]
    if path.suffix in (".safetensors", ".bin", ".pth", ".pt"):
        return [path]
    assert path.name.endswith(".index.json"), f"{path} is neither weights nor their index"
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ValueError(f"{path} has no weight_map of tensor to file; download it again")
    files = [path.parent / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {', '.join(missing)}, not found; download again")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")  # noqa: TRY004
    return value


class UnmappableError(ValueError):
    """The system maps no file that is larger than its memory."""


def open_safetensors(file: Path) -> safe_open:
    """Open a safetensors file; a cut or foreign one is a ValueError."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short or not a safetensors file ({error}); download it, "
            "or make it, again"
        ) from error
    except RuntimeError as error:
        raise UnmappableError(
            f"{file} cannot be mapped ({error}); split it into shards, or free memory"
        ) from error


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a whole safetensors file that cannot be mapped."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(size, MAX_HEADER)))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file; download it again") from error
    if file.stat().st_size != 8 + size + end:
        raise ValueError(f"{file} is cut short; download it, or make it, again")
    return found


def load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, mapped where the format allows it; never runs its code."""
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said in one line, below
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
        raise ValueError(
            f"{file} is cut short or not a file of tensors ({reason}); download it again"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
        raise ValueError(f"{file} does not hold a plain dictionary of tensors")
    return {str(name): tensor.detach() for name, tensor in held.items()}


def _dtype(file: Path, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{file} holds tensors of type {name}; known: {', '.join(DTYPES)}")
    return DTYPES[name]
