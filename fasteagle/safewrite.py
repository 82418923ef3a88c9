"""How are files written so that none is ever half-written, however large?

Everything goes to a temporary name in the same folder first and is renamed when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Slot(NamedTuple):
    """A tensor that a file will hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextmanager
def safetensors_file(
    path: Path, slots: Sequence[Slot], *, metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a safetensors file by calling what this yields with the tensors, in any order.

    safetensors.torch.save_file wants every tensor in memory at once; this holds one. Wider dtypes
    lie first in the file: readers map it and want aligned tensors.
    """
    ordered = sorted(slots, key=lambda slot: -slot.dtype.itemsize)
    with replacing(path) as file:
        file.write(_header(ordered, metadata))
        places, end = {}, file.tell()
        for slot in ordered:
            places[slot.name] = (slot, end)
            end += slot.n_bytes

        def put(name: str, tensor: Tensor) -> None:
            slot, begin = places.pop(name)
            given = (tuple(tensor.shape), tensor.dtype)
            assert given == (slot.shape, slot.dtype), f"{slot.name}: {given} for {slot}"
            file.seek(begin)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

        yield put
        assert not places, f"never given: {', '.join(places)}"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, or is gone if anything fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk may only show here
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def staged_folder(out: Path, *, last: str, owned: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to fill whose files move into `out` at the end, the one called `last` last.

    Files of `out` that match a pattern in `owned` and were not made again are an earlier call's and
    are removed. On a failure `out` is as it was before, and gone if it was not there.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    stage = out / f".{os.getpid()}.part"
    try:
        stage.mkdir(parents=True)
        yield stage
        made = [file.relative_to(stage) for file in stage.rglob("*") if file.is_file()]
        for old in [file for pattern in owned for file in out.glob(pattern)]:
            if old.relative_to(out) not in made:
                old.unlink()
        for name in sorted(made, key=lambda name: (name == Path(last), name)):
            (out / name).parent.mkdir(exist_ok=True)
            (stage / name).replace(out / name)
    except OSError as error:
        reason = f"cannot write {out}: {error.strerror or error}; nothing was changed there"
        raise OSError(error.errno or errno.EIO, reason) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """Length in 8 bytes, then JSON, padded so that the data begins at a multiple of 8."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for slot in slots:
        start, end = end, end + slot.n_bytes
        fields[slot.name] = {
            "dtype": DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
