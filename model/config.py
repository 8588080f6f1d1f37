"""What an encoder is, in a few typed choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ..data.errors import InputError

ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and choices of an encoder of the BERT family.

    That family is: learned absolute positions, post-norm LayerNorm, biases, GELU by the error function
    (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Attributes:
      vocab_size: rows of the token table.
      num_layers: transformer blocks.
      d_model: width of the residual stream (D).
      num_heads: attention heads (H); each is d_model / num_heads wide (K).
      d_ff: width of the feed-forward's hidden layer (F).
      max_positions: the longest sequence that has position embeddings, special tokens included.
      num_segments: rows of BERT's token-type table; a classified text is always segment 0.
      norm_eps: added to the variance in LayerNorm.
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
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "d_ff", "max_positions", "num_segments"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1; it is {value!r}.")
        if self.d_model % self.num_heads:
            raise InputError(f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads}).")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

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
