"""How do gpt-fast's .pth files, and those of EAGLE's eaglefast branch, store a model?

    O outputs  I inputs of a weight  g group size  H query heads  G kv heads  D head dim

model.pth, model_int8.pth and model_int4.g32.pth lie beside the Hugging Face config.json. Their
names are LLaMA's own (`target_names`, `head_names`), q, k and v are one matrix as ours are, and the
rows of q and k are in another order (`rope_rows`). eaglefast writes both of its files, the model
and the head, in this way.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.quant.layout import GROUP_SIZES, Quantized, pack_int4, select_rows
from fasteagle.quant.packed import HALVES, INT32, Part, Shape, check_finite, nibbles

EMBEDDING = "tok_embeddings.weight"
HEAD_COPY = "output."  # an eaglefast head's copy of the target's lm_head, which nobody needs
PADDED = 1024  # inputs that do not fit the int4 kernel are padded to a multiple of this


class Header(Protocol):
    """What a file says of a tensor before it is read."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Int8:
    """`weight [O, I]` int8 and one scale a row, `scales [O]`; quantize.py --mode int8."""

    name: str = "gpt-fast int8"
    zero_bias: bool = False

    def holds(self, matrix: str, names: Container[str]) -> bool:
        return f"{matrix}.scales" in names

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        return {
            f"{matrix}.weight": Part(shape, (torch.int8,)),
            f"{matrix}.scales": Part(shape[:1], (*HALVES, torch.float32)),
        }

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        scales = check_finite(held[f"{matrix}.scales"], f"{matrix}.scales")
        return Quantized(8, held[f"{matrix}.weight"], scales[:, None], None, shape[1])


