"""What shapes and constants does a model have? Frozen dataclasses.

Nothing here reads a file: families.py turns a Hugging Face config into these, checkpoint.py does
the reading and writing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

Config = TypeVar("Config", bound="ModelConfig | DraftConfig | MedusaConfig")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context.

    kind is "linear" (Position Interpolation, arXiv 2306.15595), "llama3" (the Llama 3.1 rule) or
    "yarn" (arXiv 2309.00071, section 3). Fields that a kind does not use keep their defaults.
    """

    kind: str
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only target model of the LLaMA family."""

    architecture: str  # the Hugging Face class name, a row of families.FAMILIES
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    n_experts: int = 0  # of each layer's MLP; 0 is a dense one
    n_experts_per_token: int = 0
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "float16"  # of the stored weights

    @property
    def attention_span(self) -> int:
        """The most tokens that one pass is right for: the context, or a shorter sliding window."""
        return min(self.max_positions, self.sliding_window or self.max_positions)


@dataclass(frozen=True)
class DraftConfig:
    """An EAGLE-1 head: fc over [embedding ; feature], then decoder layers without a final norm."""

    kind: str  # "eagle"
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    fc_bias: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    own_embedding: bool = False  # the file holds embed_tokens that differs from the target's
    dtype: str = "float16"


@dataclass(frozen=True)
class Eagle3Config(DraftConfig):
    """An EAGLE-3 head (arXiv 2503.01840, section 3), or an EAGLE-3.1 one (arXiv 2605.09992)."""

    target_dim: int = 0  # width of the target's hidden states
    feature_layers: tuple[int, ...] = ()  # target layers whose inputs it wants; () is the default
    n_features: int = 3  # how many of them
    draft_vocab_size: int = 0  # guesses that its lm_head tells apart
    maps_vocab: bool = False  # the file holds d2t, which tokens those are
    own_lm_head: bool = True  # False: the target's lm_head, or the embedding if it is tied
    tie_embeddings: bool = False
    norm_before_residual: bool = False  # the residual is the normed feature
    norm_before_fc: bool = False  # one norm over all features side by side
    fc_norm: bool = False  # a norm of its own for each of the features
    norm_output: bool = False  # the normed output is fed back


@dataclass(frozen=True)
class MedusaConfig:
    """Medusa heads (arXiv 2401.10774): each some residual layers and an lm_head of its own."""

    kind: str  # "medusa"
    vocab_size: int
    dim: int
    n_heads: int  # medusa_num_heads
    n_layers: int  # medusa_num_layers, residual layers a head
    dtype: str = "float16"


HeadConfig = DraftConfig | MedusaConfig
AnyConfig = ModelConfig | DraftConfig | MedusaConfig
CONFIGS: dict[str, type[ModelConfig | DraftConfig | Eagle3Config | MedusaConfig]] = {
    "target": ModelConfig,
    "eagle": DraftConfig,
    "eagle3": Eagle3Config,
    "medusa": MedusaConfig,
}


def kind_of(config: AnyConfig) -> str:
    """A key of CONFIGS."""
    return "target" if isinstance(config, ModelConfig) else config.kind


@dataclass(frozen=True)
class QuantConfig:
    """How a checkpoint's matrices were quantized, and what the file was made from."""

    bits: int  # 4 or 8; lm_head may differ
    group_size: int  # inputs that share a scale in 4 bits; 0 where nothing has 4
    method: str  # "minmax", "mse" (round to nearest) or "gptq"
    source_sha: str  # SHA-256 of the weights that it was made from
    lm_head_bits: int = 16  # 16: as it was


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """The config as plain JSON values."""
    return asdict(config)


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Rebuild a config that `to_dict` wrote; a missing or unknown field is a ValueError."""
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(unknown)}; written by a newer fasteagle?"
        )
    values = dict(values)
    try:
        if values.get("rope_scaling"):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        for name in ("eos_ids", "feature_layers"):
            if name in values:
                values[name] = tuple(values[name])
        return kind(**values)
    except TypeError as error:
        raise ValueError(
            f"{kind.__name__} cannot be read: {error}; convert the checkpoint again"
        ) from error
