"""The layers of an encoder: linear, norm, attention and feed-forward, for every choice of `EncoderConfig`.

Axes: B batch, S sequence, N = B × S, D model width, H heads, K head width, F feed-forward width, V vocabulary.
Activations are two-dimensional (N, D) between attentions; `ops` says why.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from . import focus, ops, sharding
from .config import EncoderConfig
from .focus import MASKED_SCORE, FocusDraw, KeptTokens
from .precision import Precision
from .quantize import int8_product

# Up to this length in tokens, XLA's CPU programs keep the attention scores of a whole batch in the caches.
MAX_TOGETHER = 256

kernel_init = nn.initializers.truncated_normal(stddev=0.02)


class Dense(nn.Module):
    """A linear layer, float or INT8.

    Its name (`qkv`, `out`, `up`, `down`) decides how it is sharded (see `sharding`).

    Attributes:
      features: outputs (F).
      precision: of the stored kernel: float32, or int8 with one scale an output.
      biased: whether a bias is added.
      parts: how many products of equal width the kernel holds side by side; `split` takes their outputs apart.
    """

    features: int
    precision: Precision
    biased: bool
    parts: int = 1

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        shape = (x_ND.shape[-1], self.features)
        bias_F = None
        if self.biased:
            bias_F = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            bias_F = sharding.interleave(bias_F, f"{self.name}.bias", self.parts)
        if self.precision == Precision.int8:
            kernel_DF = self.param("kernel", nn.initializers.zeros_init(), shape, jnp.int8)
            scale_F = self.param("kernel_scale", nn.initializers.zeros_init(), shape[1:], jnp.float32)
            product_NF = int8_product(x_ND, kernel_DF, scale_F)
            return (product_NF if bias_F is None else product_NF + bias_F).astype(x_ND.dtype)
        kernel_DF = self.param("kernel", kernel_init, shape, jnp.float32)
        kernel_DF = sharding.interleave(kernel_DF, f"{self.name}.kernel", self.parts)
        return ops.linear(x_ND, kernel_DF, bias_F)

    def split(self, y_NF: jax.Array) -> list[jax.Array]:
        return sharding.deinterleave(y_NF, f"{self.name}.kernel", self.parts)


class Embedding(nn.Module):
    """A table of vectors, float32 or int8 with one scale a row."""

    num_rows: int
    features: int
    precision: Precision

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks up `ids` (any shape) → ids.shape + (D,), float32."""
        shape = (self.num_rows, self.features)
        if self.precision == Precision.int8:
            table_VD = self.param("table", nn.initializers.zeros_init(), shape, jnp.int8)
            scale_V = self.param("table_scale", nn.initializers.zeros_init(), shape[:1], jnp.float32)
            return table_VD[ids].astype(jnp.float32) * scale_V[ids][..., None]
        return sharding.gathered(self.param("table", kernel_init, shape, jnp.float32), "table")[ids]


