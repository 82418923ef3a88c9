"""Where are compiled CPU steps between two processes?

Tracing and compiling a step takes a minute; what comes of it is kept in a folder of the user and
loaded by the next process in a second. A file's name is a hash of all that a trace could have
seen: every value and every tensor's shape that the step's function can reach, our own source,
torch, the processor. Tensors are inputs of what is kept, named by their path from the function.

    FASTEAGLE_CACHE=DIR    another folder than ~/.cache/fasteagle
    FASTEAGLE_CACHE=off    nothing is kept
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasteagle.errors import first_line
from fasteagle.processor import processor_name, told
from fasteagle.safewrite import write_json

VARIABLE = "FASTEAGLE_CACHE"
TORCHS = "TORCHINDUCTOR_CACHE_DIR"
UNKNOWN = "\0"  # where code comes from
KNOWN = {"", "torch", __package__}  # packages whose version or hash is in every name
APART = {"commands", "tune", "tuning"}  # of ours, those that count only where a step reaches them
MAX_FILES = 200  # steps that are kept, some 2 MB each; the oldest go
PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.Size, range)
Call = Callable[..., object]


class NotKept(UserWarning):
    """A compiled step could not be written or read; it is compiled anew each time."""


class Reach(NamedTuple):
    """What a function can reach."""

    tensors: dict[str, Tensor]  # by path, each once
    facts: list[str]  # all that a trace may have built on


def cache_folder() -> Path | None:
    """The folder of what is compiled; None where nothing is to be kept."""
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "fasteagle"


def writable_folder() -> Path | None:
    """The same, made if it was not there; None also where nothing can be written to it."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def use_cache_folder() -> None:
    """Have torch's compile caches in our folder too: its own default, which it may have put into
    the environment before, is emptied by a reboot.
    """
    default = str(Path(tempfile.gettempdir()) / "torchinductor_")
    folder, named = writable_folder(), os.environ.get(TORCHS, default)
    if folder is not None and named.startswith(default):
        os.environ[TORCHS] = str(folder / "inductor")


def reach(function: Callable[..., Any]) -> Reach:
    """Tensors and facts within a function's closure, its objects and theirs, to any depth."""
    found = Reach({}, [])
    _visit(function, "", found, {})
    return found


def _visit(value: object, path: str, found: Reach, seen: dict[int, tuple[str, object]]) -> None:
    if isinstance(value, PLAIN):
        found.facts.append(f"{path} = {value!r}")
        return
    if id(value) in seen:
        found.facts.append(f"{path} is {seen[id(value)][0]}")
        return
    seen[id(value)] = path, value  # kept alive: an id is only then one object's
    if isinstance(value, Tensor):
        found.tensors[path] = value
        found.facts.append(f"{path} : {_shape(value)}")
        return
    found.facts.append(f"{path} : {_kind(value)}")
    for name, child in _children(value):
        _visit(child, f"{path}.{name}", found, seen)


def _shape(tensor: Tensor) -> tuple[object, ...]:
    layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    return (*layout, str(tensor.dtype), str(tensor.device), tensor.requires_grad)


def _kind(value: object) -> str:
    """Name and origin of a function, of a class or of an object's class and its bases."""
    named = value if hasattr(value, "__qualname__") else type(value)
    bases = named.__mro__ if isinstance(named, type) else (named,)
    return " < ".join(f"{_origin(base.__module__)}.{base.__qualname__}" for base in bases)


@functools.cache
def _origin(module: str | None) -> str:
    """A module's name; its file's hash too where neither our own nor torch's version covers it."""
    top, _, within = (module or "").partition(".")
    covered = top != __package__ or within.partition(".")[0] not in APART
    if covered and (top in KNOWN or top in sys.stdlib_module_names - {"__main__"}):
        return f"{module}"
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None or not Path(file).is_file():
        return UNKNOWN
    return f"{module}@{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


