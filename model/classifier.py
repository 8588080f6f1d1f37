"""Encoder + label table: what is trained, quantised and served.

Axes: B batch, S sequence, D model width, L all labels of the taxonomy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from .config import EncoderConfig
from .encoder import Encoder, kernel_init
from .quantize import Quantization


def mean_pool(hidden_BSD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The mean of each row's real tokens, float32 (B, D); zeros for a row that has none."""
    mask_BS1 = (jnp.arange(hidden_BSD.shape[1]) < lengths_B[:, None])[..., None]
    total_BD = jnp.where(mask_BS1, hidden_BSD.astype(jnp.float32), 0.0).sum(axis=1)
    return total_BD / jnp.maximum(lengths_B, 1)[:, None]


class LabelHead(nn.Module):
    """One table over every label of the taxonomy: a task's logits are its slice of the row.

    Which activation a slice takes (softmax or sigmoids) is the task's business: see `decode` and the losses.
    """

    num_labels: int

    @nn.compact
    def __call__(self, pooled_BD: jax.Array) -> jax.Array:
        kernel_DL = self.param("kernel", kernel_init, (pooled_BD.shape[-1], self.num_labels), jnp.float32)
        bias_L = self.param("bias", nn.initializers.zeros_init(), (self.num_labels,), jnp.float32)
        return pooled_BD @ kernel_DL + bias_L


class TextClassifier(nn.Module):
    """Token ids and lengths → logits over all labels of the taxonomy, float32 (B, L).

    Attributes are those of `Encoder`, and the number of labels.
    """

    config: EncoderConfig
    num_labels: int
    dtype: jnp.dtype = jnp.float32
    quantization: Quantization = Quantization.NONE
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        encoder = Encoder(self.config, self.dtype, self.quantization, self.dropout, name="encoder")
        pooled_BD = mean_pool(encoder(tokens_BS, lengths_B), lengths_B)
        return LabelHead(self.num_labels, name="head")(pooled_BD)
