"""How fast does the device copy?"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fasteagle.clock import clock

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s of a large copy, bytes read and bytes written both counted: the ceiling used below."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    times = clock(lambda: target.copy_(source), device, repeats=repeats, rounds=4)
    n_bytes = 2 * source.nbytes
    if device.type == "cuda":  # these buffers are no part of the model's memory
        del source, target
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return n_bytes / statistics.median(times) / 1e6
