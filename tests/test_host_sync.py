"""Does any step make the host wait for the device?

A spy watches what a step calls, and every way to wait that is put into a step must be caught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DRAFTS, SAMPLED, prompt, short_engine
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fasteagle import rounds
from fasteagle.engine import Engine
from fasteagle.sample import SamplingParams

SYNCING_OPS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "multinomial",
    "unique_dim", "_unique2", "bincount",
}  # fmt: skip
SYNCING_CALLS = {
    "item", "tolist", "cpu", "numpy", "cuda", "__bool__", "__int__", "__float__", "__index__",
    "tensor", "as_tensor", "nonzero", "__array__",
}  # fmt: skip


class OpSpy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.n_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.n_ops += 1
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [])
        )
        moves = name == "_to_copy" and kwargs.get("device") is not None
        ragged = name == "repeat_interleave" and "Tensor" in func._overloadname
        if name in SYNCING_OPS or by_mask or moves or ragged:
            self.syncs.append(name)
        return func(*args, **kwargs)


class CallSpy(TorchFunctionMode):
    """On the CPU a copy to the host is no operator, so the calls are watched as well."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        to_device = name == "to" and any(isinstance(a, str | torch.device) for a in args)
        if name in SYNCING_CALLS or to_device:
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))


def syncs_of(engine: Engine, key: tuple[str, int, bool]) -> list[str]:
    """What one built step would make the host wait for."""
    with torch.inference_mode(), OpSpy() as ops, CallSpy() as calls:
        engine.steps[key]()
    assert ops.n_ops > 20
    return [*ops.syncs, *calls.syncs]


def served(kind: str, sampled: bool) -> Engine:
    """An eager engine in the middle of a text, all of its steps built."""
    engine = short_engine(kind, compiled=False, batch=2)
    sampling = SAMPLED if sampled else SamplingParams()
    requests = [engine.request(prompt(n), sampling=sampling, stop_ids=[]) for n in (20, 9)]
    decoding = engine.decode(engine.rows(requests))
    for _ in range(3):
        next(decoding)
    return engine


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", DRAFTS)
def test_no_step_waits_for_the_device(kind: str, sampled: bool) -> None:
    engine = served(kind, sampled)
    assert {name for name, _, _ in engine.steps} == {"extend", "prefill", "round"}
    for key in engine.steps:
        assert syncs_of(engine, key) == []


INJECTED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "multinomial": lambda x: torch.multinomial(torch.ones(4), 1),
    "tensor": lambda x: torch.tensor([1, 2]),
    "slice": lambda x: x[:, : x[0, 0]],
}


@pytest.mark.parametrize("injected", INJECTED)
def test_the_spy_catches_a_wait(injected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, accept = served("eagle", False), rounds.accept

    def waiting(tree: Any, above: Any, chosen: torch.Tensor, *, n_path: int) -> Any:
        INJECTED[injected](chosen)
        return accept(tree, above, chosen, n_path=n_path)

    monkeypatch.setattr(rounds, "accept", waiting)
    key = next(key for key in engine.steps if key[0] == "round")
    assert syncs_of(engine, key) != []
