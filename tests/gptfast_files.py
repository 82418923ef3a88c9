"""gpt-fast's and eaglefast's .pth files of a tiny LLaMA, laid out lane by lane in slow loops.

O outputs  I inputs  g group size
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.hf_folders import Tensors
from tests.quant_files import CONFIG, HEAD, hf_shapes, int32_word, random_plain, save_pth

BFLOAT = torch.bfloat16


class Mode(NamedTuple):
    """How quantize.py was called: bits 16 is model.pth itself."""

    bits: int
    group_size: int = 32
    inner_k_tiles: int = 8

    @property
    def file_name(self) -> str:
        """As quantize.py names it."""
        names = {4: f"model_int4.g{self.group_size}.pth", 8: "model_int8.pth", 16: "model.pth"}
        return names[self.bits]


def tile_words(codes: Tensor, inner_k_tiles: int) -> Tensor:
    """Codes `[O, I]` -> tinygemm's words, each lane gathering its eight codes two tiles at a time.

    Lane t of a tile of 8 outputs holds output t // 4; in a tile of 16 inputs it has the pair that
    starts at 2 (t % 4) and the pair 8 further. Even codes fill the lower half of a word.
    """
    rows = codes.tolist()
    n_out, n_in = codes.shape
    wide = 16 * inner_k_tiles
    words = []
    for first_out in range(0, n_out, 8):
        words.append([])
        for start in range(0, n_in, wide):
            lanes = []
            for lane in range(32):
                row = rows[first_out + lane // 4]
                lanes.append([])
                for two_tiles in range(start, start + wide, 32):
                    v = []
                    for tile in (two_tiles, two_tiles + 16):
                        pair = tile + 2 * (lane % 4)
                        v += [row[pair], row[pair + 1], row[pair + 8], row[pair + 9]]
                    lanes[-1].append(int32_word([v[0], v[2], v[4], v[6], v[1], v[3], v[5], v[7]]))
            words[-1].append(lanes)
    return torch.tensor(words, dtype=torch.int32)


def int4_matrix(
    shape: tuple[int, int], mode: Mode, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales_and_zeros `[I / g, O, 2]` and the weight; inputs padded to 1024."""
    n_out, n_in = shape
    fits = n_in % mode.group_size == 0 and n_in % (16 * mode.inner_k_tiles) == 0
    stored = n_in if fits else -(-n_in // 1024) * 1024
    codes = torch.randint(0, 16, (n_out, stored), generator=generator)
    grid = torch.randn(stored // mode.group_size, n_out, 2, generator=generator) * 0.01
    grid = grid.to(BFLOAT)
    group = torch.arange(n_in) // mode.group_size
    scales, zeros = grid[group, :, 0].T.float(), grid[group, :, 1].T.float()
    return codes, grid, (codes[:, :n_in] - 8).float() * scales + zeros


def int4_tensors(name: str, codes: Tensor, grid: Tensor, mode: Mode) -> Tensors:
    words = tile_words(codes, mode.inner_k_tiles)
    return {f"{name}.weight": words, f"{name}.scales_and_zeros": grid}


def coded_matrix(
    name: str, parts: dict[str, tuple[int, int]], order: list[int], mode: Mode, seed: int
) -> tuple[Tensors, Tensors]:
    """One matrix of a file, row r of it being row order[r] of the stacked parts, and the parts."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(part[0] for part in parts.values()), next(iter(parts.values()))[1])
    if mode.bits == 4:
        codes, grid, weight = int4_matrix(shape, mode, generator)
        held = int4_tensors(name, codes[order], grid[:, order].contiguous(), mode)
    elif mode.bits == 8:
        codes8 = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        scales = (torch.rand(shape[0], generator=generator) * 0.002).to(BFLOAT)
        weight = codes8.float() * scales.float()[:, None]
        held = {f"{name}.weight": codes8[order], f"{name}.scales": scales[order]}
    else:
        plain = random_plain(shape, generator, BFLOAT)
        held, weight = {f"{name}.weight": plain[order]}, plain.float()
    split = weight.split([part[0] for part in parts.values()])
    return held, {f"{part}.weight": rows.clone() for part, rows in zip(parts, split, strict=True)}


def paired_rows(config: dict[str, Any], n_heads: list[int], n_plain: int) -> list[int]:
    """For each row of a wqkv the row of Hugging Face's q, k, v that it is: halves become pairs."""
    D = config["hidden_size"] // config["num_attention_heads"]
    rows: list[int] = []
    for count in n_heads:
        first = len(rows)
        for head in range(count):
            for at in range(D // 2):
                rows += [first + head * D + at, first + head * D + D // 2 + at]
    return rows + list(range(len(rows), len(rows) + n_plain))


def layers(config: dict[str, Any], mode: Mode, prefix: str, seed: int) -> tuple[Tensors, Tensors]:
    """The matrices of all layers: of the file, and by Hugging Face's names."""
    shapes = hf_shapes(config)
    held: Tensors = {}
    weights: Tensors = {}
    heads = [config["num_attention_heads"], config["num_key_value_heads"]]
    plan = {"attention.wqkv": ("self_attn", "qkv"), "attention.wo": ("self_attn", "o")}
    one = {"feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "down"}
    named = {name: (folder, list(parts)) for name, (folder, parts) in plan.items()}
    named |= {name: ("mlp", [part]) for name, part in one.items()}
    for index in range(config["num_hidden_layers"]):
        for name, (folder, parts) in named.items():
            seed += 1
            full = [f"layers.{index}.{folder}.{part}_proj" for part in parts]
            sizes = {prefix + part: shapes[f"model.{part}.weight"] for part in full}
            n_out = sum(shape[0] for shape in sizes.values())
            v_rows = list(sizes.values())[-1][0]
            order = paired_rows(config, heads, v_rows) if len(parts) == 3 else list(range(n_out))
            pairs = {part: (shape[0], shape[1]) for part, shape in sizes.items()}
            made = coded_matrix(f"layers.{index}.{name}", pairs, order, mode, seed)
            held, weights = held | made[0], weights | made[1]
    return held, weights


def write_gptfast(
    path: Path, mode: Mode, config: dict[str, Any] = CONFIG, *, seed: int = 0
) -> tuple[Path, Tensors]:
    """A target's .pth with its config.json; the weights by Hugging Face's names, in float32."""
    generator = torch.Generator().manual_seed(seed)
    held, weights = layers(config, mode, "model.", seed)
    table = (config["vocab_size"], config["hidden_size"])
    lm_head = coded_matrix("output", {"lm_head": table}, list(range(table[0])), mode, seed - 1)
    held, weights = held | lm_head[0], weights | lm_head[1]
    plain = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"layers.{index}."
        plain[f"model.{layer}input_layernorm.weight"] = f"{layer}attention_norm.weight"
        plain[f"model.{layer}post_attention_layernorm.weight"] = f"{layer}ffn_norm.weight"
    shapes = hf_shapes(config)
    for theirs, name in plain.items():
        held[name] = random_plain(shapes[theirs], generator, BFLOAT)
        weights[theirs] = held[name].float()
    return save_pth(path, mode.file_name, config, held), weights


def write_gptfast_head(
    path: Path, mode: Mode, config: dict[str, Any] = HEAD, *, seed: int = 100
) -> tuple[Path, Tensors]:
    """An eaglefast head's .pth: fc is plain; it has copies of the embedding and of lm_head."""
    generator = torch.Generator().manual_seed(seed)
    held, weights = layers(config, mode, "", seed)
    C, V = config["hidden_size"], config["vocab_size"]
    copy = coded_matrix("output", {"lm_head": (V, C)}, list(range(V)), mode, seed - 1)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (C, 2 * C), "fc.bias": (C,)}
    shapes |= {"layers.0.ffn_norm.weight": (C,), "tok_embeddings.weight": (V, C)}
    plain = {name: random_plain(shape, generator, BFLOAT) for name, shape in shapes.items()}
    ours = {
        "layers.0.ffn_norm.weight": "layers.0.post_attention_layernorm.weight",
        "tok_embeddings.weight": "embed_tokens.weight",
    }
    weights |= {ours.get(name, name): tensor.float() for name, tensor in plain.items()}
    return save_pth(path, mode.file_name, config, held | plain | copy[0]), weights
