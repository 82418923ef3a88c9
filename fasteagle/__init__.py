"""fasteagle: exact, compiled EAGLE decoding of LLaMA-family models at batch 1, in pure PyTorch.

import fasteagle
engine = fasteagle.load("vicuna-7b-v1.3", "EAGLE-Vicuna-7B-v1.3", compiled=True)
for piece in engine.stream("The eagle is"):
    print(piece.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasteagle.assemble import load
    from fasteagle.compat import EagleModel
    from fasteagle.engine import Engine
    from fasteagle.request import Generation, Piece
    from fasteagle.sample import SamplingParams

__version__ = "0.1.0"

__all__ = ["EagleModel", "Engine", "Generation", "Piece", "SamplingParams", "load"]

PLACES = {
    "EagleModel": "compat",
    "Engine": "engine",
    "Generation": "request",
    "Piece": "request",
    "SamplingParams": "sample",
    "load": "assemble",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `--help` needs no torch."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
