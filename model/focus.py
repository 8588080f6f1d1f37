"""Focused Attention: which tokens a layer keeps. docs/internals/focus.md has the idea, the maths and the figures.

A *focus* is a share for each layer. A layer keeps that share of each row's own tokens, those with the highest scores of
its gate, which reads the activations after the layer's attention. Kept tokens stay in order and keep their positions;
dropped ones take no part in the layer's feed-forward or in any later layer. There are two implementations:

- `gather`, for serving, copies the kept tokens into shorter rows of a static length, so that computing takes less time.
- `mask`, for training, leaves dropped tokens in place and hides them from later layers. Shares may differ from row to
  row, and soft masks let gradients reach the gate.

Axes: B batch, S sequence, K kept sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..data.errors import InputError
from .config import EncoderConfig

# Shares are counted in units of 1/1024: whole numbers, so that Python, NumPy and a device agree on every length.
UNITS = 1024
# No row is cut below this many tokens: the two special ones and a few others.
MIN_KEPT = 8
# A layer of a pyramid keeps at least this share of its input.
STEEPEST = 0.5
# Added to the attention score of a masked key. Finite, so that a row of padding alone gives uniform weights, not NaN.
MASKED_SCORE = -1e9
# The score of a token that is always kept; its negative, of one that never is. Finite: their differences are not NaN.
SURE = 1e9


def is_gate(weight: str) -> bool:
    """Whether a weight of that name is a gate's."""
    return ".gate." in weight


@dataclasses.dataclass(frozen=True)
class Focus:
    """The share of a row's tokens that each layer keeps.

    Attributes:
      units: one share for each layer, non-increasing, in 1/1024 of a row's own length; 1024 keeps all.
    """

    units: tuple[int, ...]

    def __post_init__(self) -> None:
        before = UNITS
        for layer, share in enumerate(self.units):
            if not 1 <= share <= before:
                raise InputError(
                    f"Layer {layer} of a focus keeps {share} of {UNITS} parts; it must be between 1 and what the layer "
                    f"before it keeps ({before})."
                )
            before = share

    @classmethod
    def from_shares(cls, shares: Sequence[float]) -> Focus:
        """From one share in (0, 1] for each layer, rounded to a unit."""
        return cls(tuple(max(1, round(share * UNITS)) for share in shares))

    @classmethod
    def pyramid(cls, focus: float, num_layers: int) -> Focus:
        """Keeps the share `focus` on average over layers; each layer keeps the same share of its input.

        That share is at least `STEEPEST`; where less is needed, the first layer drops more than the others.

        Raises:
          InputError: `focus` is not in (0, 1].
        """
        if focus == 1:
            return cls((UNITS,) * num_layers)
        if not 0 < focus < 1:
            raise InputError(f"A focus is a share of the tokens, above 0 and at most 1; it is {focus:g}.")

        def mean(factor: float) -> float:
            return sum(factor ** (layer + 1) for layer in range(num_layers)) / num_layers

        low, high = STEEPEST, 1.0
        start = min(1.0, focus / mean(low))
        for _ in range(50 if start == 1 else 0):  # bisection: the mean grows with the factor
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < focus else (low, middle)
        factor = high if start == 1 else STEEPEST
        return cls.from_shares([start * factor ** (layer + 1) for layer in range(num_layers)])

    @classmethod
    def parse(cls, text: str, num_layers: int) -> Focus:
        """Parses one number, for a `pyramid`, or one share for each layer with commas between, such as "1,0.5,0.3".

        Raises:
          InputError: the text is neither, or a share is out of range.
        """
        try:
            shares = [float(part) for part in text.split(",")]
        except ValueError:
            shares = []
        if len(shares) == 1:
            return cls.pyramid(shares[0], num_layers)
        if len(shares) != num_layers or not all(0 < share <= 1 for share in shares):
            raise InputError(
                f"A focus is one number above 0 and at most 1, or {num_layers} such numbers with commas between them, "
                f"one a layer; it is '{text}'."
            )
        return cls.from_shares(shares)

    def __str__(self) -> str:
        """The form that `parse` reads."""
        return ",".join(f"{share / UNITS:.4g}" for share in self.units)

    @property
    def full(self) -> bool:
        return all(share == UNITS for share in self.units)

    @property
    def mean_share(self) -> float:
        return sum(self.units) / len(self.units) / UNITS

    def budget(self, length: int) -> tuple[int, ...]:
        """The number of tokens that each layer keeps of rows of `length` tokens: static, non-increasing."""
        return tuple(kept_length(length, share) for share in self.units)


