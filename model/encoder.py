"""The encoder: token ids in, one vector a token out.

Axes: B batch, S sequence, N = B × S, D model width, H heads, K head width, F feed-forward width, V vocabulary.
Activations are two-dimensional (N, D) between attentions; `ops` says why.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import ops, quantize
from .config import EncoderConfig
from .quantize import Quantization

# Added to the score of a padding key. Finite, so that a row of padding alone gives uniform weights and not NaN.
MASKED_SCORE = -1e9

kernel_init = nn.initializers.truncated_normal(stddev=0.02)


class Dense(nn.Module):
    """A linear layer, float or INT8 as `quantization` says."""

    features: int
    quantization: Quantization

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        shape = (x_ND.shape[-1], self.features)
        bias_F = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        if self.quantization is Quantization.SERVE:
            # The int8 weights come from AQT's own collection; the float kernel is neither stored nor read.
            kernel_DF = jnp.zeros(shape, x_ND.dtype)
        else:
            kernel_DF = self.param("kernel", kernel_init, shape, jnp.float32)
        if self.quantization is Quantization.NONE:
            return ops.linear(x_ND, kernel_DF, bias_F)
        product_NF = quantize.dot_general(self.quantization)(x_ND, kernel_DF, (((1,), (0,)), ((), ())), precision=None)
        return (product_NF + bias_F).astype(x_ND.dtype)


class Embedding(nn.Module):
    """A table of vectors, float32 or int8 with one scale a row."""

    num_rows: int
    features: int
    quantization: Quantization

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks up `ids` (any shape) → ids.shape + (D,), float32."""
        shape = (self.num_rows, self.features)
        if self.quantization is Quantization.SERVE:
            table_VD = self.param("table", nn.initializers.zeros_init(), shape, jnp.int8)
            scale_V = self.param("table_scale", nn.initializers.zeros_init(), shape[:1], jnp.float32)
            return table_VD[ids].astype(jnp.float32) * scale_V[ids][..., None]
        return self.param("table", kernel_init, shape, jnp.float32)[ids]


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones_init(), (x_ND.shape[-1],), jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros_init(), (x_ND.shape[-1],), jnp.float32)
        return ops.layer_norm(x_ND, scale_D, bias_D, self.eps)


class Embeddings(nn.Module):
    """Token + position + segment embeddings, normalised."""

    config: EncoderConfig
    dtype: jnp.dtype
    quantization: Quantization

    @nn.compact
    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        c = self.config
        length = tokens_BS.shape[1]
        x_BSD = Embedding(c.vocab_size, c.d_model, self.quantization, name="token")(tokens_BS)
        x_BSD += Embedding(c.max_positions, c.d_model, self.quantization, name="position")(jnp.arange(length))
        x_BSD += Embedding(c.num_segments, c.d_model, self.quantization, name="segment")(jnp.zeros((), jnp.int32))
        return LayerNorm(c.norm_eps, name="norm")(x_BSD.reshape(-1, c.d_model)).astype(self.dtype)


class Dropout(nn.Module):
    """`ops.dropout` of the RNG stream `dropout`; nothing at rate 0."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.dropout(x, self.make_rng("dropout"), self.rate) if self.rate else x


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2)."""

    config: EncoderConfig
    quantization: Quantization
    dropout: float

    @nn.compact
    def __call__(self, x_ND: jax.Array, mask_BS: jax.Array) -> jax.Array:
        c = self.config
        B, S = mask_BS.shape
        # One product for query, key and value: fewer, larger products are faster on every device.
        qkv_NE = Dense(3 * c.d_model, self.quantization, name="qkv")(x_ND)
        query, key, value = (
            x_ND.reshape(B, S, c.num_heads, c.head_dim).transpose(0, 2, 1, 3) for x_ND in jnp.split(qkv_NE, 3, axis=1)
        )

        scores_BHST = jnp.einsum("BHSK,BHTK->BHST", query, key, preferred_element_type=jnp.float32)
        bias_B11T = jnp.where(mask_BS, 0.0, MASKED_SCORE)[:, None, None, :]
        weights_BHST = jax.nn.softmax(scores_BHST * c.head_dim**-0.5 + bias_B11T, axis=-1).astype(x_ND.dtype)
        weights_BHST = Dropout(self.dropout)(weights_BHST)
        mixed_BHSK = jnp.einsum("BHST,BHTK->BHSK", weights_BHST, value, preferred_element_type=jnp.float32)

        mixed_ND = mixed_BHSK.astype(x_ND.dtype).transpose(0, 2, 1, 3).reshape(B * S, c.d_model)
        return Dense(c.d_model, self.quantization, name="out")(mixed_ND)


class FeedForward(nn.Module):
    config: EncoderConfig
    quantization: Quantization

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        hidden_NF = Dense(self.config.d_ff, self.quantization, name="up")(x_ND)
        hidden_NF = ops.gelu(hidden_NF)
        return Dense(self.config.d_model, self.quantization, name="down")(hidden_NF)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, the residual sum and LayerNorm (post-norm)."""

    config: EncoderConfig
    quantization: Quantization
    dropout: float

    @nn.compact
    def __call__(self, x_ND: jax.Array, mask_BS: jax.Array) -> jax.Array:
        c = self.config
        dropout = Dropout(self.dropout)
        x_ND += dropout(Attention(c, self.quantization, self.dropout, name="attention")(x_ND, mask_BS))
        x_ND = LayerNorm(c.norm_eps, name="attention_norm")(x_ND)
        x_ND += dropout(FeedForward(c, self.quantization, name="feed_forward")(x_ND))
        return LayerNorm(c.norm_eps, name="feed_forward_norm")(x_ND)


class Encoder(nn.Module):
    """Token ids and lengths → one vector a token.

    Attributes:
      config: the shape.
      dtype: what activations are computed in; parameters are float32 (or int8) whatever it says.
      quantization: see `quantize.Quantization`.
      dropout: rate on embeddings, attention weights and sublayers; 0 when not training. Needs the RNG stream `dropout`.
    """

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    quantization: Quantization = Quantization.NONE
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Encodes a padded batch.

        Args:
          tokens_BS: int32 token ids; S at most `config.max_positions`.
          lengths_B: int32 number of real tokens in each row; 0 for a filler row.

        Returns:
          hidden_BSD in `dtype`. Rows at padding positions are finite and mean nothing.
        """
        B, S = tokens_BS.shape
        mask_BS = jnp.arange(S) < lengths_B[:, None]
        x_ND = Embeddings(self.config, self.dtype, self.quantization, name="embeddings")(tokens_BS)
        x_ND = Dropout(self.dropout)(x_ND)
        for i in range(self.config.num_layers):
            x_ND = EncoderLayer(self.config, self.quantization, self.dropout, name=f"layer_{i}")(x_ND, mask_BS)
        return x_ND.reshape(B, S, -1)
