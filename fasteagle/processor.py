"""Which processor is this? What the system tells of it."""

from __future__ import annotations

import platform
from pathlib import Path

INFO = Path("/proc/cpuinfo")


def told(*fields: str) -> list[str]:
    """The lines of /proc/cpuinfo that begin with a field, each once, in order; none elsewhere."""
    lines = INFO.read_text(encoding="utf-8").splitlines() if INFO.is_file() else []
    return list(dict.fromkeys(line for line in lines if line.startswith(fields)))


def processor_name() -> str:
    """Its model, or at least its architecture."""
    names = [line.split(":", 1)[1].strip() for line in told("model name")]
    return names[0] if names else platform.processor() or platform.machine()
