"""Which tokens does a round verify, and what may each of them see?

    B batch  N tree nodes, root included  P longest path, root included  S rows  T cache slots

A draft tree is tokens and parents, nothing else. Node 0 is the root, its own parent; parents come
before children. Siblings of one token are never wrong, but all except one are wasted.

    parents [0, 0, 0, 1, 1]      0 +- 1 +- 3      depth [0, 1, 1, 2, 2]
                                   +- 2  `- 4
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_NODES = 256
MAX_EXPANDED = 1024  # nodes of a dynamic tree that the draft runs on


class DraftTree(NamedTuple):
    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64


def ancestors(parents: Tensor, n_path: int) -> Tensor:
    """Who is above whom: `[B, N, N]` bool, row n marks n and its ancestors (pointer doubling)."""
    n_nodes = parents.shape[1]
    eye = torch.eye(n_nodes, dtype=torch.bool, device=parents.device)
    seen, pointer, span = eye.expand(parents.shape[0], -1, -1), parents, 1
    while span < n_path:
        seen = seen | seen.gather(1, pointer[:, :, None].expand(-1, -1, n_nodes))
        pointer, span = pointer.gather(1, pointer), span * 2
    return seen


def tree_mask(length: Tensor, above: Tensor, n_slots: int) -> Tensor:
    """What tree rows see: all committed slots and their own ancestors.

    length `[B]` committed slots; above `[B, S, W]` or `[S, W]` bool, ancestors among the W tree
    slots that follow them. Returns `[B, S, T]` bool with T = n_slots.
    """
    above = above if above.dim() == 3 else above.expand(length.shape[0], -1, -1)
    batch, rows, width = above.shape
    slots = torch.arange(n_slots, device=length.device)
    offset = slots[None] - length[:, None]  # [B, T]
    inside = (offset >= 0) & (offset < width)
    index = offset.clamp(0, width - 1)[:, None, :].expand(batch, rows, n_slots)
    return (offset < 0)[:, None, :] | (inside[:, None, :] & above.gather(2, index))


def causal_mask(positions: Tensor, n_slots: int) -> Tensor:
    """What sequential rows see, slots up to their own: positions `[B, S]` -> `[B, S, T]`."""
    return torch.arange(n_slots, device=positions.device) <= positions[:, :, None]


@dataclass(frozen=True)
class StaticTree:
    """A tree whose shape is known before drafting: node n is the `rank[n]`-th guess at its parent.

    Nodes are in breadth-first order, paths of one length in lexicographic order (spec of EAGLE-1,
    arXiv 2401.15077, section 4.1): root, then the choices sorted by (length, path).
    """

    parents: tuple[int, ...]
    depth: tuple[int, ...]
    rank: tuple[int, ...]

    @property
    def n_nodes(self) -> int:
        return len(self.parents)

    @property
    def n_path(self) -> int:
        return max(self.depth) + 1

    @property
    def is_chain(self) -> bool:
        return self.n_nodes == self.n_path

    @property
    def n_inner(self) -> int:
        """How many nodes after the root have children."""
        return len(set(self.parents[1:]) - {0})

    @property
    def width(self) -> int:
        """How many guesses at one node it can need."""
        return max(self.rank) + 1

    @property
    def name(self) -> str:
        """What --tree calls it; its number of nodes where it has no name."""
        if self == static_tree(MC_SIM_7B_63):
            return "mc_sim_7b_63"
        if self == chain(self.n_nodes - 1):
            return f"chain-{self.n_nodes - 1}"
        return f"of {self.n_nodes} nodes"

    def internal(self, depth: int) -> list[int]:
        """The nodes at `depth` that have children: the ones a head must run on to go deeper."""
        inner = set(self.parents[1:])
        return [n for n in range(self.n_nodes) if self.depth[n] == depth and n in inner]


@dataclass(frozen=True)
class DynamicTree:
    """A tree whose shape follows the draft's confidence (EAGLE-2, arXiv 2406.16858, section 4).

    The `top_k` likeliest nodes of a level get `top_k` children each, `depth` levels below the
    first; the `total_tokens` - 1 likeliest of all, and the root, are verified.
    """

    total_tokens: int = 60  # as EAGLE's evaluation scripts have it
    depth: int = 5
    top_k: int = 10

    def __post_init__(self) -> None:
        n_nodes, depth, k = self.total_tokens, self.depth, self.top_k
        if min(n_nodes - 1, depth + 1, k) < 1:
            raise ValueError(
                f"a dynamic tree of total_tokens {n_nodes}, depth {depth} and top_k {k}; give at "
                "least 2, 0 and 1"
            )
        if max(depth, k) > MAX_NODES or depth * k > MAX_EXPANDED:
            raise ValueError(
                f"a dynamic tree of depth {depth} and top_k {k} runs the draft on their product of "
                f"nodes; at most {MAX_EXPANDED}, and {MAX_NODES} for each, are supported"
            )
        most = k + depth * k * k
        if n_nodes > min(MAX_NODES, most + 1):
            raise ValueError(
                f"total_tokens is {n_nodes}; depth {depth} and top_k {k} give {most} guesses and "
                f"the root, and at most {MAX_NODES} nodes are supported: ask for at most "
                f"{min(MAX_NODES, most + 1)}"
            )

    @property
    def n_nodes(self) -> int:
        return self.total_tokens

    @property
    def n_path(self) -> int:
        return min(self.depth + 2, self.total_tokens)

    @property
    def is_chain(self) -> bool:
        return self.top_k == 1

    @property
    def n_inner(self) -> int:
        """How many nodes after the root get children."""
        return self.depth * self.top_k

    @property
    def width(self) -> int:
        """How many guesses at one node it needs."""
        return self.top_k

    @property
    def name(self) -> str:
        """What --tree calls it."""
        return f"dynamic-{self.total_tokens}-{self.depth}-{self.top_k}"


Tree = StaticTree | DynamicTree


def static_tree(choices: list[list[int]], *, name: str = "tree") -> StaticTree:
    """Build a tree from its paths of ranks, e.g. `[[0], [1], [0, 0]]`.

    ValueError if a path is no list of whole numbers from 0, appears twice or lacks its prefix.
    """
    _check_paths(choices, name)
    paths = [(), *sorted({tuple(c) for c in choices}, key=lambda path: (len(path), path))]
    if len(paths) > MAX_NODES:
        raise ValueError(
            f"{name} has {len(paths)} nodes with the root; at most {MAX_NODES} are supported"
        )
    if len(paths) != len(choices) + 1:
        raise ValueError(f"{name} names a path twice; give each node once")
    index = {path: i for i, path in enumerate(paths)}
    for path in paths[1:]:
        if path[:-1] not in index:
            raise ValueError(
                f"{name} has {list(path)} without its parent {list(path[:-1])}; add it"
            )
    return StaticTree(
        parents=tuple(index[path[:-1]] for path in paths),
        depth=tuple(len(path) for path in paths),
        rank=tuple(path[-1] if path else 0 for path in paths),
    )


def _check_paths(choices: object, name: str) -> None:
    if not isinstance(choices, list) or not choices:
        raise ValueError(
            f"{name} must be a list of paths such as [[0], [1], [0, 0]], found {choices!r:.60}"
        )
    for path in choices:
        whole = isinstance(path, list) and all(type(r) is int and r >= 0 for r in path)
        if not whole or not path:
            raise ValueError(f"{name} holds {path!r:.60}; a path is a list of ranks such as [0, 1]")


def chain(length: int) -> StaticTree:
    """`length` drafted tokens in a row."""
    return static_tree([[0] * n for n in range(1, length + 1)], name=f"chain-{length}")


# EAGLE-1's default for every model, 25 nodes and the root (arXiv 2401.15077, figure 7).
MC_SIM_7B_63 = [
    [0], [1], [2], [3],
    [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0],
    [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [1, 0, 0],
    [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2],
    [0, 0, 0, 0, 0], [0, 0, 0, 0, 1],
]  # fmt: skip


def parse_tree(text: str) -> Tree:
    """A tree from what a user types: `mc_sim_7b_63`, `chain-5`, JSON paths, `dynamic`,
    `dynamic-N-D-K` (total_tokens, depth, top_k) or a JSON file.
    """
    if text == "mc_sim_7b_63":
        return static_tree(MC_SIM_7B_63)
    match = re.fullmatch(r"chain[-_:]?(\d+)", text)
    if match:
        if not 1 <= int(match[1][:9]) < MAX_NODES:
            raise ValueError(f"--tree {text:.40}: a chain has 1 to {MAX_NODES - 1} tokens")
        return chain(int(match[1]))
    match = re.fullmatch(r"dynamic(?:-(\d{1,9})-(\d{1,9})-(\d{1,9}))?", text)
    if match:
        return DynamicTree(*(int(number) for number in match.groups() if number))
    if text.lstrip()[:1] not in ("[", "{"):
        return _read_tree(text)
    return _build(_decode(text, "--tree"), "--tree")


def _read_tree(text: str) -> Tree:
    try:
        content = Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--tree {text!r:.80} is neither mc_sim_7b_63, chain-N, "
            "dynamic, dynamic-N-D-K (total_tokens, depth, top_k), a JSON list of paths nor a file "
            f"that holds one ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text; expected a JSON list of paths") from error
    return _build(_decode(content, text), text)


def _build(value: Any, name: str) -> Tree:
    """A tree from JSON: a list of paths, a dynamic tree's three numbers by name, or an object that
    holds one of these as "tree", which is what `fasteagle tune` writes.
    """
    if isinstance(value, dict) and "tree" in value:
        value = value["tree"]
    if not isinstance(value, dict):
        return static_tree(value, name=name)
    known = {field.name for field in fields(DynamicTree)}
    if not value or set(value) - known or not all(type(number) is int for number in value.values()):
        raise ValueError(
            f"{name} holds {json.dumps(value)[:80]}; expected whole numbers under "
            f"{', '.join(sorted(known))}, or a list of paths"
        )
    return DynamicTree(**value)


def _decode(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{name} is not JSON ({error}); expected a list of paths like [[0], [0, 0]]"
        ) from error
