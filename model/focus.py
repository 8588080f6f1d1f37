"""Focused Attention: which tokens a layer keeps. docs/focused-attention.md has the idea, the maths and the figures.

A *focus* is one share a layer; a layer keeps that share of each row's own tokens, by the scores of its gate. Kept
tokens stay in order and keep their positions; the others take no part in that layer or any after it. There are two
ways to compute the same thing:

- `select` gathers the kept tokens into shorter rows of a static length, so that time falls: for serving.
- `keep_bias` masks the others out, with shares that differ from row to row and may be drawn at random, and softly, for
  gradients to reach the gate: for training.

Axes: B batch, S sequence, K kept sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ..data.errors import InputError

# Shares are counted in units of 1/1024: whole numbers, so that Python, NumPy and a device agree on every length.
UNITS = 1024
# No row is cut below this many tokens: the two special ones, and some to read.
MIN_KEPT = 8
# A pyramid's layer keeps at least this share of what the one before it keeps.
STEEPEST = 0.5
# The score of a token that is always kept, and minus that of one that never is. Finite: their differences are not NaN.
SURE = 1e9


def is_gate(weight: str) -> bool:
    """Whether a weight of that name is a gate's."""
    return ".gate_" in weight


@dataclasses.dataclass(frozen=True)
class Focus:
    """How much each layer keeps.

    Attributes:
      units: one number a layer, non-increasing, in 1/1024 of a row's own length; 1024 is all.
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
        """One share in (0, 1] a layer, rounded to a unit."""
        return cls(tuple(max(1, round(share * UNITS)) for share in shares))

    @classmethod
    def pyramid(cls, focus: float, num_layers: int) -> Focus:
        """Keeps `focus` of all tokens on the mean over layers, each layer a constant factor less than the one before.

        The first layer reads everything, unless the others would then have to be cut by more than half each time.

        Raises:
          InputError: `focus` is not in (0, 1].
        """
        if focus == 1:
            return cls((UNITS,) * num_layers)
        if not 0 < focus < 1:
            raise InputError(f"A focus is a share of the tokens, above 0 and at most 1; it is {focus:g}.")

        def mean(factor: float) -> float:
            return sum(factor**layer for layer in range(num_layers)) / num_layers

        low, high = STEEPEST, 1.0
        start = min(1.0, focus / mean(low))
        for _ in range(50 if start == 1 else 0):  # bisection: the mean grows with the factor
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < focus else (low, middle)
        factor = high if start == 1 else STEEPEST
        return cls.from_shares([start * factor**layer for layer in range(num_layers)])

    @classmethod
    def parse(cls, text: str, num_layers: int) -> Focus:
        """What a user names: one number, for a `pyramid`, or one share a layer with commas between: "1,0.5,0.3".

        Raises:
          InputError: it is neither, or out of range.
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
        """As `parse` takes it."""
        return ",".join(f"{share / UNITS:.4g}" for share in self.units)

    @property
    def full(self) -> bool:
        return all(share == UNITS for share in self.units)

    @property
    def mean_share(self) -> float:
        return sum(self.units) / len(self.units) / UNITS

    def budget(self, length: int) -> tuple[int, ...]:
        """The kept length of each layer for rows of `length` tokens: static, non-increasing."""
        return tuple(kept_length(length, share) for share in self.units)


def kept_length(length: int, units: int) -> int:
    """⌈units / 1024 · length⌉, at least `MIN_KEPT`, at most `length`."""
    return min(length, max(MIN_KEPT, -(-length * units // UNITS)))


def kept_lengths(lengths_B: jax.Array, units: jax.Array | int) -> jax.Array:
    """`kept_length` of arrays: int32 (B,)."""
    return jnp.minimum(lengths_B, jnp.maximum(MIN_KEPT, -(-lengths_B * units // UNITS)))


def token_scores(gate_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The gate's scores, with the first and the last token of each row ([CLS], [SEP]) sure to stay, padding to go."""
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
      indices_BK, int32; beyond a row's own number they are S - 1 and mean nothing. Of equal scores the earlier token
      stays.
    """
    _, indices_BK = lax.top_k(scores_BS, length)
    mine_BK = jnp.arange(length) < kept_B[:, None]
    return jnp.sort(jnp.where(mine_BK, indices_BK, scores_BS.shape[1] - 1), axis=1)


def keep_bias(scores_BS: jax.Array, kept_B: jax.Array, temperature: jax.Array | float, hard_B: jax.Array) -> jax.Array:
    """Keeps the same tokens as `select` by masking: softly, with gradients to the scores, or in full.

    Soft, a token is kept to the degree m = σ((s − τ) / temperature), where τ lies midway between the last score kept
    and the first one dropped (soft top-k): log m is added to its attention scores. Hard, the kept tokens take part in
    full and the others not at all. Hard rows send the scores no gradient: a straight-through one hears only of what
    was kept, and makes gates worse (docs/focused-attention.md).

    Args:
      scores_BS: from `token_scores`.
      kept_B: how many each row keeps; a row that keeps all of its tokens is left as it is.
      temperature: of the sigmoid.
      hard_B: bool, the rows whose tokens below the cut take no part at all.

    Returns:
      log_keep_BS, float32: to add to the attention scores of these keys, ≤ 0; its exponential weighs the tokens in the
      pooling.
    """
    S = scores_BS.shape[1]
    order_BS = jnp.argsort(-scores_BS, axis=1, stable=True)
    rank_BS = jnp.argsort(order_BS, axis=1, stable=True)
    kept_BS = rank_BS < kept_B[:, None]
    sorted_BS = jnp.take_along_axis(scores_BS, order_BS, axis=1)
    lowest_kept_B1 = jnp.take_along_axis(sorted_BS, jnp.clip(kept_B - 1, 0, S - 1)[:, None], axis=1)
    highest_cut_B1 = jnp.take_along_axis(sorted_BS, jnp.clip(kept_B, 0, S - 1)[:, None], axis=1)
    # Where only sure tokens stand on one side of the cut, the other side alone says where it is.
    threshold_B1 = jnp.where(
        lowest_kept_B1 >= SURE, highest_cut_B1, jnp.where(highest_cut_B1 <= -SURE, lowest_kept_B1, 0.0)
    )
    both_B1 = (lowest_kept_B1 < SURE) & (highest_cut_B1 > -SURE)
    threshold_B1 = jnp.where(both_B1, (lowest_kept_B1 + highest_cut_B1) / 2, threshold_B1)
    soft_BS = jax.nn.log_sigmoid((scores_BS - threshold_B1) / temperature)
    soft_BS = jnp.where(jnp.abs(scores_BS) >= SURE, 0.0, soft_BS)  # specials stay, padding is masked elsewhere
    # In a row that drops nothing (but padding) nobody is dimmed.
    soft_BS = jnp.where(highest_cut_B1 <= -SURE, 0.0, soft_BS)
    return jnp.where(hard_B[:, None], jnp.where(kept_BS, 0.0, -SURE), soft_BS)
