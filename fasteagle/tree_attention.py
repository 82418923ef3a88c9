"""Which attention do a few rows over a cache take on a GPU, and how is ours called?

    B batch  G kv heads  R rows of all query heads of a kv head  S new tokens  T cache slots
    D head dim

    torch.ops.fasteagle.tree_attention(q, k, v, bias, newest) -> [B, G, R, D]

is scaled dot product attention under an additive bias that reads no slot past `newest [B]`. Slots
are cut into ranges that run side by side (triton_attention.py), because the rows of a tree fill a
tenth of a GPU. torch.compile sees one opaque call and a CUDA graph can capture it.

It runs where it was measured to be the faster: while a step is rehearsed (rounds.py) each new
shape is timed against torch's attention, and a step that is compiled afterwards looks the winner
up. FASTEAGLE_ATTENTION=sdpa or triton forces one of them; what our kernel cannot compute (more
than 64 tokens, float32, an older GPU) stays torch's.
"""

from __future__ import annotations

import math
import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasteagle.attention_trial import Shape, agrees, faster
from fasteagle.errors import first_line

VARIABLE = "FASTEAGLE_ATTENTION"
CHOICES = ("sdpa", "triton")
DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
MAX_TOKENS = 64  # above, as in prefill, torch's kernels have rows enough
MAX_DIM = 256
OLDEST = (8, 0)  # compute capability: tensor cores for both types
WANTED_PROGRAMS = 264  # two for each of an H100's or H200's 132 multiprocessors
MAX_SPLITS = 32  # ranges: what adds them up is unrolled
ADDED_AT_ONCE = 4  # rows that one program of add_ranges makes
LOG2_E = 1 / math.log(2)


class SlowAttention(UserWarning):
    """Our kernel does not run here."""


class Tiles(NamedTuple):
    """How attention is cut into programs, and what each is given."""

    rows: int
    block: int  # slots of a step
    splits: int  # ranges of slots
    warps: int = 4
    stages: int = 2  # steps whose loads are under way at once


measured: ContextVar[bool] = ContextVar("measured", default=False)
winners: dict[tuple[str | None, Shape], bool] = {}  # whether it is ours, by force and shape


def forced() -> str | None:
    """What FASTEAGLE_ATTENTION forces, None if nothing; ValueError for an unknown word."""
    word = os.environ.get(VARIABLE) or None
    if word not in (None, *CHOICES):
        raise ValueError(
            f"{VARIABLE} is {word!r}, not {' or '.join(CHOICES)}; unset it to take the faster one"
        )
    return word