def check_focus(focus: Focus, encoder: EncoderConfig) -> None:
    """Raises InputError if a focus drops tokens, but the encoder has no gates to choose them."""
    if not focus.full and not encoder.gated:
        raise InputError(
            "This model was not trained for focus: its encoder has no gates. Train it with --focus-epochs, or leave "
            "the focus at 1."
        )


class FocusDraw(NamedTuple):
    """A random focus for training, drawn for each row and step.

    Attributes:
      units_BI: int32, the share that each row keeps in each of the I layers, in `focus.UNITS`, non-increasing along I.
      temperature: of the gates' sigmoid.
      hard_B: bool, the rows whose dropped tokens take no part at all.
    """

    units_BI: jax.Array
    temperature: jax.Array
    hard_B: jax.Array


class KeptTokens(NamedTuple):
    """The tokens that are left after some layer.

    Attributes:
      weights_BK: float32, their weights in a mean: 0 for padding, 1 for a real token, between the two in a soft row.
      positions_BK: int32, their places in the text.
      scores_BK: float32, by the last gate that dropped tokens.
      bias_BK: float32, added to their attention scores as keys.
    """

    weights_BK: jax.Array
    positions_BK: jax.Array
    scores_BK: jax.Array
    bias_BK: jax.Array


def all_tokens(lengths_B: jax.Array, length: int) -> KeptTokens:
    """All tokens of rows of `length`, before any layer dropped some."""
    shape = (lengths_B.shape[0], length)  # which may be symbolic, where `len` may not
    positions_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    real_BS = positions_BS < lengths_B[:, None]
    bias_BS = jnp.where(real_BS, 0.0, MASKED_SCORE)
    return KeptTokens(real_BS.astype(jnp.float32), positions_BS, jnp.zeros(shape, jnp.float32), bias_BS)


def gather(
    x_ND: jax.Array, tokens: KeptTokens, gate_BS: jax.Array, lengths_B: jax.Array, units: int, length: int
) -> tuple[jax.Array, KeptTokens]:
    """Copies each row's tokens of highest score into rows of `length`, for serving.

    Args:
      x_ND: activations.
      tokens: those left so far.
      gate_BS: the gate's scores of them.
      lengths_B: the rows' own lengths, before any layer dropped tokens.
      units: the share of those lengths to keep.
      length: K, static: how many tokens a row that fills the bucket keeps.
    """
    B, S = gate_BS.shape
    left_B = tokens.weights_BK.sum(axis=1).astype(jnp.int32)
    scores_BS = token_scores(gate_BS, left_B)
    kept_B = kept_lengths(lengths_B, units)
    indices_BK = select(scores_BS, kept_B, length)
    kept_BK = jnp.arange(length) < kept_B[:, None]
    gathered = KeptTokens(
        weights_BK=kept_BK.astype(jnp.float32),
        positions_BK=jnp.take_along_axis(tokens.positions_BK, indices_BK, axis=1),
        scores_BK=jnp.take_along_axis(scores_BS, indices_BK, axis=1),
        bias_BK=jnp.where(kept_BK, 0.0, MASKED_SCORE),
    )
    return x_ND[(jnp.arange(B)[:, None] * S + indices_BK).reshape(-1)], gathered


def mask(
    tokens: KeptTokens, gate_BS: jax.Array, lengths_B: jax.Array, draw: FocusDraw, layer: jax.Array | int
) -> KeptTokens:
    """Masks the tokens that `gather` would drop, with a budget for each row, for training."""
    # In a hard row a token that was dropped stays so.
    scores_BS = jnp.where(tokens.weights_BK > 0, token_scores(gate_BS, lengths_B), -SURE)
    kept_B = kept_lengths(lengths_B, draw.units_BI[:, layer])
    log_keep_BS = keep_bias(scores_BS, kept_B, draw.temperature, draw.hard_B)
    return tokens._replace(
        weights_BK=tokens.weights_BK * jnp.exp(log_keep_BS),
        scores_BK=scores_BS,
        bias_BK=jnp.maximum(tokens.bias_BK + log_keep_BS, MASKED_SCORE),
    )


