"""The encoder: token ids → one vector for each token or, with a focus, for each token that is kept.

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
from .focus import UNITS, Focus, FocusDraw, KeptTokens, all_tokens, kept_length
from .layers import Dropout, Embeddings, EncoderLayer, Norm
from .precision import Precision


class EncoderOutput(NamedTuple):
    """The encoder's output for a batch: the tokens that the last layer kept (K; without a focus K = S).

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
    """Token ids and lengths → one vector for each token that is kept.

    Attributes:
      config: sizes and architecture.
      dtype: of activations. It does not change how parameters are stored.
      precision: of the stored kernels and tables: float32, or int8 (see `quantize`).
      dropout: rate on embeddings, attention weights and sublayers; 0 when not training. Needs the RNG stream `dropout`.
      focus: the share of tokens that each layer keeps; with None or a full one the encoder is dense.
      scan: runs all layers but the first in one loop over stacked weights (see `stacking`), so that compile time does
        not grow with depth. All layers then have one shape: a focus that drops tokens is a ValueError.
      remat: recomputes a layer's activations in the backward pass instead of keeping them.
      by_text: computes the attention of long texts one text at a time, which is several times as fast on a CPU, where
        the scores of a batch do not fit the caches. Not for training with dropout, nor together with `scan`.
    """

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    precision: Precision = Precision.float32
    dropout: float = 0.0
    focus: Focus | None = None
    scan: bool = False
    remat: bool = False
    by_text: bool = False

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw | None = None) -> EncoderOutput:
        """Encodes a padded batch.

        Args:
          tokens_BS: int32 token ids; S at most `config.max_positions`.
          lengths_B: int32 number of real tokens in each row; 0 for a filler row.
          draw: masks the tokens that a focus would drop, for training; not together with `focus`.

        Returns:
          See `EncoderOutput`. At padding positions `hidden_BKD` is finite but meaningless.
        """
        c = self.config
        B, S = tokens_BS.shape
        x_ND = Embeddings(c, self.dtype, self.precision, name="embeddings")(tokens_BS)
        x_ND = Dropout(self.dropout)(x_ND)
        tokens = all_tokens(lengths_B, S)
        units = self.focus.units if self.focus else (UNITS,) * c.num_layers
        if self.scan and units[-1] < UNITS:
            raise ValueError("A scan runs layers of one shape; a focus that cuts needs scan=False.")
        make_layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        for i in range(1 if self.scan else c.num_layers):
            cuts = units[i] < (units[i - 1] if i else UNITS)
            layer = make_layer(
                c,
                self.precision,
                self.dropout,
                first=i == 0,
                by_text=self.by_text,
                cut=(units[i], kept_length(S, units[i])) if cuts else None,
                name=f"layer_{i}",
            )
            x_ND, tokens = layer(x_ND, tokens, lengths_B, draw, i)
        if self.scan and c.num_layers > 1:
            x_ND, tokens = self._scan_layers(x_ND, tokens, lengths_B, draw)
        if c.pre_norm:
            x_ND = Norm(c, name="final_norm")(x_ND)
        return EncoderOutput(x_ND.reshape(B, -1, c.d_model), tokens.weights_BK, tokens.positions_BK, tokens.scores_BK)

    def _scan_layers(
        self, x_ND: jax.Array, tokens: KeptTokens, lengths_B: jax.Array, draw: FocusDraw | None
    ) -> tuple[jax.Array, KeptTokens]:
        """Runs all layers but the first as one loop."""
        indices = np.arange(1, self.config.num_layers)
        scanned = nn.scan(
            nn.remat(_ScannedLayer, prevent_cse=False) if self.remat else _ScannedLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast)),
            length=len(indices),
        )
        step = scanned(self.config, self.precision, self.dropout, name="layers")
        carried, _ = step((x_ND, tokens), jnp.asarray(indices), lengths_B, draw)
        return carried


class _ScannedLayer(nn.Module):
    """A layer in the form of a loop body, for `nn.scan`."""

    config: EncoderConfig
    precision: Precision
    dropout: float

    @nn.compact
    def __call__(
        self, carried: tuple[jax.Array, KeptTokens], index: jax.Array, lengths_B: jax.Array, draw: FocusDraw | None
    ) -> tuple[tuple[jax.Array, KeptTokens], None]:
        layer = EncoderLayer(self.config, self.precision, self.dropout, name="layer")
        return layer(*carried, lengths_B, draw, index), None
