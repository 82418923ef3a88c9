"""Which tokens may a draft guess? A pruned draft vocabulary (FR-Spec, arXiv 2502.14856).

    V vocabulary  K kept ids  C model dim

A draft step multiplies by every row of the lm_head, although nearly all text is made of few tokens.
Guessing only among the K most frequent ones reads K rows; the target still verifies over all V, so
the output is the same: a token outside K is never guessed, that is all.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasteagle import panel
from fasteagle.model import Linear, Transformer
from fasteagle.quant.linear import QuantLinear
from fasteagle.weights import read_json

FILE = "draft_vocab.json"  # its name beside a head
FORMAT = "fasteagle draft vocabulary"


def head_rows(target: Transformer, ids: Tensor) -> Linear | QuantLinear:
    """The rows of the target's lm_head at ids `[K]`, copied: a layer `[..., C]` -> `[..., K]`.

    In the precision of the lm_head; with tied embeddings they are rows of the embedding. The one
    place that looks inside the target's lm_head for a drafter.
    """
    lm_head = target.lm_head
    if isinstance(lm_head, QuantLinear):
        return lm_head.rows(ids)
    if lm_head is None:
        rows = target.embed_tokens(ids)
    else:
        assert isinstance(lm_head, Linear), f"an lm_head is a {type(lm_head).__name__}"
        weight = lm_head.weight
        packed = weight.dim() == 3
        rows = panel.lookup(weight, ids, target.dtype) if packed else weight[ids]
    with torch.device("meta"):
        layer = Linear(rows.shape[1], rows.shape[0], bias=False)
    layer.weight = nn.Parameter(rows.detach(), requires_grad=False)
    return layer


def check_ids(ids: list[int], vocab_size: int, name: str) -> Tensor:
    """Kept ids as a tensor `[K]`; ValueError unless they rise and lie within the vocabulary."""
    if not ids or not all(type(token) is int for token in ids):
        raise ValueError(f"{name} must list token ids; make it with `fasteagle draft-vocab`")
    for token, following in itertools.pairwise(ids):
        if token >= following:
            raise ValueError(f"{name} lists {token} before {following}; ids must rise, each once")
    if ids[0] < 0 or ids[-1] >= vocab_size:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise ValueError(f"{name} lists id {wrong}; the vocabulary is 0 to {vocab_size - 1}")
    return torch.tensor(ids)


def read_vocabulary(path: str | Path, vocab_size: int | None = None) -> Tensor:
    """The kept ids `[K]` of a draft_vocab.json, for a model of `vocab_size` if that is given.

    FileNotFoundError or ValueError for a file that is absent, is something else, or was counted
    for another vocabulary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"draft vocabulary {path} does not exist; make it with `fasteagle draft-vocab`"
        )
    held = read_json(Path(path))
    ids, size = held.get("ids"), held.get("vocab_size")
    if held.get("format") != FORMAT or type(size) is not int or not isinstance(ids, list):
        raise ValueError(f"{path} is no draft vocabulary; make one with `fasteagle draft-vocab`")
    if vocab_size not in (None, size):
        raise ValueError(
            f"{path} was counted for a vocabulary of {size}, but the target has {vocab_size}; "
            "count again with `fasteagle draft-vocab`"
        )
    return check_ids(ids, size, str(path))


def most_frequent(counts: Tensor, size: int, always: Collection[int] = ()) -> Tensor:
    """The `size` most counted ids of counts `[V]`, ascending `[K]`; `always` are among them.

    Ties go to the lower id, so ids that were never seen fill up from the lowest.
    """
    assert len(set(always)) <= size <= len(counts), f"{size} of {len(counts)}, {always} always"
    order = counts.argsort(descending=True, stable=True)
    asked = torch.tensor(sorted(set(always)), dtype=torch.int64)
    others = order[~torch.isin(order, asked)]
    return torch.cat((asked, others[: size - len(asked)])).sort().values


def coverage(counts: Tensor, ids: Tensor) -> float:
    """The share of what was counted, counts `[V]`, that ids `[K]` hold."""
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else 0.0


def vocabulary_file(ids: Tensor, counts: Tensor, **facts: Any) -> dict[str, Any]:
    """What a draft_vocab.json holds: ids `[K]` and what counting them, counts `[V]`, found."""
    return {
        "format": FORMAT,
        "vocab_size": len(counts),
        "size": len(ids),
        "counted": int(counts.sum()),
        "distinct": int((counts > 0).sum()),
        "coverage": round(coverage(counts, ids), 6),
        **facts,
        "ids": ids.tolist(),
    }
