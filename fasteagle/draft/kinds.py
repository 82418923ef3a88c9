"""Which drafters are there? To add one, write its file and add a row to DRAFTERS.

The contract tests run over the table: a row is its own test case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fasteagle.config import AnyConfig, DraftConfig, Eagle3Config, MedusaConfig, ModelConfig
from fasteagle.draft.base import Drafter
from fasteagle.draft.eagle import EagleDrafter, EagleHead
from fasteagle.draft.eagle3 import Eagle3Drafter, Eagle3Head
from fasteagle.draft.hybrid import HybridDrafter
from fasteagle.draft.lookahead import GUESSES, WINDOW, LookaheadDrafter
from fasteagle.draft.lookahead import NGRAM as LOOKAHEAD_NGRAM
from fasteagle.draft.lookup import LOOKUP, NGRAM, LookupDrafter
from fasteagle.draft.medusa import MedusaDrafter, MedusaHeads
from fasteagle.draft.none import NoDrafter
from fasteagle.draft.standalone import StandaloneDrafter
from fasteagle.model import Transformer
from fasteagle.tree import MC_SIM_7B_63, Tree, static_tree


@dataclass(frozen=True)
class Options:
    """What a user may ask of a drafter; None is the drafter's own choice."""

    tree: Tree | None = None
    vocab: Tensor | None = None  # [K] the only tokens to guess
    lookup: int = 0  # tokens guessed by prompt lookup; 0 below a head's tree: none
    ngram: int | None = None  # tokens that lookup compares at most; length of Lookahead's n-grams
    window: int | None = None  # columns of Lookahead's window
    guesses: int | None = None  # n-grams that Lookahead tries a round


@dataclass(frozen=True)
class Kind:
    """A kind of drafter.

    build makes one of its weights (None if it has none), the target and options; ValueError for
    options that it cannot follow. config is that of usual weights for a target of a shape, where
    training begins; module makes weights of a config. lookup is how many tokens prompt lookup
    guesses beside the weights when nobody says.
    """

    words: str
    build: Callable[[Any, Transformer, Options], Drafter]
    module: Callable[[Any], nn.Module] | None = None
    config: Callable[[ModelConfig], AnyConfig] | None = None
    lookup: int = 0

    def make(self, config: AnyConfig) -> nn.Module:
        """Weights of a config, not filled."""
        assert self.module is not None, f"{self.words} has no weights"
        return self.module(config)

    def drafter(self, weights: Any, target: Transformer, options: Options) -> Drafter:
        """What `build` makes; where it has weights, with prompt lookup if the options want it."""
        drafter = self.build(weights, target, options)
        n_guesses = options.lookup or self.lookup
        if self.module is None or not n_guesses:
            return drafter
        ngram = _given(options.ngram, NGRAM)
        return HybridDrafter(drafter, target.device, n_guesses=n_guesses, ngram=ngram)


def default_tree() -> Tree:
    """EAGLE-1's, for every EAGLE head that does not bring its own."""
    return static_tree(MC_SIM_7B_63)


def _eagle(head: EagleHead, target: Transformer, options: Options) -> Drafter:
    return EagleDrafter(head, target, options.tree or default_tree(), options.vocab)


def _eagle3(head: Eagle3Head, target: Transformer, options: Options) -> Drafter:
    return Eagle3Drafter(head, target, options.tree or default_tree(), options.vocab)


def _medusa(weights: MedusaHeads, target: Transformer, options: Options) -> Drafter:
    if options.vocab is not None:
        raise ValueError(
            "Medusa heads guess among all tokens; drop --draft_vocab, or give none to pass over "
            "a draft_vocab.json beside them"
        )
    return MedusaDrafter(weights, target, options.tree)


def _standalone(model: Transformer, target: Transformer, options: Options) -> Drafter:
    if options.vocab is not None:
        raise ValueError(
            "a draft model guesses among all its tokens; drop --draft_vocab, or give none to pass "
            "over a draft_vocab.json beside it"
        )
    return StandaloneDrafter(model, target, options.tree)


def _lookup(_: None, target: Transformer, options: Options) -> Drafter:
    return LookupDrafter(
        target.device, n_guesses=options.lookup or LOOKUP, ngram=_given(options.ngram, NGRAM)
    )


def _lookahead(_: None, target: Transformer, options: Options) -> Drafter:
    return LookaheadDrafter(
        target.device,
        window=_given(options.window, WINDOW),
        ngram=_given(options.ngram, LOOKAHEAD_NGRAM),
        guesses=_given(options.guesses, GUESSES),
    )


def _given(number: int | None, default: int) -> int:
    return default if number is None else number


def eagle_config(target: ModelConfig) -> DraftConfig:
    """An EAGLE-1 head of the target's own shape."""
    return DraftConfig(kind="eagle", **_shape(target))


def eagle3_config(target: ModelConfig) -> Eagle3Config:
    """An EAGLE-3 head of the target's own shape, with a quarter of its vocabulary."""
    last = target.n_layers
    layers = () if last > 5 else tuple(sorted({min(1, last), (last + 1) // 2, last}))
    return Eagle3Config(
        kind="eagle3",
        **_shape(target),
        fc_bias=False,
        target_dim=target.dim,
        feature_layers=layers,
        n_features=len(layers) or 3,
        draft_vocab_size=max(1, target.vocab_size // 4),
        maps_vocab=target.vocab_size > 1,
    )


def medusa_config(target: ModelConfig) -> MedusaConfig:
    """Five heads of one layer, as Medusa has them for vicuna-7b."""
    return MedusaConfig(
        kind="medusa",
        vocab_size=target.vocab_size,
        dim=target.dim,
        n_heads=5,
        n_layers=1,
        dtype=target.dtype,
    )


def standalone_config(target: ModelConfig) -> ModelConfig:
    """A model of half the target's layers."""
    return replace(target, n_layers=max(1, target.n_layers // 2))


def _shape(target: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": target.vocab_size,
        "dim": target.dim,
        "n_layers": 1,
        "n_heads": target.n_heads,
        "n_kv_heads": target.n_kv_heads,
        "head_dim": target.head_dim,
        "intermediate_size": target.intermediate_size,
        "max_positions": target.max_positions,
        "norm_eps": target.norm_eps,
        "rope_theta": target.rope_theta,
        "dtype": target.dtype,
    }


DRAFTERS: dict[str, Kind] = {
    "none": Kind("no draft", lambda *_: NoDrafter()),
    "eagle": Kind("EAGLE head", _eagle, EagleHead, eagle_config),
    "eagle3": Kind("EAGLE-3 head", _eagle3, Eagle3Head, eagle3_config),
    "medusa": Kind("Medusa heads", _medusa, MedusaHeads, medusa_config),
    "standalone": Kind("draft model", _standalone, Transformer, standalone_config),
    "lookup": Kind("prompt lookup", _lookup),
    "lookahead": Kind("Lookahead", _lookahead),
    # No file holds one: it is an EAGLE head with the option `lookup`.
    "hybrid": Kind("EAGLE head with prompt lookup", _eagle, EagleHead, eagle_config, LOOKUP),
}
