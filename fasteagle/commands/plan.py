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
from fasteagle.assemble import DTYPES, own_tree, pick_vocab
from fasteagle.checkpoint import check_pair, open_kind
from fasteagle.commands.layers import layer_lines, loaded_bytes, scratch_bytes
from fasteagle.config import DraftConfig, HeadConfig, ModelConfig
from fasteagle.draft.base import Drafter
from fasteagle.draft.choice import BY_NAME
from fasteagle.draft.kinds import DRAFTERS, Options
from fasteagle.engine import Engine
from fasteagle.families import FAMILIES
from fasteagle.model import Transformer
from fasteagle.source import Checkpoint, open_checkpoint
from fasteagle.tokenizer_files import TOKENIZER_FILES
from fasteagle.tree import parse_tree
from fasteagle.weights import read_json


class Plan(NamedTuple):
    """A checkpoint and its head in words, their kernels, and the bytes that each part will take."""

    words: list[str]
    layers: list[str]
    n_bytes: dict[str, int]

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
            f"{args.checkpoint_path} is an EAGLE head; give it as --draft_checkpoint_path, and "
            "its model as --checkpoint_path"
        )
    dtype = dtype or DTYPES[config.dtype]
    with torch.device("meta"):
        target = Transformer(config).to(dtype)
    plan = Plan(
        [f"model: {checkpoint.folder}", f"  {describe_target(checkpoint, config)}"],
        ["kernels of the model:", *layer_lines(checkpoint, dtype, device)],
        {"weights": loaded_bytes(checkpoint, dtype, device)},
    )
    head_path = args.draft_checkpoint_path
    if head_path is None and args.checkpoint_path is None:
        head_path = demo.HEAD
    drafter: Drafter | None = None
    options = Options(None, None, args.lookup or 0, args.ngram, args.window, args.guesses)
    if args.draft in BY_NAME:
        drafter = DRAFTERS[args.draft].drafter(None, target, options)
        plan.words.append(_draft_words(drafter))
    elif head_path is not None:
        drafter = _plan_head(plan, head_path, args, target, device)
    engine = Engine(target, drafter, batch=args.batch_size, max_length=args.max_length)
    more = ", more when a request needs it" if engine.room < engine.max_length else ""
    text = f"plan: {str(dtype)[6:]}, batch {engine.batch}, {engine.room} tokens a row{more}"
    plan.words.append(text)
    plan.n_bytes.update(state_bytes(engine))
    scratch = scratch_bytes(checkpoint, dtype, device)
    if scratch:
        plan.n_bytes["a dequantized weight"] = scratch
    return plan


def _plan_head(
    plan: Plan,
    path: str | Path,
    args: argparse.Namespace,
    target: Transformer,
    device: torch.device,
) -> Drafter:
    """Add a head to a plan; returns its drafter, on the meta device."""
    opened, config = open_kind(path, "head", revision=None), target.config
    assert not isinstance(opened.config, ModelConfig), "a head has a config of its own"
    check_pair(path, opened.config, config)
    tree = own_tree(path) if args.tree is None else parse_tree(args.tree)
    vocab = pick_vocab(path, args.draft_vocab, config.vocab_size)
    kind = DRAFTERS[opened.kind]
    with torch.device("meta"):
        head = kind.make(opened.config).to(target.dtype)
    options = Options(tree, vocab, args.lookup or 0, args.ngram)
    drafter = kind.drafter(head, target, options)
    plan.words.extend([f"head: {opened.folder}", f"  {describe_head(opened, opened.config)}"])
    plan.words.append(f"  {_draft_words(drafter)}")
    rows = _module_bytes(drafter.weights) - _module_bytes(head)  # copied from the lm_head
    plan.n_bytes["head weights"] = loaded_bytes(opened, target.dtype, device) + rows
    plan.layers.append("kernels of the head:")
    plan.layers.extend(layer_lines(opened, target.dtype, device))
    return drafter


def _draft_words(drafter: Drafter) -> str:
    return f"{drafter.words}: {drafter.n_nodes} nodes with the root"


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
    activations = rows * (4 * c.dim + 3 * c.intermediate_size) * item
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
    return f"{checkpoint.words.removeprefix('an ')}{shape}\n  {file_words(checkpoint)}{own}"


def shape_words(config: ModelConfig | DraftConfig) -> str:
    """The shape of a model or head."""
    heads = f"{config.n_heads} heads ({config.n_kv_heads} KV)"
    return f"{config.n_layers} layers of {config.dim}, {heads}, vocabulary {config.vocab_size}"


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
