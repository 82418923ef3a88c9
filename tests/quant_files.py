"""Quantized tensors and folders as other programs write them, packed word by word in slow loops.

    O outputs  I inputs  g group size  G groups of a row

Every writer draws random codes, and what it returns beside the files are the weights that they
stand for, under Hugging Face's names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.hf_folders import TARGET, Tensors, write

# Small, and every matrix fits whole words and groups of 32.
CONFIG: dict[str, Any] = TARGET | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "torch_dtype": "float16",
}
HEAD = CONFIG | {"num_hidden_layers": 1, "bias": True}
Codes = list[list[int]]


class Coded(NamedTuple):
    """A weight `(codes - points) * scales`, each input taking the point and scale of its group."""

    codes: Tensor  # [O, I] int64, 0..15
    points: Tensor  # [O, G] int64, 0..15
    scales: Tensor  # [O, G]
    g_idx: Tensor  # [I] int64

    @property
    def weight(self) -> Tensor:
        """`[O, I]` float32, by way of float64."""
        steps = (self.codes - self.points[:, self.g_idx]).double()
        return (steps * self.scales[:, self.g_idx].double()).float()


def random_coded(
    shape: tuple[int, int],
    group_size: int,
    generator: torch.Generator,
    *,
    g_idx: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Coded:
    """Random codes in groups of `group_size`, -1 for one a row."""
    n_out, n_in = shape
    g = n_in if group_size == -1 else group_size
    n_groups = -(-n_in // g)
    points = torch.randint(0, 16, (n_out, n_groups), generator=generator)
    scales = (torch.rand(n_out, n_groups, generator=generator) * 0.02 + 0.001).to(dtype)
    codes = torch.randint(0, 16, shape, generator=generator)
    in_order = torch.arange(n_in) // g
    return Coded(codes, points, scales, in_order if g_idx is None else g_idx)


def shuffled_groups(n_in: int, group_size: int, generator: torch.Generator) -> Tensor:
    """What act-order leaves: whole groups, their inputs anywhere."""
    in_order = torch.arange(n_in) // group_size
    return in_order[torch.randperm(n_in, generator=generator)]


def int32_word(values: list[int]) -> int:
    """Eight values 0..15, the first in the lowest bits, as a signed 32-bit number."""
    word = 0
    for place, value in enumerate(values):
        assert 0 <= value < 16, f"{value} is no int4 code"
        word += value * 16**place
    return word - 2**32 if word >= 2**31 else word


def pack_columns(rows: Codes, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """`[X, Y]` -> `[X, Y / 8]` int32, the last word of a row filled up; nibble k is order[k]'s."""
    packed = []
    for row in rows:
        full = row + [0] * (-len(row) % 8)
        starts = range(0, len(full), 8)
        packed.append([int32_word([full[at + k] for k in order]) for at in starts])
    return torch.tensor(packed, dtype=torch.int32)


def pack_rows(rows: Codes) -> Tensor:
    """`[X, Y]` -> `[X / 8, Y]` int32: words run down a column."""
    columns = [[row[at] for row in rows] for at in range(len(rows[0]))]
    return pack_columns(columns).T.contiguous()


def gptq_tensors(
    matrix: str, coded: Coded, *, version: int = 1, with_g_idx: bool = True
) -> Tensors:
    """As AutoGPTQ (version 1: zero points less 1) and GPTQModel (2) name and pack it."""
    points = coded.points.T.tolist()
    if version == 1:
        points = [[(point - 1) % 16 for point in row] for row in points]
    tensors = {
        f"{matrix}.qweight": pack_rows(coded.codes.T.tolist()),
        f"{matrix}.qzeros": pack_columns(points),
        f"{matrix}.scales": coded.scales.T.contiguous(),
    }
    return tensors | ({f"{matrix}.g_idx": coded.g_idx.int()} if with_g_idx else {})


def awq_tensors(matrix: str, coded: Coded) -> Tensors:
    """As AutoAWQ's version gemm: words along the outputs, even ones in the lower half."""
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{matrix}.qweight": pack_columns(coded.codes.T.tolist(), interleaved),
        f"{matrix}.qzeros": pack_columns(coded.points.T.tolist(), interleaved),
        f"{matrix}.scales": coded.scales.T.contiguous(),
    }


