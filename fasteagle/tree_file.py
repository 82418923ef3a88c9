"""What does a tree.json say beside a head, and does it hold here?

Either a tree alone, as --tree takes it, or what `fasteagle tune` writes: an object whose "tree" is
one, "plain_is_faster", and "measured_on" and "compiled", the device, precision and kind of steps
that this is true of.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasteagle.model import Transformer
from fasteagle.processor import processor_name
from fasteagle.quant.experts import QuantExperts
from fasteagle.quant.linear import QuantLinear
from fasteagle.tree import Tree, parse_tree

FILE = "tree.json"


class TreeWarning(UserWarning):
    """What a tree file says may not be what a user expects."""


class Tuned(NamedTuple):
    """A tree file beside a head."""

    file: Path
    tree: Tree
    plain_is_faster: bool = False
    plain: float | None = None  # tokens/s
    eagle: float | None = None  # tokens/s of the tree
    measured_on: dict[str, Any] | None = None  # None: it does not say
    compiled: bool | None = None


def read_tuned(file: Path) -> Tuned | None:
    """The tree file of this name, if there is one; ValueError if it holds no tree, or figures of
    another kind than `fasteagle tune` writes.
    """
    if not file.is_file():
        return None
    tree = parse_tree(str(file))
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or "tree" not in value:
        return Tuned(file, tree)
    place, plain = value.get("measured_on"), value.get("plain_is_faster", False)
    compiled = value.get("compiled")
    slow, fast = (value.get(name) for name in ("plain_tokens_per_s", "measured_tokens_per_s"))
    numbers = all(speed is None or type(speed) in (int, float) for speed in (slow, fast))
    answers = type(plain) is bool and isinstance(compiled, bool | None)
    if not answers or not isinstance(place, dict | None) or not numbers:
        raise ValueError(
            f"{file}: expected plain_is_faster and compiled true or false, measured_on an object "
            "and numbers of tokens/s; write it anew with `fasteagle tune`"
        )
    return Tuned(file, tree, plain, slow, fast, place, compiled)


def precision(target: Transformer) -> str:
    """How weights are stored and computed with: `float32`, `int4 and bfloat16`."""
    kinds = QuantLinear | QuantExperts
    bits = {part.bits for part in target.modules() if isinstance(part, kinds)}
    stored = "".join(f"int{number} and " for number in sorted(bits))
    return stored + str(target.dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The model of a GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def conditions(target: Transformer) -> dict[str, Any]:
    """What speeds depend on, for the file."""
    device = target.device
    return {
        "device": device.type,
        "name": device_name(device),
        "precision": precision(target),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
    }


def differences(found: Tuned | None, target: Transformer, *, compiled: bool | None) -> list[str]:
    """In which of device, precision, threads and kind of steps a file was measured elsewhere, in
    words. compiled: whether steps are here, None if that is not known.
    """
    if found is None or found.measured_on is None:
        return []
    here, there = conditions(target), found.measured_on
    names = ("device", "name", "precision")
    words = [
        f"{there.get(name)} (here {here[name]})" for name in names if there.get(name) != here[name]
    ]
    threads = there.get("threads"), here["threads"]
    if None not in threads and threads[0] != threads[1]:
        words.append(f"{threads[0]} threads (here {threads[1]})")
    if None not in (found.compiled, compiled) and found.compiled != compiled:
        words.append("compiled steps (here not)" if found.compiled else "eager steps (here not)")
    return words


def tell_elsewhere(found: Tuned | None, target: Transformer, *, compiled: bool | None) -> None:
    """Warn, in one line, of a tree that was tuned under other conditions (`differences`)."""
    elsewhere = differences(found, target, compiled=compiled)
    if found and elsewhere:
        warnings.warn(
            f"{found.file}: this tree was tuned for {', '.join(elsewhere)}; it works here, but run "
            "`fasteagle tune` to find the fastest",
            TreeWarning,
            stacklevel=2,
        )


def prefers_plain(found: Tuned | None, target: Transformer, *, compiled: bool) -> bool:
    """Whether a file says that plain decoding is faster here; warns, in one line, if so."""
    if found is None or not found.plain_is_faster or differences(found, target, compiled=compiled):
        return False
    speeds = f"{found.plain:.4g} tokens/s against {found.eagle:.4g}" if found.eagle else "measured"
    warnings.warn(
        f"plain decoding is faster here: {speeds} with the best tree, says {found.file}; so this "
        "decodes plainly, unless a --tree is given",
        TreeWarning,
        stacklevel=2,
    )
    return True
