"""The classifier: encoder, mean pooling, and one label table over the whole taxonomy.

Axes: B batch, S sequence, D model width, L all labels of the taxonomy.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import sharding
from .config import EncoderConfig
from .encoder import Encoder
from .focus import Focus, FocusDraw
from .layers import kernel_init
from .precision import Precision


def mean_pool(hidden_BSD: jax.Array, weights_BS: jax.Array) -> jax.Array:
    """The weighted mean of each row's tokens, float32 (B, D); zeros for a row whose weights are all 0.

    Weights are at most 1, and 0 for padding, whose activations may have any finite value.
    """
    total_BD = (hidden_BSD.astype(jnp.float32) * weights_BS[..., None]).sum(axis=1)
    return total_BD / jnp.maximum(weights_BS.sum(axis=1), 1.0)[:, None]


class Evidence(NamedTuple):
    """The tokens that the last layer kept, in order; see `encoder.EncoderOutput`.

    Attributes:
      kept_BK: whether a place holds a token; places beyond a row's own tokens do not.
      positions_BK: int32 places in the row of token ids.
      scores_BK: float32, the gates' scores.
    """

    kept_BK: jax.Array
    positions_BK: jax.Array
    scores_BK: jax.Array


class LabelHead(nn.Module):
    """A linear layer over every label of the taxonomy; a task's logits are a slice of its outputs.

    The task's kind decides between softmax and sigmoids: see `decode` and the losses.
    """

    num_labels: int

    @nn.compact
    def __call__(self, pooled_BD: jax.Array) -> jax.Array:
        kernel_DL = self.param("kernel", kernel_init, (pooled_BD.shape[-1], self.num_labels), jnp.float32)
        bias_L = self.param("bias", nn.initializers.zeros_init(), (self.num_labels,), jnp.float32)
        kernel_DL, bias_L = sharding.divide_labels(kernel_DL, bias_L)
        logits_BL = sharding.constrain(pooled_BD @ kernel_DL + bias_L, "batch", "logits")
        return logits_BL[:, : self.num_labels]


class TextClassifier(nn.Module):
    """Token ids and lengths → logits over all labels of the taxonomy, float32 (B, L).

    The attributes are those of `Encoder`, and the number of labels.
    """

    config: EncoderConfig
    num_labels: int
    dtype: jnp.dtype = jnp.float32
    precision: Precision = Precision.float32
    dropout: float = 0.0
    focus: Focus | None = None
    scan: bool = False
    remat: bool = False
    by_text: bool = False

    def setup(self) -> None:
        self.encoder = Encoder(
            self.config, self.dtype, self.precision, self.dropout, self.focus, self.scan, self.remat, self.by_text
        )
        self.head = LabelHead(self.num_labels)

    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw | None = None) -> jax.Array:
        return self.head(self.pooled(tokens_BS, lengths_B, draw))

    def pooled(self, tokens_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw | None = None) -> jax.Array:
        """The pooled vectors that the head reads, float32 (B, D); needs no weights of the head."""
        encoded = self.encoder(tokens_BS, lengths_B, draw)
        return mean_pool(encoded.hidden_BKD, encoded.weights_BK)

    def with_pooled(
        self, tokens_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The logits, and the pooled vectors that the head read, float32 (B, D)."""
        pooled_BD = self.pooled(tokens_BS, lengths_B, draw)
        return self.head(pooled_BD), pooled_BD

    def explain(self, tokens_BS: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, Evidence]:
        """The logits, and the tokens that the last layer kept."""
        encoded = self.encoder(tokens_BS, lengths_B)
        logits_BL = self.head(mean_pool(encoded.hidden_BKD, encoded.weights_BK))
        return logits_BL, Evidence(encoded.weights_BK > 0, encoded.positions_BK, encoded.scores_BK)
