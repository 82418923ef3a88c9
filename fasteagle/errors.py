"""What does torch's error say, in a line, is it a lack of memory, and what is ours of compiling?"""

from __future__ import annotations

SIGNS = ("out of memory", "outofmemoryerror", "can't allocate memory")  # torch's; no import of it


class CompileError(RuntimeError):
    """A step could not be built: what torch.compile needs is not there, or it failed."""


def first_line(error: BaseException) -> str:
    """The first sentence of an error's first line, or its kind where it has none."""
    error = getattr(error, "inner_exception", error)  # what Dynamo wraps a backend's error in
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ", 1)[0]


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; only torch's message tells on the CPU."""
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in SIGNS)
