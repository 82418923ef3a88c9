"""What do the tests share? Tiny random models, slow twins, every drafter, and the command line.

B batch  S new tokens  C model dim  V vocabulary
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hf_folders import everything
from hypothesis import strategies as st
from scripted_drafters import VOCAB, OracleDrafter, RandomDrafter
from tokenizer_folders import write_tokenizers
from torch import Tensor

from fasteagle import load
from fasteagle.checkpoint import load_head, load_target
from fasteagle.commands.main import main
from fasteagle.config import DraftConfig, ModelConfig
from fasteagle.draft.base import Drafter
from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.draft.kinds import DRAFTERS as KINDS
from fasteagle.draft.kinds import Options
from fasteagle.engine import Engine
from fasteagle.model import Transformer
from fasteagle.request import Generation, Request
from fasteagle.sample import Knobs, SamplingParams, distribution, new_knobs
from fasteagle.tree import MC_SIM_7B_63, DynamicTree, Tree, causal_mask, chain, static_tree

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
Module = TypeVar("Module", bound=torch.nn.Module)
CPU = torch.device("cpu")
MC_SIM = static_tree(MC_SIM_7B_63)
BUSHY = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


# ------------------------------------------------------------------------------------ models


@cache
def tiny_target(seed: int = 0, **changes: object) -> Transformer:
    """A random float32 target whose greedy text wanders; one instance for equal arguments."""
    config = ModelConfig(
        "LlamaForCausalLM",
        vocab_size=VOCAB,
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_positions=192,
    )
    return randomize(Transformer(replace(config, **changes)), seed)


@cache
def tiny_head(target: Transformer, seed: int = 1, **changes: object) -> EagleHead:
    """A random head of the target's shape."""
    c = target.config
    config = DraftConfig(
        "eagle",
        vocab_size=c.vocab_size,
        dim=c.dim,
        n_layers=1,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=48,
    )
    return randomize(EagleHead(replace(config, **changes)), seed).to(target.device)


def randomize(module: Module, seed: int) -> Module:
    """Strong attention and weak embeddings, so that the text depends on all that came before."""
    gains = {"embed": 0.1, "attn": 3.0, "mlp": 1.0}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data.copy_(1 + 0.2 * noise)
        else:
            gain = next((g for part, g in gains.items() if part in name), 1.5)
            weight.data.copy_(noise * (gain / weight.shape[-1] ** 0.5))
    return module.eval().requires_grad_(False)


def eagle(target: Transformer, tree: Tree = MC_SIM, **changes: object) -> EagleDrafter:
    return EagleDrafter(tiny_head(target, **changes), target, tree)


@st.composite
def tree_choices(draw: st.DrawFn, max_nodes: int = 14, max_rank: int = 3) -> list[list[int]]:
    """JSON paths of a random valid tree, in any order; ranks may have gaps."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, max_nodes))):
        path = (*draw(st.sampled_from(paths)), draw(st.integers(0, max_rank)))
        if path not in paths:
            paths.append(path)
    return draw(st.permutations([list(path) for path in paths[1:]]))


@pytest.fixture(scope="session")
def golden_pair() -> tuple[Transformer, EagleHead]:
    target = load_target(GOLDEN / "byte_pair" / "base", dtype=torch.float32)
    return target, load_head(GOLDEN / "byte_pair" / "eagle1", target)


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(vocab) for _ in range(length)]


# ------------------------------------------------------------------------------------ running


def full_pass(target: Transformer, tokens: Sequence[int]) -> Tensor:
    """Hidden states `[1, S, C]` of a whole sequence in one pass on a fresh cache."""
    slots = torch.arange(len(tokens), device=target.device)[None]
    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.inference_mode():
        kv = target.new_cache(1, len(tokens))
        return target(ids, slots, slots, causal_mask(slots, len(tokens)), kv)[0]


def first_gaps(
    target: Transformer, prompts: list[list[int]], texts: list[list[list[int]]]
) -> list[float]:
    """For every prompt whose two texts differ: the gap of the two best logits where they part."""
    gaps = []
    for tokens, one, other in zip(prompts, *texts, strict=True):
        assert len(one) == len(other)
        parts = [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if parts:
            hidden = full_pass(target, [*tokens, *one[: parts[0]]])[0, -1]
            best = target.logits(hidden).float().topk(2).values
            gaps.append(float(best[0] - best[1]))
    return gaps


@cache
def _plain(target: Transformer, tokens: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    sequence = list(tokens)
    for _ in range(n_tokens):
        sequence.append(int(target.logits(full_pass(target, sequence)[0, -1]).argmax()))
    return tuple(sequence[len(tokens) :])


def plain_decode(target: Transformer, tokens: Sequence[int], n_tokens: int) -> list[int]:
    """The slow twin: greedy decoding that computes the whole sequence again for every token."""
    return list(_plain(target, tuple(tokens), n_tokens))


def decode(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Requests of any mix of limits and sampling, as one batch."""
    rows = engine.rows(requests)
    for _ in engine.decode(rows):
        pass
    return [row.result() for row in rows]


