"""What do a target and its EAGLE-1 head of a named size weigh, when every weight is random?

    C model dim  V vocabulary

Only torch is needed: no checkpoint, no tokenizer. Weights are made on the device, one tensor at a
time, so the peak is the model itself.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fasteagle.cache import KVCache
from fasteagle.config import ModelConfig
from fasteagle.draft.base import Drafter
from fasteagle.draft.eagle import EagleHead
from fasteagle.draft.kinds import DRAFTERS, Options, eagle_config
from fasteagle.model import Transformer
from fasteagle.quant.linear import QuantLinear

Model = TypeVar("Model", bound=nn.Module)
STD = 0.02  # what these families are initialised with


def llama(
    dim: int, n_layers: int, heads: tuple[int, int], size: int, vocab: int, *, tied: bool = False
) -> ModelConfig:
    """A LLaMA shape: heads are (query, kv), size is the MLP's."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        dim=dim,
        n_layers=n_layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=dim // heads[0],
        intermediate_size=size,
        max_positions=4096,
        tie_embeddings=tied,
    )


SIZES = {
    "7b": llama(4096, 32, (32, 32), 11008, 32000),  # LLaMA2-7B, Vicuna-7B
    "8b": llama(4096, 32, (32, 8), 14336, 128256),  # LLaMA3-8B
    "13b": llama(5120, 40, (40, 40), 13824, 32000),  # LLaMA2-13B
    "1b": llama(2048, 16, (32, 8), 8192, 128256, tied=True),  # LLaMA3.2-1B
    "1.1b": llama(2048, 22, (32, 4), 5632, 32000),  # TinyLlama-1.1B
    "demo": llama(256, 4, (4, 2), 688, 2048, tied=True),  # the embedded pair
    "tiny": llama(64, 2, (4, 2), 96, 128),
}


class Pair(NamedTuple):
    target: Transformer
    head: EagleHead


class Weight(NamedTuple):
    """Bytes that decoding streams from memory; an embedding that is only looked up is not there."""

    target: int  # linear layers of the target, a pass
    lm_head: int
    head: int  # fc and decoder layer of the draft head, a pass
    draft_lm_head: int  # what a drafted level reads of the lm_head

    @property
    def step(self) -> int:
        """A plain step: one pass, one lm_head."""
        return self.target + self.lm_head

    def round(self, n_levels: int) -> int:
        """A plain step and, for every drafted level, one head pass and its lm_head."""
        return self.step + n_levels * (self.head + self.draft_lm_head)


def random_pair(
    size: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    positions: int | None = None,
) -> Pair:
    """Target and EAGLE-1 head of a named size with normal weights, on `device`.

    positions: how long the context may be, where that is not the size's own 4096.
    """
    target = random_target(size, dtype=dtype, device=device, seed=seed, positions=positions)
    with torch.device("meta"):
        head = EagleHead(eagle_config(target.config))
    return Pair(target, materialize(head, dtype, device, seed + 1))


def random_target(
    size: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    positions: int | None = None,
) -> Transformer:
    """A target of a named size with normal weights, on `device`."""
    config = SIZES[size]
    with torch.device("meta"):
        target = Transformer(replace(config, max_positions=positions or config.max_positions))
    return materialize(target, dtype, device, seed)


def random_drafter(kind: str, target: Transformer, options: Options, seed: int = 1) -> Drafter:
    """A drafter of a row of DRAFTERS whose weights, if it has any, are random."""
    row, weights = DRAFTERS[kind], None
    if row.config is not None:
        with torch.device("meta"):
            weights = row.make(row.config(target.config))
        materialize(weights, target.dtype, target.device, seed)
    return row.drafter(weights, target, options)


def materialize(model: Model, dtype: torch.dtype, device: torch.device, seed: int) -> Model:
    """Give a model built on the meta device its weights; norms are 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, empty in model.named_buffers():
        if empty.is_meta:  # d2t: the first tokens of the vocabulary
            state[name] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
    for name, empty in model.named_parameters():
        weight = torch.empty(empty.shape, dtype=dtype, device=device)
        if empty.dim() == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(0.0, STD, generator=generator)
        state[name] = weight
    model.load_state_dict(state, strict=True, assign=True)
    # Moves RoPE's frequencies, which are made on the CPU and stay float32 whatever the weights are.
    model.to(device).eval().requires_grad_(False)
    kept = (torch.float32, torch.int64)
    stray = [n for n, t in model.named_buffers() if t.is_meta or t.dtype not in kept]
    assert not stray, f"buffers without values or recast: {stray}"
    return model


def weigh(pair: Pair, draft_lm_head: nn.Module | None = None) -> Weight:
    """Bytes of a pair's linear layers; draft_lm_head: of a pruned draft vocabulary, if there is."""
    target = pair.target
    whole = linear_bytes(target)
    if target.tied:
        lm_head = target.embed_tokens.weight.nbytes
    else:
        lm_head = linear_bytes(target.get_submodule("lm_head"))
        whole -= lm_head
    drafting = lm_head if draft_lm_head is None else linear_bytes(draft_lm_head)
    return Weight(whole, lm_head, linear_bytes(pair.head), drafting)


def linear_bytes(model: nn.Module) -> int:
    """Bytes of all linear layers in it, itself included, as they are stored."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    packed = sum(m.read_bytes for m in model.modules() if isinstance(m, QuantLinear))
    return packed + sum(p.nbytes for layer in layers for p in layer.parameters())


def kv_bytes(cache: object, n_slots: int) -> int:
    """Bytes of keys and values that one pass over `n_slots` slots reads."""
    return 0 if not isinstance(cache, KVCache) else cache.n_bytes * n_slots // cache.n_slots


def drafted_levels(drafter: object) -> int:
    """How many times a round runs the head: once for each level of the tree below the root."""
    return getattr(drafter, "n_steps", 0)
