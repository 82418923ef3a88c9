"""How much memory may this process still take? And how much is that, for people?"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take on the device; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if MEMINFO.is_file():
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    return min(free, group_room(GROUP))


def group_room(group: Path) -> float:
    """What a container may still take: its limit less its use, cached files not counted."""
    limit, used, stat = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.is_file() or not limit.read_text().strip().isdecimal():
        return math.inf
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(fields["inactive_file"])


def size_text(n_bytes: float) -> str:
    """Bytes for people: 1.5 MB, 12.6 GB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
