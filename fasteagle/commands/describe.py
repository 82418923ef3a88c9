"""What is an engine, in words? Architecture, precision, draft tree and vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from fasteagle.engine import Engine
from fasteagle.families import target_weights
from fasteagle.quant.experts import QuantExperts
from fasteagle.quant.linear import QuantLinear
from fasteagle.tree import MC_SIM_7B_63, StaticTree, chain, static_tree


def describe(engine: Engine) -> str:
    """An engine in words: architecture, size, dtype, device, draft tree and vocabulary."""
    target = engine.target
    n_parameters = sum(torch.Size(w.shape).numel() for w in target_weights(target.config))
    kinds = QuantLinear | QuantExperts
    bits = {part.bits for part in target.modules() if isinstance(part, kinds)}
    stored = "".join(f"int{number} and " for number in sorted(bits))
    dtype = stored + str(target.dtype).removeprefix("torch.")
    model = f"{target.config.architecture} ({n_parameters / 1e6:,.1f}M, {dtype}, {target.device})"
    tree = engine_tree(engine)
    if tree is None:
        return f"{model}, no draft"
    head = f"{model}, EAGLE head, tree {tree_name(tree)}"
    vocab = getattr(engine.drafter, "vocab", None)
    return head if vocab is None else f"{head}, {vocab_words(vocab, target.config.vocab_size)}"


def vocab_words(vocab: Tensor, vocab_size: int) -> str:
    """A draft vocabulary `[K]` in words."""
    return f"draft vocabulary {len(vocab)} of {vocab_size}"


def engine_tree(engine: Engine) -> StaticTree | None:
    """The static tree of an engine's drafter, if it has one."""
    tree = getattr(engine.drafter, "tree", None)
    return tree if isinstance(tree, StaticTree) else None


def tree_name(tree: StaticTree) -> str:
    """What --tree calls a tree; its number of nodes where it has no name."""
    if tree == static_tree(MC_SIM_7B_63):
        return "mc_sim_7b_63"
    if tree == chain(tree.n_nodes - 1):
        return f"chain-{tree.n_nodes - 1}"
    return f"of {tree.n_nodes} nodes"