def tokens_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def seeded(engine: Engine, seeds: Sequence[int], tokens: Sequence[int], **sampling: float) -> list:
    """One request a seed for the same prompt, with 3 new tokens unless told otherwise."""
    limit = int(sampling.pop("max_new_tokens", 3))
    return [
        engine.request(
            tokens,
            max_new_tokens=limit,
            sampling=SamplingParams(seed=seed, **sampling),
            stop_ids=[],
        )
        for seed in seeds
    ]


SAMPLED = SamplingParams(temperature=0.9, top_k=6, top_p=0.9, seed=3)
SAMPLINGS = {
    "hot": {"temperature": 1.0},
    "top_k": {"temperature": 0.7, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
}


def knobs_of(n_slots: int = 8, **sampling: float) -> Knobs:
    knobs = new_knobs(1, n_slots, CPU)
    knobs.load(0, SamplingParams(seed=0, **sampling))
    return knobs


def processed(logits: Tensor, **sampling: float) -> Tensor:
    """Probabilities `[V]` in token order."""
    probs, ids = distribution(logits[None, None], knobs_of(**sampling))
    return torch.zeros_like(logits).scatter(0, ids[0, 0], probs[0, 0])


# ----------------------------------------------------------------------------------- drafters


MakeDrafter = Callable[[Transformer, list[list[int]]], Drafter]


@cache
def tiny_weights(kind: str, target: Transformer) -> torch.nn.Module | None:
    """Random weights of a row of KINDS for a target."""
    row = KINDS[kind]
    if row.module is None or row.config is None:
        return None
    return randomize(row.module(row.config(target.config)), 1).to(target.device)


def tiny_drafter(kind: str, target: Transformer, **options: object) -> Drafter:
    """A drafter of a row of KINDS."""
    return KINDS[kind].build(tiny_weights(kind, target), target, Options(**options))


# Options of kinds whose usual trees are deeper than the rooms of these tests.
SMALL: dict[str, dict[str, object]] = {
    "lookup": {"lookup": 5},
    "lookahead": {"window": 3, "ngram": 4, "guesses": 3},
    "hybrid": {"tree": BUSHY, "lookup": 3},
}


def of_kind(kind: str) -> MakeDrafter:
    return lambda target, truth: tiny_drafter(kind, target, **SMALL.get(kind, {}))


SCRIPTED: dict[str, MakeDrafter] = {
    "random": lambda target, truth: RandomDrafter(12, 5, target.config.vocab_size),
    "oracle": lambda target, truth: OracleDrafter(truth),
    "always_wrong": lambda target, truth: OracleDrafter(truth, fails=lambda rng: 1),
    "wrong_once": lambda target, truth: OracleDrafter(truth, fails=lambda rng: rng.randint(1, 6)),
    "decoys": lambda target, truth: OracleDrafter(
        truth, width=3, fails=lambda rng: rng.randint(1, 6)
    ),
}
VARIANTS: dict[str, MakeDrafter] = {
    "eagle_chain": lambda target, truth: eagle(target, chain(3)),
    "eagle_pruned": lambda target, truth: EagleDrafter(
        tiny_head(target), target, MC_SIM, torch.arange(0, target.config.vocab_size, 2)
    ),
    "eagle_dynamic": lambda target, truth: eagle(target, DynamicTree(12, 3, 4)),
    "eagle3_dynamic": lambda target, truth: tiny_drafter(
        "eagle3", target, tree=DynamicTree(12, 3, 4)
    ),
    "medusa_dynamic": lambda target, truth: tiny_drafter(
        "medusa", target, tree=DynamicTree(12, 3, 4)
    ),
    "standalone_bushy": lambda target, truth: tiny_drafter("standalone", target, tree=BUSHY),
    "standalone_dynamic": lambda target, truth: tiny_drafter(
        "standalone", target, tree=DynamicTree(12, 3, 4)
    ),
    "lookahead_least": lambda target, truth: tiny_drafter(
        "lookahead", target, window=1, ngram=2, guesses=1
    ),
    "hybrid_dynamic": lambda target, truth: tiny_drafter(
        "hybrid", target, tree=DynamicTree(12, 3, 4), lookup=2
    ),
}
# Every kind of drafter for a target and the true texts; contract tests run over all of them.
DRAFTERS = {kind: of_kind(kind) for kind in KINDS} | VARIANTS | SCRIPTED
# For the laws of compiled steps.
DRAFTS: dict[str, Callable[[Transformer], Drafter | None]] = {
    kind: lambda target, kind=kind: tiny_drafter(kind, target) for kind in KINDS
} | {
    "eagle": lambda target: eagle(target, BUSHY),
    "eagle3": lambda target: tiny_drafter("eagle3", target, tree=BUSHY),
    "eagle_dynamic": lambda target: eagle(target, DynamicTree(6, 2, 2)),
    "experts": lambda target: None,
    "medusa": lambda target: tiny_drafter("medusa", target, tree=DynamicTree(6, 2, 2)),
    "standalone": lambda target: tiny_drafter("standalone", target, tree=chain(2)),
    "lookup": lambda target: tiny_drafter("lookup", target, lookup=4),
    "lookahead": lambda target: tiny_drafter("lookahead", target, window=2, ngram=3, guesses=2),
    "hybrid": lambda target: tiny_drafter("hybrid", target, tree=chain(2), lookup=2),
}
EXPERTS = {"n_experts": 4, "n_experts_per_token": 2}


def short_engine(kind: str, *, compiled: bool, batch: int = 1, **changes: object) -> Engine:
    """An engine with little room, so that few cache buckets hold all there can be."""
    changes |= {**EXPERTS, "n_layers": 1} if kind == "experts" else {}
    target = tiny_target(max_positions=48, **changes)
    sizes = {"batch": batch, "prefill_chunk": 8}
    return Engine(target, DRAFTS[kind](target), compiled=compiled, **sizes)


# ------------------------------------------------------------------------------------ commands

Run = Callable[..., tuple[str, str]]
Refused = Callable[..., None]


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The embedded pair; tests leave it as it is."""
    return load(dtype="float32", device="cpu")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line with `typed` on stdin; gives its stdout and stderr."""

    def call(*argv: str | Path, typed: str = "", status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main([str(part) for part in argv]) == status
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command line in an empty folder; it must fail, name `words` and change no file."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str | Path, words: str) -> None:
        before = everything(tmp_path)
        status = main([str(part) for part in argv])
        out, error = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert len(error.splitlines()) == 1, error
        assert error.startswith("error: ")
        assert words in error
        assert everything(tmp_path) == before

    return call


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder of every kind."""
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
