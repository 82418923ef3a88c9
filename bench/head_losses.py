"""What does a head of each kind learn from, and how is it stored? For bench/train_heads.py.

    B batch  S tokens of a window  C model dim  F feature dim  V vocabulary  J steps ahead

Every loss is the cross-entropy between a head's distribution and the base's own, a step ahead each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasteagle.config import ModelConfig
from fasteagle.draft.eagle3 import Eagle3Head, feature_layers
from fasteagle.draft.kinds import eagle3_config, medusa_config
from fasteagle.draft.medusa import MedusaHeads
from fasteagle.draft.vocabulary import most_frequent
from fasteagle.families import layer_weights, target_weights
from fasteagle.model import Transformer, run_block
from fasteagle.tree import causal_mask

STEPS = 5  # J of EAGLE-3's training-time test
DRAFT_VOCAB = 1024
MEDUSA_HEADS = 4

Loss = tuple[Tensor, float]  # cross-entropy, share of right first guesses


class Batch(NamedTuple):
    tokens: Tensor  # [B, S]
    features: Tensor  # [B, S, F]
    logits: Tensor  # [B, S, V] the base's, of the token after each


class Grown:
    """A layer's keys and values as training wants them: appended, never overwritten."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        self.k.append(k.transpose(1, 2))
        self.v.append(v.transpose(1, 2))

    def read(self, n_slots: int) -> tuple[Tensor, Tensor]:
        k, v = torch.cat(self.k, 2), torch.cat(self.v, 2)
        assert k.shape[2] == n_slots, f"{k.shape[2]} keys for {n_slots} slots"
        return k, v


class GrownCache:
    def __init__(self, n_layers: int) -> None:
        self.layers = [Grown() for _ in range(n_layers)]


class Trained(NamedTuple):
    """A head before or after training: its module, the base's layers it reads, how to store it."""

    module: nn.Module
    layers: tuple[int, ...]
    save: Callable[[Path], None]


def cross_entropy(scores: Tensor, wanted: Tensor, keep: Tensor | None = None) -> Loss:
    """Of scores and the base's logits `[B, S, V]`; keep `[B, S]` are the positions that count."""
    lost = -(wanted.softmax(-1) * scores.log_softmax(-1)).sum(-1)
    right = (scores.argmax(-1) == wanted.argmax(-1)).float()
    if keep is None:
        return lost.mean(), float(right.mean())
    weight = keep.float() / keep.sum().clamp(min=1)
    return (lost * weight).sum(), float((right * weight).sum())


def eagle3_losses(head: Eagle3Head, batch: Batch) -> list[Loss]:
    """Training-time test (arXiv 2503.01840, section 3): step j feeds its own outputs, j ahead.

    Row i of step j has the token i + 1 + j and sees the rows up to i of step 0 and its own of the
    steps after; it is to predict the base's choice after that token.
    """
    n_rows = batch.tokens.shape[1] - STEPS - 1
    states = head.project(batch.features[:, :n_rows])
    cache, ids = GrownCache(head.config.n_layers), head.d2t + torch.arange(len(head.d2t))
    rows = torch.arange(n_rows)[None].expand(len(batch.tokens), -1)
    seen, own, losses = causal_mask(rows, n_rows), torch.eye(n_rows, dtype=torch.bool), []
    in_vocab = torch.zeros(batch.logits.shape[-1], dtype=torch.bool).scatter(0, ids, True)
    for step in range(STEPS):
        if step:
            seen = torch.cat((seen, own.expand(len(seen), -1, -1)), -1)
        following = batch.tokens[:, 1 + step : 1 + step + n_rows]
        embedded = head.embed_tokens(following)
        states = head(embedded, states, rows + step, rows, seen, cache, run=run_block)
        wanted = batch.logits[:, 1 + step : 1 + step + n_rows]
        assert head.lm_head is not None, "it has an lm_head of its own"
        scores = head.lm_head(head.scored(states))
        losses.append(cross_entropy(scores, wanted[..., ids], in_vocab[wanted.argmax(-1)]))
    return losses


def start_eagle3(target: Transformer, counts: Tensor) -> Trained:
    """A head of the base's shape, its guesses among the most frequent tokens `counts [V]`."""
    shape = eagle3_config(target.config)
    config = replace(shape, draft_vocab_size=DRAFT_VOCAB, own_embedding=True)
    head = initialize(Eagle3Head(config))
    ids = most_frequent(counts, DRAFT_VOCAB)
    head.d2t.copy_(ids - torch.arange(DRAFT_VOCAB))
    head.embed_tokens.weight.requires_grad_(False).copy_(target.embed_tokens.table)
    with torch.no_grad():
        assert head.lm_head is not None, "it has an lm_head of its own"
        head.lm_head.weight.copy_(target.embed_tokens.table[ids])
    layers = feature_layers(config, target.config.n_layers)

    def save(folder: Path) -> None:
        tensors = {n: t for n, t in head.state_dict().items() if n != "embed_tokens.weight"}
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
        t2d[head.d2t + torch.arange(DRAFT_VOCAB)] = True
        stated = stated_shape(target.config) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": DRAFT_VOCAB,
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "tie_word_embeddings": False,
        }
        write(folder, official_eagle3(tensors, head) | {"t2d": t2d}, stated)

    return Trained(head, layers, save)


