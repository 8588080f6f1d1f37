"""What training minimises, for each kind of task.

Axes: B batch, L labels of one task.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from ..data.taxonomy import TaskKind


def classification_loss(
    kind: TaskKind,
    logits_BL: jax.Array,
    targets_BL: jax.Array,
    weights_B: jax.Array,
    *,
    label_smoothing: float = 0.0,
    class_weights_L: jax.Array | None = None,
) -> jax.Array:
    """The mean loss of a batch, in nats.

    Binary and multiclass: cross-entropy of the softmax with targets smoothed over all labels (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567, section 7). Multilabel: the mean over labels of the sigmoids' cross-entropies,
    not smoothed.

    Args:
      kind: of the task.
      logits_BL: float32.
      targets_BL: one-hot or multi-hot.
      weights_B: 1 for an example, 0 for a filler row, which then counts for nothing.
      label_smoothing: mass that moves from the target to the uniform distribution.
      class_weights_L: a factor for examples (single-label) or positives (multilabel) of each label; None for 1.

    Returns:
      A scalar: the sum of the weighted losses over the number of examples (at least 1).
    """
    if kind.exclusive:
        losses_B = optax.safe_softmax_cross_entropy(logits_BL, optax.smooth_labels(targets_BL, label_smoothing))
        if class_weights_L is not None:
            losses_B *= (targets_BL * class_weights_L).sum(axis=-1)
    else:
        losses_BL = optax.sigmoid_binary_cross_entropy(logits_BL, targets_BL)
        if class_weights_L is not None:
            losses_BL *= jnp.where(targets_BL > 0.5, class_weights_L, 1.0)
        losses_B = losses_BL.mean(axis=-1)
    return (losses_B * weights_B).sum() / jnp.maximum(weights_B.sum(), 1.0)


def balanced_class_weights(kind: TaskKind, targets_NL: jax.typing.ArrayLike) -> jax.Array:
    """Factors that make every label weigh the same in all, float32 (L,).

    Single-label: N / (labels that occur × examples with the label), so that the mean over examples is 1. Multilabel:
    negatives / positives, at most 100. A label without examples gets 1.
    """
    targets_NL = jnp.asarray(targets_NL)
    positives_L = targets_NL.sum(axis=0)
    if kind.exclusive:
        weights_L = len(targets_NL) / jnp.maximum(positives_L * (positives_L > 0).sum(), 1)
    else:
        weights_L = jnp.minimum((len(targets_NL) - positives_L) / jnp.maximum(positives_L, 1), 100.0)
    return jnp.where(positives_L > 0, weights_L, 1.0).astype(jnp.float32)
