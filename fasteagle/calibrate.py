"""What are the inputs of each matrix of a model? Its Hessians, layer by layer, one in memory.

    n windows  S tokens of a window  b windows of a batch  V vocabulary
    C model dim  O outputs  I inputs of a matrix

For each matrix in turn the caller gets its weight and the Hessian of its inputs (`x.T @ x` over all
tokens) and returns the weight to go on with, so that every matrix is measured behind those already
quantized, also within a layer (arXiv 2210.17323, section 4: quantized one block at a time, inputs
from the partially quantized model).

Memory for 128 windows of 512 tokens and a 7B model (C 4096, MLP 11008), float32: hidden states of
65536 tokens 1.07 GB; inputs of down_proj 2.89 GB; one layer's weights 0.81 GB; the largest Hessian
0.48 GB, of which `gptq` makes some six copies: about 8 GB in all. Tokens pass each layer once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasteagle.cache import LayerCache
from fasteagle.config import DraftConfig, MedusaConfig, ModelConfig
from fasteagle.experts import ExpertLinear, Experts, gated
from fasteagle.families import EMBEDDING, LM_HEAD
from fasteagle.model import Block, Linear, RMSNorm, Rows, Transformer, attention_bias
from fasteagle.parameters import read_parameter
from fasteagle.rope import RoPE
from fasteagle.source import Checkpoint
from fasteagle.tree import causal_mask

# Parameter name, weight [O, I], Hessian [I, I] -> the weight that later inputs are computed with;
# all float32 and on the device. The weight itself leaves it as it is.
Quantize = Callable[[str, Tensor, Tensor], Tensor]
Run = Callable[[Tensor], Tensor]
Device = torch.device | str
BATCH = 4  # windows in one pass


@torch.inference_mode()
def calibrate_target(
    checkpoint: Checkpoint, windows: Tensor, quantize: Quantize, *, device: Device = "cpu"
) -> None:
    """Call `quantize` on every Linear of a target, for token windows `[n, S]`.

    In this order: each layer's qkv_proj, o_proj, gate_up_proj, down_proj, last "lm_head.weight"
    (with tied embeddings the embedding, whose return value is ignored). ValueError if the windows
    are longer than the model's context, or from `quantize`, with the parameter's name before it.
    """
    config = checkpoint.config
    assert isinstance(config, ModelConfig), "a target has a ModelConfig"
    _check(windows, config)
    table = _read(checkpoint, EMBEDDING)
    hidden = [table[tokens] for tokens in windows.split(BATCH)]
    if not config.tie_embeddings:
        del table  # 0.5 GB that only a tied lm_head needs again
    for index in range(config.n_layers):
        block = read_block(checkpoint, index, input_norm=True, device=device)
        calibrate_block(block, hidden, quantize, config=config, prefix=f"layers.{index}.")
    norm = RMSNorm(config.dim, config.norm_eps).to(device)
    norm.weight.data = _read(checkpoint, "norm.weight").to(device)
    name = EMBEDDING if config.tie_embeddings else LM_HEAD
    lm_head = _read(checkpoint, name).to(device)
    _call(quantize, LM_HEAD, lm_head, (norm(x.to(device)) for x in hidden))


@torch.inference_mode()
def calibrate_head(
    checkpoint: Checkpoint,
    target: Transformer,
    windows: Tensor,
    quantize: Quantize,
    *,
    device: Device = "cpu",
) -> None:
    """Call `quantize` on "fc.weight" and every Linear of an EAGLE-1 head's layers, in order.

    Row i of its input is the target's feature of token i of a window beside the embedding of token
    i + 1, at position i (draft/eagle.py). The whole target is in memory; best is the one that the
    head will run with, quantized or not. windows `[n, S]`; errors as in `calibrate_target`.
    """
    config = checkpoint.config
    assert isinstance(config, DraftConfig), "only EAGLE-1 heads are calibrated"
    _check(windows, target.config)
    table = target.embed_tokens.table
    if config.own_embedding:
        table = _read(checkpoint, EMBEDDING).to(target.device)
    pairs = [_pairs(target, table, tokens) for tokens in windows.split(BATCH)]
    fc = Linear(2 * config.dim, config.dim, bias=config.fc_bias)
    names = ("weight", "bias") if config.fc_bias else ("weight",)
    fc.load_state_dict({name: _read(checkpoint, f"fc.{name}") for name in names}, assign=True)
    fc.to(device)
    moved = (x.to(device) for x in pairs)
    fc.weight.data = _call(quantize, "fc.weight", fc.weight.data, moved)
    hidden = [fc(x.to(device)).cpu() for x in pairs]
    del pairs
    for index in range(config.n_layers):
        block = read_block(checkpoint, index, input_norm=index > 0, device=device)
        calibrate_block(block, hidden, quantize, config=config, prefix=f"layers.{index}.")


def calibrate_block(
    block: Block,
    hidden: list[Tensor],
    quantize: Quantize,
    *,
    config: ModelConfig | DraftConfig,
    prefix: str,
) -> None:
    """Call `quantize` on a block's four Linears and put what it returns in their place.

    Experts are two stacks in the place of the last two: there it is called once an expert, with its
    matrix and the Hessian of the rows routed to it, which is 0 where there are none.

    hidden, batches `[b, S, C]` float32 on the CPU, holds the block's inputs and then, in the same
    tensors, its outputs. prefix, such as "layers.3.", goes before the parameter names.
    """
    device = block.self_attn.qkv_proj.weight.device
    n_tokens = hidden[0].shape[1]
    positions = torch.arange(n_tokens, device=device)[None]
    rope = RoPE(config.head_dim, config.rope_theta, config.rope_scaling).to(device)
    rotary = rope(positions, torch.float32)
    mask = causal_mask(positions, n_tokens)
    bias = attention_bias(mask, config.n_heads // config.n_kv_heads, torch.float32)

    def attend(x: Tensor) -> Tensor:
        shape = (len(x), config.n_kv_heads, n_tokens, config.head_dim)
        kv = LayerCache(x.new_empty(shape), x.new_empty(shape))
        rows = Rows(rotary, positions.expand(len(x), -1), bias.expand(len(x), -1, -1, -1))
        y: Tensor = block.self_attn(x, rows, kv)
        return y

    halves: list[tuple[str, tuple[str, str], nn.Module, Run]] = [
        ("self_attn", ("qkv_proj", "o_proj"), block.input_layernorm, attend),
        ("mlp", ("gate_up_proj", "down_proj"), block.post_attention_layernorm, block.mlp),
    ]
    experts = block.mlp if isinstance(block.mlp, Experts) else None
    for part, names, norm, run in halves[:1] if experts else halves:
        fit = partial(_fit, block.get_submodule(part), quantize=quantize, prefix=f"{prefix}{part}.")
        fit(names[0], (norm(x.to(device)) for x in hidden))
        with _without(block.get_submodule(part), names[1]) as last:
            inner = [run(norm(x.to(device))).cpu() for x in hidden]
        fit(names[1], (y.to(device) for y in inner))
        for x, y in zip(hidden, inner, strict=True):
            x += last(y.to(device)).cpu()
    if experts:
        _calibrate_experts(block, experts, hidden, quantize, prefix=f"{prefix}mlp.")


def _calibrate_experts(
    block: Block, experts: Experts, hidden: list[Tensor], quantize: Quantize, *, prefix: str
) -> None:
    """The second half of a block whose MLP is experts; hidden as in `calibrate_block`."""
    norm, device = block.post_attention_layernorm, experts.router.weight.device
    gate_up, down = experts.gate_up_proj, experts.down_proj
    assert isinstance(gate_up, ExpertLinear), "experts are calibrated in float32"
    assert isinstance(down, ExpertLinear), "experts are calibrated in float32"

    def routed(expert: int) -> Iterator[Tensor]:
        for x in hidden:
            rows = norm(x.to(device)).flatten(0, 1)
            yield rows[(experts.router(rows).experts == expert).any(-1)]

    for index, weight in enumerate(gate_up.stack.unbind()):
        weight.copy_(_call(quantize, f"{prefix}gate_up_proj.weight", weight, routed(index)))
    for index, weight in enumerate(down.stack.unbind()):
        inner = (gated(F.linear(rows, gate_up.stack[index])) for rows in routed(index))
        weight.copy_(_call(quantize, f"{prefix}down_proj.weight", weight, inner))
    for x in hidden:
        x += experts(norm(x.to(device))).cpu()


def read_block(checkpoint: Checkpoint, index: int, *, input_norm: bool, device: Device) -> Block:
    """A decoder layer with its weights, float32."""
    prefix = f"layers.{index}."
    config = checkpoint.config
    assert not isinstance(config, MedusaConfig), "Medusa heads have no decoder layers"
    with torch.device("meta"):
        block = Block(config, input_norm=input_norm)
    state = {
        weight.name.removeprefix(prefix): read_parameter(checkpoint, weight, torch.float32)
        for weight in checkpoint.plan
        if weight.name.startswith(prefix)
    }
    block.load_state_dict(state, assign=True, strict=True)
    return block.to(device)


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module returns what its last Linear, which this gives, would have been called with."""
    last = module.get_submodule(name)
    setattr(module, name, nn.Identity())
    try:
        yield last
    finally:
        setattr(module, name, last)


