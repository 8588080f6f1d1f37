"""The encoder: token ids in, one vector a token out; with a focus, for the tokens that are kept.

Axes: B batch, S sequence, K kept sequence, N = B × S, D model width, I layers.
Activations are two-dimensional (N, D) between attentions; `ops` says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .config import EncoderConfig
from .focus import SURE, UNITS, Focus, keep_bias, kept_length, kept_lengths, select, token_scores
from .layers import MASKED_SCORE, Dropout, Embeddings, EncoderLayer, Gate, Norm
from .quantize import Quantization


class FocusDraw(NamedTuple):
    """A focus for training: drawn anew for each row and step.

    Attributes:
      units_BI: int32, what each row keeps in each of the I layers, in `focus.UNITS`, non-increasing along I.
      temperature: of the gates' sigmoid.
      hard_B: bool, the rows whose dropped tokens take no part at all.
    """

    units_BI: jax.Array
    temperature: jax.Array
    hard_B: jax.Array


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
      scan: runs all layers but the first in one loop over stacked weights (see `stacking`), so that compiling takes no
        longer for a deeper model. Such layers have one shape: not together with a focus that cuts.
      remat: computes a layer's activations again in the backward pass instead of keeping them.
      by_text: of long texts computes the attention of one after the other, which on a CPU is several times as fast: the
        scores of a batch do not fit its caches. Not while training with dropout, nor together with `scan`.
    """

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    quantization: Quantization = Quantization.NONE
    dropout: float = 0.0
    focus: Focus | None = None
    scan: bool = False
    remat: bool = False
    by_text: bool = False

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
        if self.scan and units[-1] < UNITS:
            raise ValueError("A scan runs layers of one shape; a focus that cuts needs scan=False.")
        make_layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        for i in range(1 if self.scan else c.num_layers):
            cuts = units[i] < (units[i - 1] if i else UNITS)
            if c.gated and (cuts or draw is not None or self.is_initializing()):
                gate_BS = Gate(name=f"gate_{i}")(x_ND).reshape(B, -1)
                if cuts:
                    x_ND, tokens = _gather(x_ND, tokens, gate_BS, lengths_B, units[i], kept_length(S, units[i]))
                elif draw is not None:
                    tokens = _mask(tokens, gate_BS, lengths_B, draw, i)
            layer = make_layer(
                c, self.quantization, self.dropout, first=i == 0, by_text=self.by_text, name=f"layer_{i}"
            )
            x_ND = layer(x_ND, tokens.bias_BK, tokens.positions_BK, c.is_local(i))
        if self.scan and c.num_layers > 1:
            x_ND, tokens = self._scan_layers(x_ND, tokens, lengths_B, draw)
        if c.pre_norm:
            x_ND = Norm(c, name="final_norm")(x_ND)
        return Encoded(x_ND.reshape(B, -1, c.d_model), tokens.weights_BK, tokens.positions_BK, tokens.scores_BK)

    def _scan_layers(
        self, x_ND: jax.Array, tokens: _Tokens, lengths_B: jax.Array, draw: FocusDraw | None
    ) -> tuple[jax.Array, _Tokens]:
        """All layers but the first, as one loop."""
        c = self.config
        layers = np.arange(1, c.num_layers)
        scanned = nn.scan(
            nn.remat(_ScannedLayer, prevent_cse=False) if self.remat else _ScannedLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast)),
            length=len(layers),
        )
        each = (jnp.asarray(layers), jnp.asarray([c.is_local(int(i)) for i in layers]))
        step = scanned(c, self.quantization, self.dropout, name="layers")
        carried, _ = step((x_ND, tokens), each, lengths_B, draw)
        return carried


class _ScannedLayer(nn.Module):
    """A gate and a layer: the body of the loop over layers."""

    config: EncoderConfig
    quantization: Quantization
    dropout: float

    @nn.compact
    def __call__(
        self,
        carried: tuple[jax.Array, _Tokens],
        each: tuple[jax.Array, jax.Array],
        lengths_B: jax.Array,
        draw: FocusDraw | None,
    ) -> tuple[tuple[jax.Array, _Tokens], None]:
        (x_ND, tokens), (index, is_local) = carried, each
        if self.config.gated and (draw is not None or self.is_initializing()):
            gate_BS = Gate(name="gate")(x_ND).reshape(len(lengths_B), -1)
            if draw is not None:
                tokens = _mask(tokens, gate_BS, lengths_B, draw, index)
        layer = EncoderLayer(self.config, self.quantization, self.dropout, name="layer")
        x_ND = layer(x_ND, tokens.bias_BK, tokens.positions_BK, is_local)
        return (x_ND, tokens), None


class _Tokens(NamedTuple):
    """The tokens that are left before a layer: what `Encoded` says of them, and the bias that their keys get."""

    weights_BK: jax.Array
    positions_BK: jax.Array
    scores_BK: jax.Array
    bias_BK: jax.Array


def _all_tokens(lengths_B: jax.Array, length: int) -> _Tokens:
    shape = (lengths_B.shape[0], length)  # which may be symbolic, where `len` may not
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


def _mask(
    tokens: _Tokens, gate_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw, layer: jax.Array | int
) -> _Tokens:
    """The same tokens left, with a budget for each row, in rows of the same length: what is trained."""
    # In a hard row a token that was dropped stays so.
    scores_BS = jnp.where(tokens.weights_BK > 0, token_scores(gate_BS, lengths_B), -SURE)
    kept_B = kept_lengths(lengths_B, draw.units_BI[:, layer])
    log_keep_BS = keep_bias(scores_BS, kept_B, draw.temperature, draw.hard_B)
    return tokens._replace(
        weights_BK=tokens.weights_BK * jnp.exp(log_keep_BS),
        scores_BK=scores_BS,
        bias_BK=jnp.maximum(tokens.bias_BK + log_keep_BS, MASKED_SCORE),
    )
