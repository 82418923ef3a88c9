"""How much memory will a checkpoint take, before it is loaded?

The plan is the real engine, built on torch's meta device: shapes without memory. Only the
checkpoint's headers are read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from fasteagle import demo
from fasteagle.assemble import DTYPES, draft_dtype, draft_kind, draft_options, sizes_of
from fasteagle.checkpoint import check_pair
from fasteagle.commands.draft_flags import asked_of
from fasteagle.commands.layers import layer_lines
from fasteagle.config import DraftConfig, HeadConfig, MedusaConfig, ModelConfig
from fasteagle.draft.base import Drafter
from fasteagle.draft.choice import BY_NAME
from fasteagle.draft.kinds import DRAFTERS
from fasteagle.engine import Engine
from fasteagle.families import FAMILIES
from fasteagle.footprint import keeps_dense, loaded_bytes, scratch_bytes, smaller
from fasteagle.model import Transformer
from fasteagle.source import Checkpoint, open_checkpoint
from fasteagle.tokenizer_files import TOKENIZER_FILES
from fasteagle.weights import read_json


class Plan(NamedTuple):
    """A checkpoint and its head in words, their kernels, and the bytes that each part will take."""

    words: list[str]
    layers: list[str]
    n_bytes: dict[str, int]
    smaller: dict[str, int]  # what to do where the weights do not fit, and their bytes then
    itemsize: int  # bytes of a number in caches and activations; 2 with any of `smaller`

    @property
    def total(self) -> int:
        return sum(self.n_bytes.values())


def make_plan(args: argparse.Namespace, dtype: torch.dtype | None, device: torch.device) -> Plan:
    """The plan for the flags of `add_model` and --batch_size; dtype None is the checkpoint's."""
    path = demo.BASE if args.checkpoint_path is None else args.checkpoint_path
    checkpoint = open_checkpoint(path, revision=args.revision)
    config = checkpoint.config
    if not isinstance(config, ModelConfig):
        raise ValueError(  # noqa: TRY004
            f"{args.checkpoint_path} is {checkpoint.words}; give it as --draft_checkpoint_path, "
            "and its model as --checkpoint_path"
        )
    dtype = dtype or DTYPES[config.dtype]
    with torch.device("meta"):
        target = Transformer(config).to(dtype)
    keep = keeps_dense(checkpoint, device)
    plan = Plan(
        [f"model: {checkpoint.folder}", f"  {describe_target(checkpoint, config)}"],
        ["kernels of the model:", *layer_lines(checkpoint, dtype, device)],
        {"weights": loaded_bytes(checkpoint, dtype, device, keep_dense=keep)},
        smaller(checkpoint, dtype, device),
        dtype.itemsize,
    )
    head_path = args.draft_checkpoint_path
    if head_path is None and args.checkpoint_path is None:
        head_path = demo.HEAD
    drafter: Drafter | None = None
    if args.draft in BY_NAME:
        drafter = DRAFTERS[args.draft].drafter(None, target, sizes_of(asked_of(args)))
        plan.words.append(f"draft: {drafter.words}: {drafter.n_nodes} nodes with the root")
    elif head_path is not None:
        drafter = _plan_draft(plan, head_path, args, target, device)
    engine = Engine(target, drafter, batch=args.batch_size, max_length=args.max_length)
    more = ", more when a request needs it" if engine.room < engine.max_length else ""
    text = f"plan: {str(dtype)[6:]}, batch {engine.batch}, {engine.room} tokens a row{more}"
    plan.words.append(text)
    plan.n_bytes.update(state_bytes(engine))
    scratch = scratch_bytes(checkpoint, dtype, keep_dense=keep)
    if scratch:
        plan.n_bytes["a dequantized weight"] = scratch
    return plan