def is_open(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ours may win anything for a model of a dtype on a device."""
    return device.type in DEVICES and dtype in DTYPES and forced() != "sdpa"


@contextmanager
def measuring() -> Iterator[None]:
    """Within this, attention outside of compiled code times the shapes that it meets."""
    token = measured.set(True)
    try:
        yield
    finally:
        measured.reset(token)


def is_ours(q: Tensor, k: Tensor, n_tokens: int) -> bool:
    """Whether q `[B, G, R, D]`, rows of n_tokens tokens, takes our kernel over k `[B, G, T, D]`.

    Without a compiler it does only if forced to: eager code is the reference.
    """
    if q.device.type not in DEVICES or q.dtype not in DTYPES:
        return False
    if n_tokens > MAX_TOKENS or q.shape[3] > MAX_DIM:
        return False
    shape = (*q.shape, k.shape[2], q.dtype, q.device)
    if torch.compiler.is_compiling():
        return won(*shape)
    if forced() != "triton" and not measured.get():
        return False
    return prepare(Shape(*shape))


def won(*shape: int | torch.dtype | torch.device) -> bool:
    """Whether ours is known to be wanted for a shape; a constant in what is compiled."""
    return winners.get((forced(), Shape(*shape)), False)  # type: ignore[arg-type]


# What torch.compiler.assume_constant_result does; that would load the compiler, which takes three
# seconds that eager code saves.
vars(won)["_dynamo_marked_constant"] = True


def prepare(shape: Shape) -> bool:
    """Whether a shape is to take our kernel: tried and timed at its first call, then known.

    A kernel that does not compile, or computes something else than torch, is never taken, and a
    warning says so. While a CUDA graph is captured, what is not known yet is torch's.
    """
    force = forced()
    if (force, shape) not in winners:
        if shape.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        winners[force, shape] = force != "sdpa" and _try(shape, force)
    return winners[force, shape]


def _try(shape: Shape, force: str | None) -> bool:
    if torch.cuda.get_device_capability(shape.device) < OLDEST:
        return False
    try:
        wrong = not agrees(tree_attention, reference, shape)
        ours = not wrong and (force == "triton" or faster(tree_attention, reference, shape))
    except failures() as error:
        words = f"attention stays torch's: the Triton kernel fails here ({first_line(error)})"
        warnings.warn(words, SlowAttention, stacklevel=2)
        return False
    if wrong:
        warnings.warn(
            "attention stays torch's: the Triton kernel computes something else here; report it "
            f"with your GPU and versions of torch and triton ({shape})",
            SlowAttention,
            stacklevel=2,
        )
    return ours


def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not compile: no compiler on the machine, or for this GPU."""
    known: tuple[type[Exception], ...] = (
        *(RuntimeError, ImportError, OSError, subprocess.SubprocessError),
        *(ValueError, TypeError, AttributeError, AssertionError),
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, newest: Tensor) -> Tensor:  # noqa: ARG001
    """What ours must equal, by torch; it reads all slots and takes newest for the same call."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def choose_tiles(pairs: int, n_rows: int, dim: int, n_slots: int) -> Tiles:
    """The tiles for `pairs` = B * G times `n_rows` rows: a rule, so that every run is the same."""
    rows = 16 if n_rows <= 16 else 32 if n_rows <= 32 else 64
    programs = pairs * -(-n_rows // rows)
    block = 64 if dim <= 128 else 32
    if programs * -(-n_slots // block) < WANTED_PROGRAMS:
        block = 32
    splits = max(1, min(-(-n_slots // block), WANTED_PROGRAMS // programs, MAX_SPLITS))
    return Tiles(rows, block, splits, warps=8 if rows * dim > 64 * 128 else 4)


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    newest: Tensor,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """The operator, for tensors as `fasteagle.model.attend` has them; newest `[B]` int64.

    A row that the bias lets see nothing is 0. `tiles` overrides the rule, for benchmarks.
    """
    from fasteagle.triton_attention import add_ranges, attend_range

    check(q, k, v, bias, newest)
    batch, heads, n_rows, dim = q.shape
    n_slots = k.shape[2]
    tiles = tiles or choose_tiles(batch * heads, n_rows, dim, n_slots)
    out = like_output(q)
    parts = tiles.splits if tiles.splits > 1 else 0
    sums = q.new_empty(batch * heads, parts, n_rows, dim, dtype=torch.float32)
    scales = q.new_empty(batch * heads, parts, 2, n_rows, dtype=torch.float32)
    cut = {"DIM": dim, "WIDTH": max(16, 1 << (dim - 1).bit_length())}  # tensor cores take 16
    cut |= {"BLOCK": tiles.block, "SPLITS": tiles.splits}
    attend_range[batch * heads, -(-n_rows // tiles.rows), tiles.splits](
        *(q, k, v, bias, newest, out, sums, scales, heads, n_rows, n_slots),
        *(*q.stride()[:3], *k.stride()[:3], newest.stride(0)),
        LOG2_E / math.sqrt(dim),
        **cut,
        ROWS=tiles.rows,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if parts:
        add_ranges[batch * heads, -(-n_rows // ADDED_AT_ONCE)](
            *(sums, scales, newest, out, heads, n_rows, n_slots, newest.stride(0)),
            **cut,
            ROWS=ADDED_AT_ONCE,
        )
    return out


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, newest: Tensor) -> None:
    """The kernels index memory by these facts."""
    batch, heads, n_rows, dim = q.shape
    n_slots = k.shape[2]
    assert dim <= MAX_DIM, f"a head dim of {dim}, not up to {MAX_DIM}"
    assert k.shape == v.shape == (batch, heads, n_slots, dim), f"k {k.shape}, v {v.shape}"
    assert bias.shape == (batch, 1, n_rows, n_slots), f"a bias of {list(bias.shape)}"
    assert k.stride() == v.stride(), "k and v lie differently"
    assert {t.stride(-1) for t in (q, k, v)} == {1}, "a last dim is not contiguous"
    assert bias.is_contiguous(), "the bias is not contiguous"
    assert newest.shape == (batch,), f"{list(newest.shape)} newest slots of {batch} rows"
    dtypes = {t.dtype for t in (q, k, v, bias)}
    assert dtypes in ({DTYPES[0]}, {DTYPES[1]}), f"{dtypes}, not one of {DTYPES}"


def like_output(q: Tensor, *_: Tensor) -> Tensor:
    """Room for the output, which lies as `[B, R, G, D]`: with one query head a kv head, the output
    projection then takes it as it is.
    """
    batch, heads, n_rows, dim = q.shape
    return q.new_empty(batch, n_rows, heads, dim).transpose(1, 2)


@torch.library.custom_op("fasteagle::tree_attention", mutates_args=())
def tree_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, newest: Tensor) -> Tensor:
    with torch.cuda.device_of(q):  # Triton launches on the current device; no effect on the CPU
        return attend_tree(q, k, v, bias, newest)


tree_attention.register_fake(like_output)
