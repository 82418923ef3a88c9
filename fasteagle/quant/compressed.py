"""How does a compressed-tensors checkpoint store a matrix? Its format pack-quantized, W4A16.

O outputs  I inputs  g group size  G groups of a row
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasteagle.hf_config import flag
from fasteagle.quant.layout import Quantized
from fasteagle.quant.packed import (
    HALVES,
    INT32,
    Part,
    Shape,
    check_bits,
    check_finite,
    from_points,
    group_order,
    n_groups_of,
    nibbles,
    stated_group_size,
)

WHOLE = (torch.int32, torch.int64)
PACKED = "pack-quantized"


@dataclass(frozen=True)
class Compressed:
    """Files of llm-compressor; codes and zero points -8..7 are stored plus 8.

    weight_packed      [O, I / 8]  nibble k of word [o, i] is the code of input 8 i + k
    weight_scale       [O, G]
    weight_zero_point  [O / 8, G]  nibble k of word [i, a] is the zero point of output 8 i + k;
                                   only there if not symmetric
    weight_shape       [2]         O and I; words at the end of a row are filled up
    weight_g_idx       [I]         the group of each input, after act-order by group
    """

    group_size: int | None  # None: one group a row
    symmetric: bool
    act_order: bool
    name: str = "compressed-tensors"
    zero_bias: bool = False

    def holds(self, matrix: str, names: Container[str]) -> bool:
        return f"{matrix}.weight_packed" in names

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        n_out, n_in = shape
        n_groups = n_groups_of(shape, self.group_size)
        parts = {
            f"{matrix}.weight_packed": Part((n_out, -(-n_in // 8)), INT32),
            f"{matrix}.weight_scale": Part((n_out, n_groups), HALVES),
            f"{matrix}.weight_shape": Part((2,), WHOLE),
            f"{matrix}.weight_g_idx": Part((n_in,), WHOLE, optional=not self.act_order),
        }
        if not self.symmetric:
            parts[f"{matrix}.weight_zero_point"] = Part((-(-n_out // 8), n_groups), INT32)
        return parts

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        stated = tuple(held[f"{matrix}.weight_shape"].tolist())
        if stated != tuple(shape):
            raise ValueError(f"{matrix}.weight_shape is {list(stated)}; expected {list(shape)}")
        codes = nibbles(held[f"{matrix}.weight_packed"])[:, : shape[1]]
        scales = check_finite(held[f"{matrix}.weight_scale"], f"{matrix}.weight_scale")
        points = torch.full_like(scales, 8)
        if not self.symmetric:
            points = nibbles(held[f"{matrix}.weight_zero_point"].T).T[: shape[0]]
        g, order = self.group_size or shape[1], None
        g_idx = held.get(f"{matrix}.weight_g_idx")
        if g_idx is not None and not bool((g_idx == -1).all()):  # -1: never set, columns in order
            order = group_order(g_idx, group_size=g, name=f"{matrix}.weight_g_idx")
        if order is not None:
            codes = codes[:, order]
        return from_points(codes, scales, points, group_size=g, order=order)


def compressed(config: Mapping[str, Any]) -> Compressed:
    """What a quantization_config of compressed-tensors states; ValueError where it is not W4A16."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"config_groups is {groups!r}; expected groups by name")
    _check_only_weights(config, groups)
    schemes = {_scheme(group.get("weights")) for group in groups.values()}
    if len(schemes) != 1:
        raise ValueError(f"config_groups holds {len(schemes)} schemes of weights; expected one")
    return schemes.pop()


def _check_only_weights(config: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
    formats = [config.get("format"), *(group.get("format") or PACKED for group in groups.values())]
    wrong = [name for name in formats if name != PACKED]
    if wrong:
        raise ValueError(f"compressed-tensors of format {wrong[0]!r}; expected {PACKED}")
    sparse = config.get("sparsity_config") or {}
    found = [name for name in ("kv_cache_scheme", "transform_config") if config.get(name)]
    if sparse.get("format", "dense") != "dense":
        found.append("sparsity_config")
    for group in groups.values():
        found += [n for n in ("input_activations", "output_activations") if group.get(n)]
    if found:
        raise ValueError(f"field {found[0]} is set; expected weights in 4 bits and nothing else")


def _scheme(weights: Any) -> Compressed:
    if not isinstance(weights, dict):
        raise ValueError(f"a config group's weights is {weights!r}; expected its scheme")  # noqa: TRY004
    check_bits(weights, "num_bits", method="compressed-tensors")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind != "int" or strategy not in ("group", "channel"):
        raise ValueError(
            f"weights of type {kind!r} and strategy {strategy!r}; expected int and group or channel"
        )
    size = stated_group_size(weights, "group_size") if strategy == "group" else None
    symmetric = flag(weights, "symmetric", default=True)
    return Compressed(size, symmetric, act_order=weights.get("actorder") in ("group", True))
