"""In which precision are a checkpoint's numbers kept?"""

from __future__ import annotations

import torch

from fasteagle.config import AnyConfig
from fasteagle.families import Weight
from fasteagle.hf_config import DTYPES


def stored_dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """What a parameter of a model in `dtype` is kept in."""
    return torch.int64 if weight.whole else dtype


def pick_dtype(config: AnyConfig, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, or the config's; one of float16, bfloat16 and float32."""
    name = config.dtype if dtype is None else dtype_text(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype {name} is not supported; expected {', '.join(DTYPES)}")
    picked: torch.dtype = getattr(torch, name)
    return picked


def dtype_text(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")