def kept_length(length: int, units: int) -> int:
    """⌈units / 1024 · length⌉, at least `MIN_KEPT`, at most `length`."""
    return min(length, max(MIN_KEPT, -(-length * units // UNITS)))


def kept_lengths(lengths_B: jax.Array, units: jax.Array | int) -> jax.Array:
    """`kept_length` for arrays: int32 (B,)."""
    return jnp.minimum(lengths_B, jnp.maximum(MIN_KEPT, -(-lengths_B * units // UNITS)))


def token_scores(gate_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The gate's scores, replaced by `SURE` for each row's first and last token ([CLS], [SEP]), -`SURE` for padding."""
    position_S = jnp.arange(gate_BS.shape[1])
    last_B1 = lengths_B[:, None] - 1
    special_BS = (position_S == 0) | (position_S == last_B1)
    return jnp.where(position_S > last_B1, -SURE, jnp.where(special_BS, SURE, gate_BS))


def select(scores_BS: jax.Array, kept_B: jax.Array, length: int) -> jax.Array:
    """The places of each row's kept tokens, in order.

    Args:
      scores_BS: from `token_scores`.
      kept_B: how many each row keeps, at most `length`.
      length: K, the static length of the rows to gather.

    Returns:
      indices_BK, int32; beyond a row's own number they are S - 1 and meaningless. Of equal scores the earlier token
      stays.
    """
    _, indices_BK = lax.top_k(scores_BS, length)
    mine_BK = jnp.arange(length) < kept_B[:, None]
    return jnp.sort(jnp.where(mine_BK, indices_BK, scores_BS.shape[1] - 1), axis=1)


def keep_bias(scores_BS: jax.Array, kept_B: jax.Array, temperature: jax.Array | float, hard_B: jax.Array) -> jax.Array:
    """The logarithm of the degree to which each token is kept: `select` as a mask, soft or hard.

    Added to the attention scores of the tokens as keys; its exponential weighs the tokens in the pooling. Hard rows
    send the scores no gradient: a straight-through estimator sees only the tokens that were kept, and trains worse
    gates (docs/internals/tried-and-rejected.md).

    Args:
      scores_BS: from `token_scores`.
      kept_B: how many tokens each row keeps.
      temperature: of the sigmoid of soft rows.
      hard_B: bool, the rows whose dropped tokens take no part at all.

    Returns:
      log_keep_BS, float32, ≤ 0.
    """
    order_BS = jnp.argsort(-scores_BS, axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1, stable=True)
    hard_BS = jnp.where(rank_BS < kept_B[:, None], 0.0, -SURE)
    lowest_kept_B1, highest_cut_B1 = _scores_at_the_cut(scores_BS, order_BS, kept_B)
    soft_BS = _soft_bias(scores_BS, lowest_kept_B1, highest_cut_B1, temperature)
    return jnp.where(hard_B[:, None], hard_BS, soft_BS)


def _scores_at_the_cut(scores_BS: jax.Array, order_BS: jax.Array, kept_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's last score that is kept and its first one that is dropped, both (B, 1).

    In a row that keeps all S tokens the two are the same, its lowest score.
    """
    last = scores_BS.shape[1] - 1
    sorted_BS = jnp.take_along_axis(scores_BS, order_BS, axis=1)
    lowest_kept_B1 = jnp.take_along_axis(sorted_BS, jnp.clip(kept_B - 1, 0, last)[:, None], axis=1)
    highest_cut_B1 = jnp.take_along_axis(sorted_BS, jnp.clip(kept_B, 0, last)[:, None], axis=1)
    return lowest_kept_B1, highest_cut_B1


def _soft_bias(
    scores_BS: jax.Array, lowest_kept_B1: jax.Array, highest_cut_B1: jax.Array, temperature: jax.Array | float
) -> jax.Array:
    """log σ((s − τ) / temperature), with τ midway between the two scores at the cut (soft top-k).

    A row that drops only padding is left as it is, unless it fills its bucket: then τ is its lowest score. A first gate
    that keeps everything learns by that alone, and the gates behind it learnt less without it
    (`test_the_gate_learns_which_token_matters`).
    """
    # Where one side of the cut has only tokens whose fate is sure, the score on the other side is the threshold.
    threshold_B1 = jnp.where(
        lowest_kept_B1 >= SURE, highest_cut_B1, jnp.where(highest_cut_B1 <= -SURE, lowest_kept_B1, 0.0)
    )
    both_B1 = (lowest_kept_B1 < SURE) & (highest_cut_B1 > -SURE)
    threshold_B1 = jnp.where(both_B1, (lowest_kept_B1 + highest_cut_B1) / 2, threshold_B1)
    soft_BS = jax.nn.log_sigmoid((scores_BS - threshold_B1) / temperature)
    soft_BS = jnp.where(jnp.abs(scores_BS) >= SURE, 0.0, soft_BS)  # special tokens stay, padding is masked elsewhere
    return jnp.where(highest_cut_B1 <= -SURE, 0.0, soft_BS)  # nothing is dropped