def _plan_draft(
    plan: Plan,
    path: str | Path,
    args: argparse.Namespace,
    target: Transformer,
    device: torch.device,
) -> Drafter:
    """Add a head or a draft model to a plan; returns its drafter, on the meta device."""
    opened = open_checkpoint(path)
    config, dtype, name = opened.config, target.dtype, "head"
    options = draft_options(path, opened, target, asked_of(args))
    if isinstance(config, ModelConfig):
        own = draft_dtype(path, opened, args.dtype, dtype, device)
        dtype = own or DTYPES[config.dtype]
        name, words = "draft", describe_target(opened, config)
    else:
        check_pair(path, config, target.config)
        words = describe_head(opened, config)
    kind = DRAFTERS[draft_kind(opened)]
    with torch.device("meta"):
        weights = kind.make(config).to(dtype)
    drafter = kind.drafter(weights, target, options)
    plan.words.extend([f"{name}: {opened.folder}", f"  {words}"])
    plan.words.append(f"  {drafter.words}: {drafter.n_nodes} nodes with the root")
    rows = _module_bytes(drafter.weights) - _module_bytes(weights)  # copied from the lm_head
    plan.n_bytes[f"{name} weights"] = (
        loaded_bytes(opened, dtype, device, keep_dense=keeps_dense(opened, device)) + rows
    )
    plan.layers.append(f"kernels of the {name}:")
    plan.layers.extend(layer_lines(opened, dtype, device))
    return drafter


def state_bytes(engine: Engine) -> dict[str, int]:
    """What an engine allocates besides weights: caches, buffers, and about what a step needs."""
    held = {"KV cache": engine.builder.cache, "the draft's memory": engine.builder.memory}
    sizes = {name: part.n_bytes for name, part in held.items() if part is not None}
    tensors = engine.state.tensors()
    sizes["buffers"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return sizes | {"a step (estimate)": step_bytes(engine)}


def step_bytes(engine: Engine) -> int:
    """About the most that one step holds at once: attention scores or logits, and activations.

    Sampling sorts the logits of a tree: values, ids, probabilities and their sums.
    """
    c, item = engine.target.config, engine.target.dtype.itemsize
    rows = engine.batch * max(engine.prefill_chunk, engine.drafter.n_nodes)
    scores = rows * c.n_heads * engine.n_slots * (4 + item)
    logits = engine.batch * engine.drafter.n_nodes * c.vocab_size * (item + 4 * 4 + 8)
    # At worst each row goes through every expert; without experts there is one MLP.
    inner = max(c.n_experts, 1) * (3 * c.intermediate_size + c.dim)
    activations = rows * (3 * c.dim + inner) * item
    return max(scores, logits) + activations


def describe_target(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """Family, size and files of a model."""
    tokenizers = [name for name in TOKENIZER_FILES if (checkpoint.folder / name).is_file()]
    family = FAMILIES[config.architecture].covers
    return (
        f"{config.architecture} ({family}), {shape_words(config)}, context {config.max_positions}"
        f"\n  {file_words(checkpoint)}; tokenizer: {', '.join(tokenizers) or 'none'}"
    )


def describe_head(checkpoint: Checkpoint, config: HeadConfig) -> str:
    """Size and files of a head."""
    own = shape = ""
    if isinstance(config, DraftConfig):
        own = "; own copy of the embedding" if config.own_embedding else ""
        shape = f", {shape_words(config)}"
    if isinstance(config, MedusaConfig):
        sizes = f"{config.n_layers} layers of {config.dim}, vocabulary {config.vocab_size}"
        shape = f", {config.n_heads} heads of {sizes}"
    return f"{checkpoint.words.removeprefix('an ')}{shape}\n  {file_words(checkpoint)}{own}"


def shape_words(config: ModelConfig | DraftConfig) -> str:
    """The shape of a model or head."""
    heads = f"{config.n_heads} heads ({config.n_kv_heads} KV)"
    words = f"{config.n_layers} layers of {config.dim}, {heads}, vocabulary {config.vocab_size}"
    if isinstance(config, ModelConfig) and config.n_experts:
        words += f", {config.n_experts} experts, {config.n_experts_per_token} a token"
    return words


def file_words(checkpoint: Checkpoint) -> str:
    """What kind of folder it is and how its weights are stored."""
    native = read_json(checkpoint.folder / "config.json").get("format") == "fasteagle"
    files = [Path(file).name for file in checkpoint.weights.files]
    shown = files[0] if len(files) == 1 else f"{len(files)} shards, {files[0]} ..."
    kind = "fasteagle" if native else "Hugging Face"
    packed = f"{checkpoint.packed.name} and " if checkpoint.packed else ""
    return f"{kind} folder, {shown}, stored as {packed}{checkpoint.config.dtype}"


def _module_bytes(module: torch.nn.Module | None) -> int:
    weights = module.parameters() if module else ()
    return sum(weight.numel() * weight.element_size() for weight in weights)