@dataclass(frozen=True)
class Int4:
    """CUDA files of quantize.py --mode int4: `unpack_tiles` says how the codes lie.

    weight            [O / 8, J / (16 K), 32, K / 2] int32, K = inner_k_tiles, J >= I inputs
    scales_and_zeros  [J / g, O, 2]  weight = (code - 8) * scale + zero, as ours
    """

    group_size: int
    inner_k_tiles: int
    name: str = "gpt-fast int4"
    zero_bias: bool = False

    def holds(self, matrix: str, names: Container[str]) -> bool:
        return f"{matrix}.scales_and_zeros" in names

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        n_out, n_in = shape
        tiles, g = self.inner_k_tiles, self.group_size
        if n_out % 8:
            raise ValueError(f"{matrix} has {n_out} outputs; {self.name} needs a multiple of 8")
        n_stored = n_in if n_in % g == n_in % (16 * tiles) == 0 else n_in + -n_in % PADDED
        packed = (n_out // 8, n_stored // (16 * tiles), 32, tiles // 2)
        return {
            f"{matrix}.weight": Part(packed, INT32),
            f"{matrix}.scales_and_zeros": Part((n_stored // g, n_out, 2), (torch.bfloat16,)),
        }

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        n_in, g = shape[1], self.group_size
        n_groups = -(-n_in // g)
        name = f"{matrix}.scales_and_zeros"
        scales, zeros = check_finite(held[name], name)[:n_groups].permute(2, 1, 0).contiguous()
        codes = unpack_tiles(held[f"{matrix}.weight"])[:, : n_groups * g]
        return Quantized(4, pack_int4(codes, g), scales, zeros, n_in)


@dataclass(frozen=True)
class Turned:
    """Either form, with the rows of wqkv in our order."""

    stored: Int8 | Int4
    config: ModelConfig | DraftConfig
    zero_bias: bool = False

    @property
    def name(self) -> str:
        return self.stored.name

    def holds(self, matrix: str, names: Container[str]) -> bool:
        return self.stored.holds(matrix, names)

    def tensors(self, matrix: str, shape: Shape) -> dict[str, Part]:
        return self.stored.tensors(matrix, shape)

    def read(self, matrix: str, shape: Shape, held: Mapping[str, Tensor]) -> Quantized:
        weight = self.stored.read(matrix, shape, held)
        turned = matrix.endswith("attention.wqkv")
        return select_rows(weight, rope_rows(self.config)) if turned else weight


def format_of_file(entries: Mapping[str, Header]) -> Int8 | Int4 | None:
    """How the matrices of a .pth are quantized, from its headers; None where they are not."""
    if any(name.endswith(".scales") for name in entries):
        return Int8()
    name = next((name for name in entries if name.endswith(".scales_and_zeros")), None)
    if name is None:
        return None
    weight = entries.get(f"{name.removesuffix('.scales_and_zeros')}.weight")
    packed = () if weight is None else weight.shape
    if len(packed) != 4 or packed[3] not in (1, 2, 4):
        raise ValueError(
            f"the weight of {name} has shape {list(packed)}; expected int4 as quantize.py packs it "
            "for CUDA, [O / 8, I / (16 K), 32, K / 2] (its CPU files fit only their own machine)"
        )
    n_stored, groups = packed[1] * packed[3] * 32, entries[name].shape[0]
    if groups == 0 or n_stored % groups or n_stored // groups not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"{name} has {groups} groups for {n_stored} inputs; expected of {sizes}")
    return Int4(n_stored // groups, packed[3] * 2)


def unpack_tiles(words: Tensor) -> Tensor:
    """tinygemm's int4 words `[O / 8, I / (16 K), 32, K / 2]` -> codes `[O, I]` uint8.

    A tile is 8 outputs by 16 inputs, the right-hand fragment of the instruction mma.m16n8k16: lane
    4 r + q of the 32 has output r and inputs 2q, 2q + 1, 2q + 8, 2q + 9. K tiles along the inputs
    are together, and one word has a lane's share of two of them. So nibble 4 a + 2 t + h of word
    [n, k, 4 r + q, i] is the code of

        output 8 n + r, input 16 (K k + 2 i + t) + 8 h + 2 q + a

    (PyTorch, aten/src/ATen/native/cuda/int4mm.cu). Word [0, 0, 5, 0] is output 1, q = 1; from its
    lowest nibble: inputs 2, 10, 18, 26, 3, 11, 19, 27.
    """
    fields = nibbles(words).unflatten(2, (8, 4)).unflatten(4, (-1, 2, 2, 2))  # n k r q i a t h
    rows = fields.permute(0, 2, 1, 4, 6, 7, 3, 5)  # n r k i t h q a
    return rows.reshape(8 * words.shape[0], -1)


def rope_rows(config: ModelConfig | DraftConfig) -> Tensor:
    """Rows `[(H + 2 G) D]` int64 of a file's wqkv, in the order of our qkv_proj.

    Rotary embedding turns pairs of rows: (i, i + D / 2) of a head here and in Hugging Face's files,
    (2 i, 2 i + 1) in gpt-fast's. v is the same in both. One head, D = 4: q [0, 2, 1, 3].
    """
    H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
    turned = (H + G) * D
    pairs = torch.arange(turned).reshape(H + G, D // 2, 2)
    return torch.cat((pairs.transpose(1, 2).flatten(), torch.arange(turned, turned + G * D)))


def target_names(config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """Our parameters of a target and the tensors of a .pth that each stacks, with their shapes.

    A matrix is named as if it were not quantized; those of qkv_proj still need `rope_rows`.
    """
    if config.tie_embeddings:
        raise ValueError(
            "config.json ties lm_head to the embedding; a .pth of gpt-fast holds both: set "
            "tie_word_embeddings to false"
        )
    if config.n_experts:
        raise ValueError("a .pth of experts is not supported; give the Hugging Face checkpoint")
    table = (config.vocab_size, config.dim)
    names: dict[str, dict[str, Shape]] = {"embed_tokens.weight": {EMBEDDING: table}}
    for index in range(config.n_layers):
        names |= _layer(config, f"layers.{index}.", input_norm=True)
    names["norm.weight"] = {"norm.weight": (config.dim,)}
    return names | {"lm_head.weight": {"output.weight": table}}


def head_names(config: DraftConfig) -> dict[str, dict[str, Shape]]:
    """The same for an eaglefast head; what begins with HEAD_COPY in its file is left over."""
    C = config.dim
    names: dict[str, dict[str, Shape]] = {"fc.weight": {"fc.weight": (C, 2 * C)}}
    if config.fc_bias:
        names["fc.bias"] = {"fc.bias": (C,)}
    for index in range(config.n_layers):
        names |= _layer(config, f"layers.{index}.", input_norm=index > 0)
    if config.own_embedding:
        names["embed_tokens.weight"] = {EMBEDDING: (config.vocab_size, C)}
    return names


def head_shapes(entries: Mapping[str, Header]) -> dict[str, Shape]:
    """The shapes by which `read_draft_config` knows a head, under Hugging Face's names."""
    layer = "layers.0."
    C, inner = _n_out(entries, "fc"), _n_out(entries, f"{layer}feed_forward.w1")
    kv = (_n_out(entries, f"{layer}attention.wqkv") - C) // 2  # eaglefast's q always has C rows
    shapes: dict[str, Shape] = {
        "fc.weight": (C, 2 * C),
        f"{layer}self_attn.k_proj.weight": (kv, C),
        f"{layer}mlp.gate_proj.weight": (inner, C),
    }
    given = {"fc.bias": "fc.bias", "embed_tokens.weight": EMBEDDING}
    return shapes | {ours: entries[name].shape for ours, name in given.items() if name in entries}


def _n_out(entries: Mapping[str, Header], matrix: str) -> int:
    name = f"{matrix}.weight"
    if name not in entries:
        raise ValueError(f"the file holds no {name}; expected a head as eaglefast writes it")
    shape = entries[name].shape
    return shape[0] * 8 if len(shape) == 4 else shape[0]


def _layer(
    config: ModelConfig | DraftConfig, layer: str, *, input_norm: bool
) -> dict[str, dict[str, Shape]]:
    if config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm:
        raise ValueError("gpt-fast has no biases and no q and k norms; the config asks for them")
    C, D, up = config.dim, config.head_dim, (config.intermediate_size, config.dim)
    qkv, q = (config.n_heads + 2 * config.n_kv_heads) * D, config.n_heads * D
    names: dict[str, dict[str, Shape]] = {
        "post_attention_layernorm": {"ffn_norm": (C,)},
        "self_attn.qkv_proj": {"attention.wqkv": (qkv, C)},
        "self_attn.o_proj": {"attention.wo": (C, q)},
        "mlp.gate_up_proj": {"feed_forward.w1": up, "feed_forward.w3": up},
        "mlp.down_proj": {"feed_forward.w2": up[::-1]},
    }
    if input_norm:
        names["input_layernorm"] = {"attention_norm": (C,)}
    return {
        f"{layer}{ours}.weight": {f"{layer}{name}.weight": shape for name, shape in parts.items()}
        for ours, parts in names.items()
    }