def official_eagle3(tensors: dict[str, Tensor], head: Eagle3Head) -> dict[str, Tensor]:
    """A head's parameters under the names of EAGLE's checkpoints, unstacked."""
    named = dict(tensors)
    for weight in layer_weights(
        head.config, "layers.0.", prefix="", input_norm=True, in_dim=2 * head.config.dim
    ):
        parts = named.pop(weight.name).split([shape[0] for shape in weight.shapes])
        named |= dict(zip(weight.sources, parts, strict=True))
    return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in named.items()}


def medusa_losses(heads: MedusaHeads, batch: Batch) -> list[Loss]:
    """Head h on the feature of token i is to predict the base's choice of token i + 2 + h."""
    n_rows, losses = batch.tokens.shape[1] - len(heads.heads), []
    for ahead, head in enumerate(heads.heads, 1):
        scores = head(batch.features[:, :n_rows])
        losses.append(cross_entropy(scores, batch.logits[:, ahead : ahead + n_rows]))
    return losses


def start_medusa(target: Transformer, counts: Tensor) -> Trained:  # noqa: ARG001
    """Heads that begin as the base's own lm_head, as Medusa's training has it."""
    config = replace(medusa_config(target.config), n_heads=MEDUSA_HEADS)
    heads = initialize(MedusaHeads(config))
    with torch.no_grad():
        for head in heads.heads:
            head.lm_head.weight.copy_(target.embed_tokens.table)
            for layer in head.layers:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def save(folder: Path) -> None:
        tensors = {}
        for index, head in enumerate(heads.heads):
            for depth, layer in enumerate(head.layers):
                tensors[f"{index}.{depth}.linear.weight"] = layer.weight
                tensors[f"{index}.{depth}.linear.bias"] = layer.bias
            tensors[f"{index}.{config.n_layers}.weight"] = head.lm_head.weight
        stated = {
            "medusa_num_heads": config.n_heads,
            "medusa_num_layers": config.n_layers,
            "hidden_size": config.dim,
            "vocab_size": config.vocab_size,
            "torch_dtype": "float16",
        }
        write(folder, tensors, stated)

    return Trained(heads, (), save)


def standalone_losses(model: Transformer, batch: Batch) -> list[Loss]:
    """A smaller model is to predict the base's choice after every token."""
    slots = torch.arange(batch.tokens.shape[1])[None].expand(len(batch.tokens), -1)
    cache, mask = GrownCache(model.config.n_layers), causal_mask(slots, slots.shape[1])
    hidden, _ = model(batch.tokens, slots, slots, mask, cache)
    return [cross_entropy(model.logits(hidden), batch.logits)]


def start_standalone(target: Transformer, counts: Tensor) -> Trained:  # noqa: ARG001
    """The base's embedding, first layer and final norm, to be trained on."""
    config = replace(target.config, n_layers=1)
    model = Transformer(config).float().train()
    own = target.state_dict()
    model.load_state_dict({name: own[name] for name in model.state_dict()})

    def save(folder: Path) -> None:
        tensors, state = {}, model.state_dict()
        for weight in target_weights(config):
            parts = state[weight.name].split([shape[0] for shape in weight.shapes])
            tensors |= dict(zip(weight.sources, parts, strict=True))
        stated = stated_shape(config) | {
            "architectures": [config.architecture],
            "tie_word_embeddings": True,
            "bos_token_id": config.bos_id,
            "eos_token_id": list(config.eos_ids),
        }
        write(folder, tensors, stated)

    return Trained(model, (), save)


def initialize(module: Any) -> Any:
    """Normal weights of a standard deviation of 1 / sqrt(inputs), norms 1, biases 0."""
    for weight in module.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
    return module.float().train()


def stated_shape(config: ModelConfig) -> dict[str, Any]:
    """The fields of a head's config.json that repeat its base's shape."""
    return {
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
        "torch_dtype": "float16",
    }


def write(folder: Path, tensors: dict[str, Tensor], stated: dict[str, Any]) -> None:
    """model.safetensors in float16 and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in halves.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(stated, indent=1) + "\n")


STARTS: dict[str, Callable[[Transformer, Tensor], Trained]] = {
    "eagle3": start_eagle3,
    "medusa": start_medusa,
    "standalone": start_standalone,
}
LOSSES: dict[str, Callable[[Any, Batch], list[Loss]]] = {
    "eagle3": eagle3_losses,
    "medusa": medusa_losses,
    "standalone": standalone_losses,
}


def start(kind: str, target: Transformer, counts: Tensor) -> Trained:
    """A head to train; counts `[V]` say how frequent tokens are."""
    return STARTS[kind](target, counts)
