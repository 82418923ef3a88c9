"""What does a field of a Hugging Face config.json say, whichever transformers version wrote it?

Every function takes the parsed file as `hf`. A field that is needed and absent, or of a wrong kind,
is a ValueError that names it; `null` counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fasteagle.config import RopeScaling

WindowKind = Literal["none", "all layers", "all layers if stated", "by layer"]
DTYPES = ("float16", "bfloat16", "float32")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
# Of transformers' spelling; "finetuned" is a note that some YaRN checkpoints carry.
ROPE_FIELDS = {
    *("rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
    *("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "finetuned"),
}


def optional_count(hf: Mapping[str, Any], *names: str) -> int | None:
    """A positive whole number under the first of `names` that is there."""
    for name in names:
        value = hf.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"field {name} is {value!r}; expected a positive whole number")
        return value
    return None


def count(hf: Mapping[str, Any], *names: str) -> int:
    """Like `optional_count`, but one of `names` must be there."""
    value = optional_count(hf, *names)
    if value is None:
        raise ValueError(f"field {' or '.join(names)} is missing")
    return value


def experts(hf: Mapping[str, Any], *, absent: tuple[int, int]) -> tuple[int, int]:
    """How many experts there are and how many a token takes; (0, 0) is a dense model.

    absent is what fields that are left out stand for.
    """
    stated = hf.get("num_local_experts")
    if stated == 0 or (stated is None and absent[0] == 0):
        return 0, 0
    n_experts = optional_count(hf, "num_local_experts") or absent[0]
    name = "num_experts_per_tok"
    taken = optional_count(hf, name) or absent[1] or count(hf, name)
    if taken > n_experts:
        raise ValueError(f"{name} is {taken}, more than num_local_experts {n_experts}")
    return n_experts, taken


def number(hf: Mapping[str, Any], name: str, *, default: float | None = None) -> float:
    """A positive number; without a default it must be there."""
    value = hf.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"field {name} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"field {name} is {value!r}; expected a positive number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"field {name} is too large for a number") from error


def flag(hf: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """true or false."""
    value = hf.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"field {name} is {value!r}; expected true or false")
    return default if value is None else value


def token_ids(hf: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Token ids: none, one or a list, in the file's order, each once."""
    value = hf.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"field {name} is {value!r}; expected a token id or a list of them")
    return tuple(dict.fromkeys(i for i in ids if i >= 0))  # some files say -1 for "none"


def layer_ids(hf: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Numbers of layers, from 0, in the file's order; none if the field is absent."""
    value = hf.get(name) or []
    if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
        raise ValueError(f"field {name} is {value!r}; expected a list of layer numbers")
    return tuple(value)


def dtype_name(hf: Mapping[str, Any]) -> str | None:
    """ "float16", "bfloat16" or "float32", or None if the config does not say."""
    value = hf.get("dtype") or hf.get("torch_dtype")
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"field dtype or torch_dtype is {value!r}; expected {', '.join(DTYPES)}")
    return name


def rope(
    hf: Mapping[str, Any], max_positions: int, *, absent: float = 10000.0
) -> tuple[float, RopeScaling | None]:
    """theta and scaling: rope_theta and rope_scaling (transformers 4) or rope_parameters (5).

    absent is the theta of a config that does not state it.
    """
    stated: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = hf.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"field {name} is {value!r}; expected an object or null")  # noqa: TRY004
        stated |= value
    unknown = sorted(set(stated) - ROPE_FIELDS)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"RoPE kind {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    if unknown:
        raise ValueError(f"RoPE scaling has the unknown field {', '.join(unknown)}")
    for source in (stated, hf):
        if number(source, "partial_rotary_factor", default=1.0) != 1.0:
            raise ValueError("partial_rotary_factor is not 1: partial rotation is not supported")
    theta = number(stated, "rope_theta", default=number(hf, "rope_theta", default=absent))
    if theta <= 1:
        raise ValueError(f"field rope_theta is {theta:g}; expected a number above 1")
    return theta, _scaling(hf, stated, kind, max_positions)


def _scaling(
    hf: Mapping[str, Any], stated: Mapping[str, Any], kind: str, max_positions: int
) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, number(stated, "factor"))
    name = "original_max_position_embeddings"
    original = optional_count(hf, name) or optional_count(stated, name) or max_positions
    if kind == "llama3":
        return RopeScaling(
            kind,
            number(stated, "factor"),
            original_max_positions=original,
            low_freq_factor=number(stated, "low_freq_factor"),
            high_freq_factor=number(stated, "high_freq_factor"),
        )
    return RopeScaling(
        kind,
        number(stated, "factor", default=max_positions / original),
        original_max_positions=original,
        beta_fast=number(stated, "beta_fast", default=32.0),
        beta_slow=number(stated, "beta_slow", default=1.0),
        attention_factor=_optional_number(stated, "attention_factor"),
        mscale=_optional_number(stated, "mscale"),
        mscale_all_dim=_optional_number(stated, "mscale_all_dim"),
        truncate=flag(stated, "truncate", default=True),
    )


def _optional_number(hf: Mapping[str, Any], name: str) -> float | None:
    return number(hf, name) if hf.get(name) else None


def window(
    hf: Mapping[str, Any], kind: WindowKind, *, n_layers: int, max_positions: int
) -> int | None:
    """The sliding window of the model or, where only some layers slide, of those; or None."""
    # Left out, the field is 4096 in transformers, but none in Mixtral's; null is no window.
    size = optional_count(hf, "sliding_window")
    if "sliding_window" not in hf and kind != "all layers if stated":
        size = 4096
    if kind == "none" or size is None:
        return None
    if kind.startswith("all layers"):
        return size
    if not flag(hf, "use_sliding_window", default=bool(hf.get("layer_types"))):
        return None
    first = hf.get("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"field max_window_layers is {first!r}; expected a whole number")
    kinds = hf.get("layer_types") or [
        "sliding_attention" if index >= first else "full_attention" for index in range(n_layers)
    ]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types has {', '.join(sorted(map(str, unknown)))}, not supported")
    slides = "sliding_attention" in kinds and size < max_positions
    return size if slides else None