def _children(value: object) -> Iterable[tuple[object, object]]:
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inner = [(name, cell.cell_contents) for name, cell in cells]
        return [*inner, ("defaults", value.__defaults__), ("keywords", value.__kwdefaults__)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, set | frozenset):
        return enumerate(sorted(value, key=repr))
    if isinstance(value, list | tuple):
        return enumerate(value)
    if isinstance(value, type | types.ModuleType):
        return ()
    return getattr(value, "__dict__", {}).items()


def key_of(name: str, reached: Reach, options: Mapping[str, object]) -> str | None:
    """The file name of a step: equal only where what was compiled is right.

    None if the step runs code that has no file, as typed at a prompt. Code outside this package
    counts by the file of its function or class.
    """
    if any(UNKNOWN in fact for fact in reached.facts):
        return None
    lines = [name, repr(sorted(options.items(), key=str)), *_surroundings(), *reached.facts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _surroundings() -> Iterator[str]:
    yield f"torch {torch.__version__} python {platform.python_version()} {platform.platform()}"
    yield f"threads {torch.get_num_threads()} {torch.get_default_dtype()}"
    # Code for one processor is not code for another: what the C++ compiler sees of it.
    seen = told("model name", "flags", "Features", "CPU part") or [processor_name()]
    yield f"processor {torch.backends.cpu.get_cpu_capability()} {seen}"
    for variable in sorted(os.environ):
        if variable.startswith("TORCHINDUCTOR_") and variable != TORCHS:
            yield f"{variable}={os.environ[variable]}"
    yield _sources()


@functools.cache
def _sources() -> str:
    """A hash of the package's own code, but for what only chooses which steps are run."""
    root = Path(__file__).parent
    tops = {file: file.relative_to(root).parts[0] for file in sorted(root.rglob("*.py"))}
    files = [file for file, top in tops.items() if top.removesuffix(".py") not in APART]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read(
    key: str | None, reached: Reach, options: Mapping[str, Any]
) -> tuple[Call, list[Tensor]] | None:
    """A kept step and the tensors that it is to be called with; None where there is none."""
    paths = _paths(key)
    if paths is None or not paths[1].is_file():
        return None
    program, names = paths
    try:
        inputs = [reached.tensors[path] for path in json.loads(names.read_text())["inputs"]]
        from torch._inductor import config
        from torch._inductor.standalone_compile import CompiledArtifact

        with config.patch(dict(options)):  # they are part of what its C++ is looked up by
            call = CompiledArtifact.load(path=str(program), format="binary")
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a kept file, compile
        _warn("read", program, error)
        return None
    return call, inputs


def write(
    key: str | None,
    reached: Reach,
    artifact: Any,  # torch's CompiledArtifact
    inputs: Iterable[Tensor],
) -> None:
    """Keep a compiled step; a warning where that is not possible."""
    paths = _paths(key)
    if paths is None:
        return
    program, names = paths
    by_place = {_place(tensor): path for path, tensor in reached.tensors.items()}
    try:
        order = [by_place[_place(tensor)] for tensor in inputs]
        program.parent.mkdir(parents=True, exist_ok=True)
        artifact.save(path=str(program), format="binary")  # whole or not at all
        write_json(names, {"inputs": order})
        _forget(program.parent)
    except Exception as error:  # noqa: BLE001 - the step itself is fine
        _warn("written", program, error)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _paths(key: str | None) -> tuple[Path, Path] | None:
    folder = cache_folder()
    if folder is None or key is None:
        return None
    return folder / "steps" / f"{key}.bin", folder / "steps" / f"{key}.json"


def _forget(folder: Path) -> None:
    """Remove the oldest steps beyond MAX_FILES."""
    files = sorted(folder.glob("*.bin"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MAX_FILES:]:
        file.with_suffix(".json").unlink(missing_ok=True)
        file.unlink(missing_ok=True)


def _warn(verb: str, path: Path, error: Exception) -> None:
    text = f"a compiled step could not be {verb} ({path}: {first_line(error)})"
    warnings.warn(f"{text}; {VARIABLE} names another folder", NotKept, stacklevel=3)
