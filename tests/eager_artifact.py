"""What a traced step takes for compiled code, run eagerly: tests of keeping need no compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor


class EagerArtifact:
    """Stands in for torch's CompiledArtifact; what it saves cannot be read."""

    def __init__(self, graph: Callable[..., object], _: object) -> None:
        self.graph = graph

    def __call__(self, *inputs: Tensor) -> object:
        return self.graph(*inputs)

    def save(self, *, path: str, format: str) -> None:  # noqa: A002 - torch's name
        assert format == "binary"
        Path(path).write_bytes(b"no program")
