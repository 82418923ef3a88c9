"""Which names do EAGLE's users already have in their scripts? The same calls on our engine.

    B batch  S prompt length with padding  n new tokens

    model = EagleModel.from_pretrained(base_model_path=base, ea_model_path=head)
    ids = model.tokenizer(["Hello"], return_tensors="pt").input_ids
    print(model.tokenizer.decode(model.eagenerate(ids, temperature=0.5, max_new_tokens=512)[0]))

What differs from the original: a stop or a limit cuts the output exactly, sampling follows the
processed distribution for the bonus token too, and rows of a batch may differ in length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasteagle.assemble import find_tokenizer, load_drafter, pick_device
from fasteagle.checkpoint import load_target, open_kind
from fasteagle.compat_tokenizer import CompatTokenizer, Ids
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Row
from fasteagle.sample import SamplingParams
from fasteagle.tokenizer import Tokenizer
from fasteagle.tree import DynamicTree, Tree, static_tree

MAX_ENGINES = 2  # each has caches of its own; EAGLE and plain decoding take turns in comparisons


class EagleModel:
    """A base model and its EAGLE head behind the method names of EAGLE's `EaModel`."""

    def __init__(
        self,
        target: Transformer,
        drafter: EagleDrafter,
        tokenizer: Tokenizer | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.target, self.drafter, self.compiled = target, drafter, compiled
        self.text_tokenizer = tokenizer
        self._engines: dict[tuple[int, Tree | None], Engine] = {}

    @classmethod
    def from_pretrained(
        cls,
        *,
        base_model_path: str | Path,
        ea_model_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device_map: str | None = None,
        tree: str | None = None,
        draft_vocab: str | None = None,
        compiled: bool = False,
        total_token: int = -1,
        depth: int = DynamicTree.depth,
        top_k: int = DynamicTree.top_k,
        threshold: float = 1.0,
        use_eagle3: bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> EagleModel:
        """Load a base and its head from folders or hub ids.

        The dtype is the checkpoint's unless given. device_map is "auto" or one device: there is no
        sharding. total_token asks for EAGLE-2's dynamic tree of so many nodes, depth and top_k; -1
        leaves the tree to us: `tree`, else the head's own, else mc_sim_7b_63. draft_vocab is a file
        of the tokens that may be guessed, by default the head's own. A head tells by itself
        whether it is an EAGLE-3 one: use_eagle3 only checks. threshold and low_cpu_mem_usage are
        accepted for old scripts' sake and change nothing.
        """
        del low_cpu_mem_usage, threshold
        if total_token != -1:
            if tree is not None:
                raise ValueError("total_token and tree both shape the draft tree; give one of them")
            tree = DynamicTree(total_token, depth, top_k).name
        device = pick_device(None if device_map == "auto" else device_map)
        open_kind(ea_model_path, "eagle", revision=None)  # before any weights are read
        target = load_target(base_model_path, dtype=torch_dtype or dtype, device=device)
        drafter = load_drafter(ea_model_path, target, tree=tree, draft_vocab=draft_vocab)
        if not isinstance(drafter, EagleDrafter) or use_eagle3 not in (
            None,
            drafter.name == "eagle3",
        ):
            wanted = "an EAGLE head" if use_eagle3 is None else f"use_eagle3={use_eagle3}"
            raise ValueError(f"{ea_model_path} holds {drafter.words}; expected {wanted}")
        tokenizer = find_tokenizer(base_model_path)
        return cls(target, drafter, tokenizer, compiled=compiled)

    @property
    def tokenizer(self) -> CompatTokenizer:
        if self.text_tokenizer is None:
            raise ValueError("the base's folder has no tokenizer file; give token ids instead")
        return CompatTokenizer(self.text_tokenizer)

    @property
    def device(self) -> torch.device:
        return self.target.device

    def eval(self) -> EagleModel:
        """Nothing to do: a loaded model is always in evaluation mode."""
        return self

    def eagenerate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        tree_choices: list[list[int]] | None = None,
        log: bool = False,
        **limits: Any,
    ) -> Any:
        """EAGLE decoding: `[B, S]` ids in, `[B, S + n]` out, rows that ended early padded with EOS.

        attention_mask `[B, S]` allows left-padded rows. limits: temperature, top_p, top_k (0 is
        off), max_new_tokens 512, max_length 2048 (prompt included), seed. With `log` the result is
        (ids, new tokens, index of the last round), counts being those of the longest row.
        """
        tree = static_tree(tree_choices, name="tree_choices") if tree_choices else self.drafter.tree
        return self._generate(input_ids, attention_mask, tree, log=log, limits=limits)

    def naivegenerate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        log: bool = False,
        **limits: Any,
    ) -> Any:
        """Plain decoding by the target alone; arguments and result as `eagenerate`."""
        return self._generate(input_ids, attention_mask, None, log=log, limits=limits)

    def ea_generate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        tree_choices: list[list[int]] | None = None,
        **limits: Any,
    ) -> Iterator[Tensor]:
        """EAGLE decoding that yields all ids so far, `[B, S + n]`, after every round."""
        tree = static_tree(tree_choices, name="tree_choices") if tree_choices else self.drafter.tree
        ids, engine, rows = self._begin(input_ids, attention_mask, tree, limits)
        for _ in engine.decode(rows):
            yield self._join(ids, rows)

    def _generate(
        self,
        input_ids: Ids,
        attention_mask: Ids | None,
        tree: Tree | None,
        *,
        log: bool,
        limits: dict[str, Any],
    ) -> Any:
        ids, engine, rows = self._begin(input_ids, attention_mask, tree, limits)
        for _ in engine.decode(rows):
            pass
        output = self._join(ids, rows)
        if not log:
            return output
        return output, output.shape[1] - ids.shape[1], max(row.stats.rounds for row in rows) - 1

    def _begin(
        self,
        input_ids: Ids,
        attention_mask: Ids | None,
        tree: Tree | None,
        limits: dict[str, Any],
    ) -> tuple[Tensor, Engine, list[Row]]:
        ids = torch.as_tensor(input_ids)
        prompts = unpad(ids, attention_mask)
        engine = self._engine(len(prompts), tree)
        n_tokens, sampling = read_limits(ids.shape[1], **limits)
        requests = [
            engine.request(prompt, max_new_tokens=n_tokens, sampling=sampling) for prompt in prompts
        ]
        return ids, engine, engine.rows(requests)

    def _engine(self, batch: int, tree: Tree | None) -> Engine:
        """The engine for a batch size and a tree (None: plain); only the latest are kept."""
        key = (batch, tree)
        if key not in self._engines:
            while len(self._engines) >= MAX_ENGINES:
                del self._engines[next(iter(self._engines))]  # the one used longest ago
            drafter = self._drafter(tree) if tree else None
            self._engines[key] = Engine(
                self.target,
                drafter,
                tokenizer=self.text_tokenizer,
                batch=batch,
                compiled=self.compiled,
            )
        self._engines[key] = self._engines.pop(key)
        return self._engines[key]

    def _drafter(self, tree: Tree) -> EagleDrafter:
        """The drafter on a tree; only another tree than its own makes another one."""
        if tree == self.drafter.tree:
            return self.drafter
        return type(self.drafter)(self.drafter.head, self.target, tree, self.drafter.vocab)

    def _join(self, ids: Tensor, rows: list[Row]) -> Tensor:
        width = max(len(row.tokens) for row in rows)
        eos = self.target.config.eos_ids
        pad = eos[0] if eos else 0
        new = [row.tokens + [pad] * (width - len(row.tokens)) for row in rows]
        return torch.cat((ids, torch.tensor(new, dtype=ids.dtype, device=ids.device)), 1)