def compressed_tensors(
    matrix: str, coded: Coded, *, symmetric: bool = False, with_g_idx: bool = False
) -> Tensors:
    """As llm-compressor's pack-quantized; symmetric leaves the zero points out."""
    tensors = {
        f"{matrix}.weight_packed": pack_columns(coded.codes.tolist()),
        f"{matrix}.weight_scale": coded.scales,
        f"{matrix}.weight_shape": torch.tensor(coded.codes.shape),
    }
    if not symmetric:
        down = coded.points.tolist() + [[0] * coded.points.shape[1]] * (-len(coded.points) % 8)
        tensors[f"{matrix}.weight_zero_point"] = pack_rows(down)
    return tensors | ({f"{matrix}.weight_g_idx": coded.g_idx.int()} if with_g_idx else {})


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaMA or Mixtral of this config that is not tied, embedding first."""
    C, V, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    kv = C // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
    for index in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        experts = f"model.layers.{index}.block_sparse_moe."
        for name, rows in {"q": C, "k": kv, "v": kv, "o": C}.items():
            shapes[f"{attention}{name}_proj.weight"] = (rows, C)
        n_experts = config.get("num_local_experts", 0)
        if n_experts:
            shapes[f"{experts}gate.weight"] = (n_experts, C)
        for expert in range(n_experts):
            for name, shape in {"w1": (inner, C), "w2": (C, inner), "w3": (inner, C)}.items():
                shapes[f"{experts}experts.{expert}.{name}.weight"] = shape
        for name in () if n_experts else ("gate", "up"):
            shapes[f"{mlp}{name}_proj.weight"] = (inner, C)
        if not n_experts:
            shapes[f"{mlp}down_proj.weight"] = (C, inner)
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{index}.{name}_layernorm.weight"] = (C,)
    return shapes | {"model.norm.weight": (C,), "lm_head.weight": (V, C)}


def random_plain(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=generator) * (0.1 if len(shape) == 2 else 1)).to(dtype)


def write_coded_folder(
    path: Path,
    config: dict[str, Any],
    quantization: dict[str, Any],
    pack: Callable[[str, Coded], Tensors],
    *,
    group_size: int,
    act_order: bool = False,
    own_order: bool = False,
    seed: int = 0,
) -> Tensors:
    """A Hugging Face folder whose layers' matrices are quantized; embedding and lm_head are not.

    own_order: act-order of every matrix by itself, also of those that read the same inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    held: Tensors = {}
    weights: Tensors = {}
    order: dict[str, Tensor] = {}  # what reads the same inputs has the same order
    for name, shape in hf_shapes(config).items():
        if "_proj" not in name and ".experts." not in name:
            held[name] = random_plain(shape, generator, torch.float16)
            weights[name] = held[name].float()
            continue
        reads = name.translate(str.maketrans("qkv", "qqq")).replace("up_proj", "gate_proj")
        reads = reads.replace("w3", "w1")
        reads = name if own_order else reads
        if act_order and reads not in order:
            order[reads] = shuffled_groups(shape[1], group_size, generator)
        coded = random_coded((shape[0], shape[1]), group_size, generator, g_idx=order.get(reads))
        weights[name] = coded.weight
        held |= pack(name.removesuffix(".weight"), coded)
    write(path, config | {"quantization_config": quantization}, held)
    return weights


def write_gptq_folder(
    path: Path,
    config: dict[str, Any] = CONFIG,
    *,
    group_size: int = 32,
    version: int = 1,
    act_order: bool = False,
    own_order: bool = False,
    zero_bias: bool = False,
    seed: int = 0,
) -> Tensors:
    """A GPTQ folder; the weights it stands for, by Hugging Face's names, in float32.

    zero_bias adds what older AutoGPTQ does: a bias of 0 to every matrix, though the model has none.
    """
    stated: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": group_size}
    stated |= {"desc_act": act_order, "sym": False}
    stated |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}

    def pack(matrix: str, coded: Coded) -> Tensors:
        bias = torch.zeros(len(coded.codes), dtype=torch.float16)
        extra = {f"{matrix}.bias": bias} if zero_bias else {}
        return gptq_tensors(matrix, coded, version=version) | extra

    return write_coded_folder(
        path,
        config,
        stated,
        pack,
        group_size=group_size,
        act_order=act_order,
        own_order=own_order,
        seed=seed,
    )


def write_awq_folder(
    path: Path, config: dict[str, Any] = CONFIG, *, group_size: int = 32, seed: int = 0
) -> Tensors:
    """An AWQ folder; the weights it stands for, by Hugging Face's names, in float32."""
    stated = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    return write_coded_folder(
        path, config, stated | {"zero_point": True}, awq_tensors, group_size=group_size, seed=seed
    )


def compressed_config(*, group_size: int, symmetric: bool, **weights: Any) -> dict[str, Any]:
    """The quantization_config that llm-compressor writes."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": False}
    one_a_row = group_size == -1
    scheme |= {"strategy": "channel" if one_a_row else "group"}
    scheme |= {"group_size": None if one_a_row else group_size, **weights}
    group = {"weights": scheme, "input_activations": None, "targets": ["Linear"]}
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return stated | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def write_compressed_folder(
    path: Path, config: dict[str, Any] = CONFIG, *, group_size: int = 32, seed: int = 0
) -> Tensors:
    """A compressed-tensors folder, asymmetric; the weights it stands for, in float32."""
    stated = compressed_config(group_size=group_size, symmetric=False)
    return write_coded_folder(
        path, config, stated, compressed_tensors, group_size=group_size, seed=seed
    )


def save_pth(path: Path, name: str, config: dict[str, Any], held: Tensors) -> Path:
    """A .pth beside a config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    torch.save(held, path / name)
    return path / name
