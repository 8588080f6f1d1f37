"""The configuration of an encoder: its sizes, and the choices that make it BERT, ModernBERT or native."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..data.errors import InputError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and architecture of an encoder. The defaults are the BERT family's; `native` makes Classer's own.

    BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): learned positions, LayerNorm after each sum, biases,
    GELU by the error function. ModernBERT (Warner et al. 2024, https://arxiv.org/abs/2412.13663): rotary positions,
    LayerNorm before, no biases, GeGLU, local attention in two layers of three. Classer: rotary positions, RMSNorm
    before, no biases, SwiGLU.

    Attributes:
      vocab_size: rows of the token table.
      num_layers: transformer blocks.
      d_model: width of the residual stream (D).
      num_heads: attention heads (H); each is d_model / num_heads wide (K).
      d_ff: width of the feed-forward's hidden layer (F).
      max_positions: the longest sequence, special tokens included.
      num_segments: rows of BERT's token-type table; a classified text is always segment 0. 0 for none.
      norm_eps: added to the variance or the mean square in norms.
      norm: LayerNorm or RMSNorm.
      pre_norm: norms before attention and feed-forward, and one after the last layer; else after each residual sum.
      biases: whether linear layers and LayerNorm have biases.
      activation: GELU, or a gated linear unit: GeGLU or SwiGLU.
      rope_base: θ of rotary positions; None for a learned table.
      local_window: how many tokens on each side a token attends to in local layers; 0 makes all layers global.
      global_every: the period of global layers: layers 0, n, 2n, … are global, the others local (if there is a window).
      local_rope_base: θ in local layers.
      gated: whether each layer has a gate for Focused Attention.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    max_positions: int = 512
    num_segments: int = 2
    norm_eps: float = 1e-12
    norm: Literal["layer", "rms"] = "layer"
    pre_norm: bool = False
    biases: bool = True
    activation: Literal["gelu", "geglu", "swiglu"] = "gelu"
    rope_base: float | None = None
    local_window: int = 0
    global_every: int = 1
    local_rope_base: float = 10_000.0
    gated: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "max_positions", "global_every")
        for name, low in (*((name, 1) for name in sizes), ("num_segments", 0), ("local_window", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InputError(f"{name} must be a whole number of at least {low}; it is {value!r}.")
        for name, known in (("norm", ("layer", "rms")), ("activation", ("gelu", "geglu", "swiglu"))):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}; it is {value!r}.")
        if self.d_model % self.num_heads:
            raise InputError(f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads}).")

        if self.rope_base is not None and self.head_dim % 2:
            raise InputError(f"Rotary positions need heads of an even width; d_model / num_heads is {self.head_dim}.")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def is_local(self, layer: jax.Array | int) -> jax.Array | bool:
        """Whether a layer attends within its window only: a bool, or an array for a traced index."""
        return self.local_window > 0 and layer % self.global_every > 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> EncoderConfig:
        """Reads what `to_json` wrote; a missing or unknown field is an InputError that names it."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(data.keys() - fields):
            raise InputError(f"{source}: unknown encoder field '{unknown[0]}'; known are {', '.join(sorted(fields))}.")
        try:
            return cls(**data)
        except TypeError as e:
            raise InputError(f"{source}: the encoder's config is incomplete ({e}).") from None


# name → num_layers, d_model, num_heads, d_ff. Small encoders have heads 32 wide, so that there are enough of them.
NATIVE_SIZES = {
    "classer-5m": (6, 128, 4, 352),
    "classer-22m": (6, 384, 12, 1024),
    "classer-110m": (12, 768, 12, 2048),
    "classer-400m": (28, 1024, 16, 2816),
    "classer-1b": (22, 2048, 16, 5632),
}

_NATIVE: dict[str, Any] = {
    "num_segments": 0,
    "norm_eps": 1e-6,
    "norm": "rms",
    "pre_norm": True,
    "biases": False,
    "activation": "swiglu",
    "rope_base": 10_000.0,
}


def native(size: str, *, vocab_size: int, max_positions: int = 1024) -> EncoderConfig:
    """The native architecture in one of `NATIVE_SIZES`: RMSNorm before, SwiGLU, rotary positions, no biases, gates.

    Args:
      size: a name of `NATIVE_SIZES`; the number in it counts parameters with BERT's vocabulary of 30,522 tokens.
      vocab_size: of the tokenizer.
      max_positions: the longest text, in tokens; it costs no parameters.

    Raises:
      InputError: there is no such size.
    """
    if size not in NATIVE_SIZES:
        raise InputError(f"There is no size '{size}'; there are {', '.join(NATIVE_SIZES)}.")
    num_layers, d_model, num_heads, d_ff = NATIVE_SIZES[size]
    return EncoderConfig(vocab_size, num_layers, d_model, num_heads, d_ff, max_positions, **_NATIVE, gated=True)


def native_like(other: EncoderConfig, d_ff: int | None = None) -> EncoderConfig:
    """The native architecture in the depth and width of another encoder, without gates.

    Args:
      other: an encoder, such as a BERT.
      d_ff: by default two thirds of the other's, rounded to a multiple of 32: SwiGLU's three kernels then have as many
        parameters as the other's two.
    """
    d_ff = max(32, round(other.d_ff * 2 / 3 / 32) * 32) if d_ff is None else d_ff
    shape = (other.vocab_size, other.num_layers, other.d_model, other.num_heads, d_ff, other.max_positions)
    return EncoderConfig(*shape, **_NATIVE)