class Norm(nn.Module):
    """LayerNorm or RMSNorm, as the config says."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        c = self.config
        scale_D = self.param("scale", nn.initializers.ones_init(), (c.d_model,), jnp.float32)
        if c.norm == "rms":
            return ops.rms_norm(x_ND, scale_D, c.norm_eps)
        if not c.biases:
            return ops.layer_norm(x_ND, scale_D, jnp.zeros_like(scale_D), c.norm_eps)
        bias_D = self.param("bias", nn.initializers.zeros_init(), (c.d_model,), jnp.float32)
        return ops.layer_norm(x_ND, scale_D, bias_D, c.norm_eps)


class Embeddings(nn.Module):
    """The normalised sum of token embeddings and, where the config has them, position and segment embeddings."""

    config: EncoderConfig
    dtype: jnp.dtype
    precision: Precision

    @nn.compact
    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        c = self.config
        length = tokens_BS.shape[1]
        x_BSD = Embedding(c.vocab_size, c.d_model, self.precision, name="token")(tokens_BS)
        if c.rope_base is None:
            x_BSD += Embedding(c.max_positions, c.d_model, self.precision, name="position")(jnp.arange(length))
        if c.num_segments:
            x_BSD += Embedding(c.num_segments, c.d_model, self.precision, name="segment")(jnp.zeros((), jnp.int32))
        x_ND = sharding.constrain(x_BSD.reshape(-1, c.d_model), "batch", None)
        return Norm(c, name="norm")(x_ND).astype(self.dtype)


class Dropout(nn.Module):
    """`ops.dropout` with keys of the RNG stream `dropout`; the identity at rate 0."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.dropout(x, self.make_rng("dropout"), self.rate) if self.rate else x


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2).

    The attributes are those of `Encoder`.
    """

    config: EncoderConfig
    precision: Precision
    dropout: float
    by_text: bool = False

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, bias_BS: jax.Array, positions_BS: jax.Array, is_local: jax.Array | bool
    ) -> jax.Array:
        c = self.config
        B, S = bias_BS.shape
        # One product for query, key and value: one large product is faster than three on every device.
        qkv = Dense(3 * c.d_model, self.precision, c.biases, parts=3, name="qkv")
        query, key, value = (
            x_ND.reshape(B, S, c.num_heads, c.head_dim).transpose(0, 2, 1, 3) for x_ND in qkv.split(qkv(x_ND))
        )
        if c.rope_base is not None:
            base = jnp.where(is_local, c.local_rope_base, c.rope_base)
            query, key = rotate(query, positions_BS, base), rotate(key, positions_BS, base)

        def mix(
            query: jax.Array, key: jax.Array, value: jax.Array, bias_BS: jax.Array, positions_BS: jax.Array
        ) -> jax.Array:
            return self._mix(query, key, value, bias_BS, positions_BS, is_local)

        if self.by_text and S > MAX_TOGETHER:
            texts = (query, key, value, bias_BS, positions_BS)
            mixed_BHSK = jax.lax.map(lambda text: mix(*(part[None] for part in text))[0], texts)
        else:
            mixed_BHSK = mix(query, key, value, bias_BS, positions_BS)
        mixed_ND = mixed_BHSK.transpose(0, 2, 1, 3).reshape(B * S, c.d_model)
        return Dense(c.d_model, self.precision, c.biases, name="out")(mixed_ND)

    def _mix(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias_BS: jax.Array,
        positions_BS: jax.Array,
        is_local: jax.Array | bool,
    ) -> jax.Array:
        """softmax(QKᵀ / √K + bias) V. Queries, keys, values and the result are (B, H, S, K)."""
        c = self.config
        scores_BHST = jnp.einsum("BHSK,BHTK->BHST", query, key, preferred_element_type=jnp.float32)
        scores_BHST = scores_BHST * c.head_dim**-0.5 + bias_BS[:, None, None, :]
        if c.local_window:
            distance_BST = jnp.abs(positions_BS[:, :, None] - positions_BS[:, None, :])
            beyond_B1ST = (is_local & (distance_BST > c.local_window))[:, None]
            scores_BHST = jnp.where(beyond_B1ST, MASKED_SCORE, scores_BHST)
        weights_BHST = jax.nn.softmax(scores_BHST, axis=-1).astype(value.dtype)
        weights_BHST = Dropout(self.dropout)(weights_BHST)
        mixed_BHSK = jnp.einsum("BHST,BHTK->BHSK", weights_BHST, value, preferred_element_type=jnp.float32)
        return mixed_BHSK.astype(value.dtype)


def rotate(x_BHSK: jax.Array, positions_BS: jax.Array, base: jax.Array | float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.2.2).

    Dimension i of the first half of a head turns with dimension i of the second half, by position · base^(−2i/K).

    Args:
      x_BHSK: queries or keys; K is even.
      positions_BS: places in the text; tokens keep theirs when others are dropped.
      base: θ.
    """
    half = x_BHSK.shape[-1] // 2
    frequencies_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_B1SK = (positions_BS.astype(jnp.float32)[..., None] * frequencies_K)[:, None]
    cos, sin = jnp.cos(angles_B1SK), jnp.sin(angles_B1SK)
    first, second = jnp.split(x_BHSK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BHSK.dtype)


