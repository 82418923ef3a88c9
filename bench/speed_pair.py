"""Which pair does bench/speed.py measure, on which prompts? Random weights, or those of folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import refuse
from bench.random_pair import SIZES, Pair, Weight, random_pair, weigh
from bench.simulated import SimulatedDrafter
from bench.steps import DTYPES, round_to_bits
from fasteagle.draft.eagle import EagleDrafter
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.tree import parse_tree

# dtype, and bits that every matrix is rounded to where those are fewer
PRECISIONS: dict[str, tuple[str, int | None]] = {
    **{name: (name, None) for name in DTYPES},
    "int8": ("bfloat16", 8),
    "int4": ("bfloat16", 4),
}
ROOM = 2048  # tokens in the caches of random weights, as for a chat
EMBEDDED = "demo"  # of the sizes, the one with trained weights


class Subject(NamedTuple):
    """Two engines over one target, and what a pass of each reads."""

    engines: dict[str, Engine]  # plain, eagle
    weight: Weight

    @property
    def simulated(self) -> SimulatedDrafter | None:
        """EAGLE's drafter, where its acceptance is simulated."""
        drafter = self.engines["eagle"].drafter
        return drafter if isinstance(drafter, SimulatedDrafter) else None


def make(precision: str, args: argparse.Namespace) -> Subject:
    """Plain and EAGLE engines in a precision; ends the program for a pair that cannot be."""
    random = args.base is None
    try:
        pair, drafter = (random_parts if random else stored_parts)(precision, args)
    except (ValueError, OSError) as error:
        refuse(str(error))
    target, drafts = pair.target, drafter
    if args.accept:
        size, device = target.config.vocab_size, target.device
        drafts = SimulatedDrafter(drafter, args.accept, vocab_size=size, device=device)
    longest = max(args.context + args.max_new_tokens + drafter.n_path, *args.prompt_lengths) + 1
    limit = max(ROOM, longest) if random else None
    sizes: dict[str, Any] = {"max_length": limit, "compiled": args.compile}
    engines = {"plain": Engine(target, **sizes), "eagle": Engine(target, drafts, **sizes)}
    if engines["plain"].max_length < longest:
        refuse(
            f"prompts and output need {longest} tokens, but the base has "
            f"{engines['plain'].max_length}; lower --context, --max_new_tokens or --prompt_lengths"
        )
    # After the engines: a compiled CPU engine stores float32 in 16 bits where it can.
    return Subject(engines, weigh(pair, drafter.draft_lm_head))


def random_parts(precision: str, args: argparse.Namespace) -> tuple[Pair, EagleDrafter]:
    """A pair of a named size with random weights, and its drafter."""
    dtype, bits = PRECISIONS[precision]
    pair = random_pair(args.size, dtype=DTYPES[dtype], device=args.device)
    if bits:
        for model in pair:
            round_to_bits(model, bits, args.groupsize, args.device)
    kept = None
    if args.draft_vocab:
        count, size = args.draft_vocab, SIZES[args.size].vocab_size
        if not count.isdecimal() or not 0 < int(count) <= size:
            refuse(f"--draft_vocab {count}; random weights take a number of tokens, 1 to {size}")
        kept = torch.arange(int(count))
    return pair, EagleDrafter(pair.head, pair.target, parse_tree(args.tree), kept)


def stored_parts(precision: str, args: argparse.Namespace) -> tuple[Pair, EagleDrafter]:
    """The pair of --base and --head, and its drafter."""
    from fasteagle.assemble import load, load_drafter  # random weights need torch alone

    dtype, bits = PRECISIONS[precision]
    target: Transformer = load(args.base, "none", dtype=dtype, device=str(args.device)).target
    if bits:
        round_to_bits(target, bits, args.groupsize, args.device)
    drafter = load_drafter(args.head, target, tree=args.tree, draft_vocab=args.draft_vocab)
    if not isinstance(drafter, EagleDrafter):
        refuse(f"--head {args.head} is a {drafter.name} draft; give an EAGLE head")
    if bits:
        round_to_bits(drafter.head, bits, args.groupsize, args.device)
    return Pair(target, drafter.head), drafter  # type: ignore[arg-type]


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Random tokens for random weights, else windows of source text, `--context` tokens each."""
    if args.base is None:
        size = SIZES[args.size].vocab_size
        return [random_prompt(size, args.context, seed) for seed in range(args.prompts)]
    from bench.demo_pair import MODULES, windows  # random weights need torch alone
    from bench.peers import encoder

    if args.prompts > len(MODULES):
        refuse(f"--prompts {args.prompts}; there are {len(MODULES)} texts")
    found = windows(encoder(args.base, args.max_new_tokens), args.prompts, n_tokens=args.context)
    if short := [len(prompt) for prompt in found if len(prompt) < args.context]:
        refuse(f"--context {args.context}; a text has only {min(short)} tokens, ask for fewer")
    return found


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """`length` token ids."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
