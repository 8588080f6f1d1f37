"""The encoder: token ids in, one vector a token out.

Axes: B batch, S sequence, N = B × S, D model width, H heads, K head width, F feed-forward width, V vocabulary.
Activations are two-dimensional (N, D) between attentions; `ops` says why.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import ops, quantize
from .config import EncoderConfig
from .focus import SURE, UNITS, Focus, keep_bias, kept_length, kept_lengths, select, token_scores
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
    def __call__(self, x_ND: jax.Array, bias_BS: jax.Array) -> jax.Array:
        c = self.config
        B, S = bias_BS.shape
        # One product for query, key and value: fewer, larger products are faster on every device.
        qkv_NE = Dense(3 * c.d_model, self.quantization, name="qkv")(x_ND)
        query, key, value = (
            x_ND.reshape(B, S, c.num_heads, c.head_dim).transpose(0, 2, 1, 3) for x_ND in jnp.split(qkv_NE, 3, axis=1)
        )

        scores_BHST = jnp.einsum("BHSK,BHTK->BHST", query, key, preferred_element_type=jnp.float32)
        scores_BHST = scores_BHST * c.head_dim**-0.5 + bias_BS[:, None, None, :]
        weights_BHST = jax.nn.softmax(scores_BHST, axis=-1).astype(x_ND.dtype)
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
    def __call__(self, x_ND: jax.Array, bias_BS: jax.Array) -> jax.Array:
        c = self.config
        dropout = Dropout(self.dropout)
        x_ND += dropout(Attention(c, self.quantization, self.dropout, name="attention")(x_ND, bias_BS))
        x_ND = LayerNorm(c.norm_eps, name="attention_norm")(x_ND)
        x_ND += dropout(FeedForward(c, self.quantization, name="feed_forward")(x_ND))
        return LayerNorm(c.norm_eps, name="feed_forward_norm")(x_ND)


class Gate(nn.Module):
    """Scores tokens for Focused Attention: a linear function of the normalised activations, in float32.

    The factor √D makes a score move as fast as a unit of width-independent scale would under Adam.
    """

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        direction_D = self.param("direction", nn.initializers.zeros_init(), (x_ND.shape[-1],), jnp.float32)
        x32_ND = x_ND.astype(jnp.float32)
        rstd_N1 = jax.lax.rsqrt(jnp.square(x32_ND).mean(axis=-1, keepdims=True) + 1e-6)
        return (x32_ND * rstd_N1) @ direction_D * x_ND.shape[-1] ** 0.5


class FocusDraw(NamedTuple):
    """A focus for training: drawn anew for each row and step.

    Attributes:
      units_BI: int32, what each row keeps in each of the I layers, in `focus.UNITS`, non-increasing along I.
      temperature: of the gates' sigmoid.
      hard: whether dropped tokens take no part at all.
    """

    units_BI: jax.Array
    temperature: jax.Array
    hard: jax.Array


class Encoded(NamedTuple):
    """What the encoder makes of a batch, for the tokens that the last layer kept (K; without focus K = S).

    Attributes:
      hidden_BKD: activations.
      weights_BK: float32, the tokens' weights in a mean: 0 for padding, 1 for a real token (in training with a soft
        gate, between them).
      positions_BK: int32, the places of the tokens in the text, ascending within a row's own.
      scores_BK: float32, the tokens' scores by the last gate that cut (±`focus.SURE`: kept or dropped in any case).
    """

    hidden_BKD: jax.Array
    weights_BK: jax.Array
    positions_BK: jax.Array
    scores_BK: jax.Array


class Encoder(nn.Module):
    """Token ids and lengths → one vector a token.

    Attributes:
      config: the shape.
      dtype: what activations are computed in; parameters are float32 (or int8) whatever it says.
      quantization: see `quantize.Quantization`.
      dropout: rate on embeddings, attention weights and sublayers; 0 when not training. Needs the RNG stream `dropout`.
      focus: what the layers keep; None, or a full one, is the dense encoder.
    """

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    quantization: Quantization = Quantization.NONE
    dropout: float = 0.0
    focus: Focus | None = None

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw | None = None) -> Encoded:
        """Encodes a padded batch.

        Args:
          tokens_BS: int32 token ids; S at most `config.max_positions`.
          lengths_B: int32 number of real tokens in each row; 0 for a filler row.
          draw: masks tokens as a focus would drop them, for training; not together with `focus`.

        Returns:
          See `Encoded`. `hidden_BKD` at padding positions is finite and means nothing.
        """
        c = self.config
        B, S = tokens_BS.shape
        x_ND = Embeddings(c, self.dtype, self.quantization, name="embeddings")(tokens_BS)
        x_ND = Dropout(self.dropout)(x_ND)
        tokens = _all_tokens(lengths_B, S)
        units = self.focus.units if self.focus else (UNITS,) * c.num_layers
        for i in range(c.num_layers):
            cuts = units[i] < (units[i - 1] if i else UNITS)
            if c.gated and (cuts or draw is not None or self.is_initializing()):
                gate_BS = Gate(name=f"gate_{i}")(x_ND).reshape(B, -1)
                if cuts:
                    x_ND, tokens = _gather(x_ND, tokens, gate_BS, lengths_B, units[i], kept_length(S, units[i]))
                elif draw is not None:
                    tokens = _mask(tokens, gate_BS, lengths_B, draw, i)
            x_ND = EncoderLayer(c, self.quantization, self.dropout, name=f"layer_{i}")(x_ND, tokens.bias_BK)
        return Encoded(x_ND.reshape(B, -1, c.d_model), tokens.weights_BK, tokens.positions_BK, tokens.scores_BK)


class _Tokens(NamedTuple):
    """The tokens that are left before a layer: what `Encoded` says of them, and the bias that their keys get."""

    weights_BK: jax.Array
    positions_BK: jax.Array
    scores_BK: jax.Array
    bias_BK: jax.Array


def _all_tokens(lengths_B: jax.Array, length: int) -> _Tokens:
    shape = (len(lengths_B), length)
    positions_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    real_BS = positions_BS < lengths_B[:, None]
    bias_BS = jnp.where(real_BS, 0.0, MASKED_SCORE)
    return _Tokens(real_BS.astype(jnp.float32), positions_BS, jnp.zeros(shape, jnp.float32), bias_BS)


def _gather(
    x_ND: jax.Array, tokens: _Tokens, gate_BS: jax.Array, lengths_B: jax.Array, units: int, length: int
) -> tuple[jax.Array, _Tokens]:
    """Each row's best tokens, in rows of `length`: what is served."""
    B, S = gate_BS.shape
    left_B = tokens.weights_BK.sum(axis=1).astype(jnp.int32)
    scores_BS = token_scores(gate_BS, left_B)
    kept_B = kept_lengths(lengths_B, units)
    indices_BK = select(scores_BS, kept_B, length)
    kept_BK = jnp.arange(length) < kept_B[:, None]
    gathered = _Tokens(
        weights_BK=kept_BK.astype(jnp.float32),
        positions_BK=jnp.take_along_axis(tokens.positions_BK, indices_BK, axis=1),
        scores_BK=jnp.take_along_axis(scores_BS, indices_BK, axis=1),
        bias_BK=jnp.where(kept_BK, 0.0, MASKED_SCORE),
    )
    return x_ND[(jnp.arange(B)[:, None] * S + indices_BK).reshape(-1)], gathered


def _mask(tokens: _Tokens, gate_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw, layer: int) -> _Tokens:
    """The same tokens left, with a budget for each row, in rows of the same length: what is trained."""
    # Once hard, a token that was dropped stays so.
    scores_BS = jnp.where(tokens.weights_BK > 0, token_scores(gate_BS, lengths_B), -SURE)
    kept_B = kept_lengths(lengths_B, draw.units_BI[:, layer])
    log_keep_BS = keep_bias(scores_BS, kept_B, draw.temperature, draw.hard)
    return tokens._replace(
        weights_BK=tokens.weights_BK * jnp.exp(log_keep_BS),
        scores_BK=scores_BS,
        bias_BK=jnp.maximum(tokens.bias_BK + log_keep_BS, MASKED_SCORE),
    )