def read_limits(
    prompt_length: int,
    *,
    temperature: float = 0.0,
    top_p: float = 0.0,
    top_k: float = 0,
    max_new_tokens: int = 512,
    max_length: int = 2048,
    seed: int | None = None,
    is_llama3: bool = False,
) -> tuple[int, SamplingParams]:
    """New tokens allowed and how to sample, from EAGLE's arguments, where 0 means off.

    is_llama3 is accepted for old scripts' sake: a checkpoint names its own stop tokens.
    """
    del is_llama3
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
    room = min(max_new_tokens, max_length - prompt_length)
    if room < 1:
        raise ValueError(
            f"max_length {max_length} leaves no room after a prompt of {prompt_length} tokens; "
            "raise it"
        )
    return room, SamplingParams(temperature, int(top_k), top_p or 1.0, seed)


def unpad(ids: Tensor, attention_mask: Ids | None) -> list[list[int]]:
    """Rows of `[B, S]` ids without their left padding; ValueError for any other mask."""
    if ids.dim() != 2 or not ids.shape[0] or ids.is_floating_point():
        found = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise ValueError(f"input_ids are {found}; expected whole numbers [batch, length]")
    if attention_mask is None:
        rows: list[list[int]] = ids.tolist()
        return rows
    mask = torch.as_tensor(attention_mask, device=ids.device).bool()
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}")
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask has a hole or right padding; pad prompts on the left")
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