def _fit(
    module: nn.Module, name: str, inputs: Iterable[Tensor], *, quantize: Quantize, prefix: str
) -> None:
    """Put what `quantize` makes of one Linear's weight for its inputs `[b, S, I]` in its place."""
    linear = module.get_submodule(name)
    assert isinstance(linear, Linear), f"{name} is a {type(linear).__name__}"
    linear.weight.data = _call(quantize, f"{prefix}{name}.weight", linear.weight.data, inputs)


def _call(quantize: Quantize, name: str, weight: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """What `quantize` returns for a weight `[O, I]` and its inputs, batches `[..., I]`."""
    hessian = weight.new_zeros(weight.shape[1], weight.shape[1])
    for batch in inputs:
        rows = batch.flatten(0, -2)
        hessian.addmm_(rows.T, rows)
    try:
        chosen = quantize(name, weight, hessian)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    assert chosen.shape == weight.shape, f"{name}: {chosen.shape} for {weight.shape}"
    return chosen


def _pairs(target: Transformer, table: Tensor, tokens: Tensor) -> Tensor:
    """An EAGLE-1 head's inputs `[b, S - 1, 2C]` float32 on the CPU for tokens `[b, S]`."""
    tokens = tokens.to(target.device)
    cache = target.new_cache(*tokens.shape)
    slots = torch.arange(tokens.shape[1], device=target.device).expand(len(tokens), -1)
    mask = causal_mask(slots, tokens.shape[1])
    _, features = target(tokens, slots, slots, mask, cache)
    embedded = table[tokens[:, 1:]]
    return torch.cat((embedded.float(), features[:, :-1].float()), -1).cpu()


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    """A parameter by our name, float32 on the CPU."""
    weight = next(weight for weight in checkpoint.plan if weight.name == name)
    return read_parameter(checkpoint, weight, torch.float32)


def _check(windows: Tensor, config: ModelConfig) -> None:
    context = config.attention_span
    if windows.shape[1] > context:
        raise ValueError(
            f"calibration windows have {windows.shape[1]} tokens; this model takes at most "
            f"{context}: cut shorter ones"
        )
    largest = int(windows.max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"the calibration text has token {largest}, the model a vocabulary of "
            f"{config.vocab_size}; give the checkpoint's own tokenizer"
        )