class FeedForward(nn.Module):
    """Linear layers around GELU, or a gated linear unit (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    config: EncoderConfig
    precision: Precision

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        c = self.config
        gated = c.activation != "gelu"
        up = Dense((1 + gated) * c.d_ff, self.precision, c.biases, parts=1 + gated, name="up")
        gate_NF, *value = up.split(up(x_ND))
        hidden_NF = ops.silu(gate_NF) if c.activation == "swiglu" else ops.gelu(gate_NF)
        if gated:
            hidden_NF *= value[0]
        return Dense(c.d_model, self.precision, c.biases, name="down")(hidden_NF)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout and a residual sum, and a norm before it or after the sum.

    Between the two a gate may drop tokens (`focus`); the activations that it scores have attended to the whole text.
    The embeddings are already normalised, so a pre-norm encoder's first layer has no norm before its attention.

    Attributes:
      config, precision, dropout, by_text: as those of `Encoder`.
      first: whether it is the first layer.
      cut: the share to keep, in `focus.UNITS`, and the static length of the rows that are left; None drops nothing.
    """

    config: EncoderConfig
    precision: Precision
    dropout: float
    first: bool = False
    by_text: bool = False
    cut: tuple[int, int] | None = None

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, tokens: KeptTokens, lengths_B: jax.Array, draw: FocusDraw | None, index: jax.Array | int
    ) -> tuple[jax.Array, KeptTokens]:
        c = self.config
        x_ND = sharding.constrain(x_ND, "batch", None)
        dropout = Dropout(self.dropout)
        attention = Attention(c, self.precision, self.dropout, self.by_text, name="attention")
        feed_forward = FeedForward(c, self.precision, name="feed_forward")
        normed_ND = Norm(c, name="attention_norm")(x_ND) if c.pre_norm and not self.first else x_ND
        x_ND += dropout(attention(normed_ND, tokens.bias_BK, tokens.positions_BK, c.is_local(index)))
        if not c.pre_norm:
            x_ND = Norm(c, name="attention_norm")(x_ND)
        x_ND, tokens = self._focused(x_ND, tokens, lengths_B, draw, index)
        feed_forward_norm = Norm(c, name="feed_forward_norm")
        if c.pre_norm:
            return x_ND + dropout(feed_forward(feed_forward_norm(x_ND))), tokens
        return feed_forward_norm(x_ND + dropout(feed_forward(x_ND))), tokens

    def _focused(
        self, x_ND: jax.Array, tokens: KeptTokens, lengths_B: jax.Array, draw: FocusDraw | None, index: jax.Array | int
    ) -> tuple[jax.Array, KeptTokens]:
        """Drops tokens by the gate's scores. The gate is computed only where tokens are dropped."""
        if not self.config.gated or (self.cut is None and draw is None and not self.is_initializing()):
            return x_ND, tokens
        gate_BS = Gate(name="gate")(x_ND).reshape(tokens.bias_BK.shape)
        if self.cut is not None:
            return focus.gather(x_ND, tokens, gate_BS, lengths_B, *self.cut)
        if draw is not None:
            tokens = focus.mask(tokens, gate_BS, lengths_B, draw, index)
        return x_ND, tokens


class Gate(nn.Module):
    """Scores tokens for Focused Attention: a linear function of the normalised activations, in float32.

    The factor √D makes the effect of an Adam step on a score independent of the width.
    """

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        direction_D = self.param("direction", nn.initializers.zeros_init(), (x_ND.shape[-1],), jnp.float32)
        x32_ND = x_ND.astype(jnp.float32)
        rstd_N1 = jax.lax.rsqrt(jnp.square(x32_ND).mean(axis=-1, keepdims=True) + 1e-6)
        return (x32_ND * rstd_N1) @ direction_D * x_ND.shape[-1] ** 0.5
