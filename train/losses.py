"""The training loss: one for all kinds of tasks, mixed in a batch.

Axes: B batch, L labels of the whole taxonomy, G sets of siblings, D model width, V teachers' vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ..data.taxonomy import LabelTable
from ..model.sharding import constrain, fill_labels


class SoftTargets(NamedTuple):
    """A teacher's answers.

    Attributes:
      targets_BL: probabilities, as `classification_loss` takes targets.
      share_B: what they weigh beside the given labels, in [0, 1]; 0 for an example without them.
    """

    targets_BL: jax.Array
    share_B: jax.Array


def classification_loss(
    table: LabelTable,
    logits_BL: jax.Array,
    targets_BL: jax.Array,
    tasks_B: jax.Array,
    weights_B: jax.Array,
    *,
    label_smoothing: float = 0.0,
    class_weights_L: jax.Array | None = None,
    soft: SoftTargets | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """The mean negative log-likelihood of a batch's labels, in nats.

    Binary and multiclass: cross-entropy of the softmax. Hierarchical: the same among siblings, summed along the path to
    the given label (hierarchical softmax, Morin & Bengio 2005, https://proceedings.mlr.press/r5/morin05a.html).
    Multilabel: the sum over the task's labels of the sigmoids' cross-entropies. Softmax targets are smoothed over
    siblings (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7). An example's loss sees the labels of
    its own task alone.

    Args:
      table: of the taxonomy.
      logits_BL: float32.
      targets_BL: 1 for what the example is given, else 0; or probabilities. Of an exclusive task they sum to 1; labels
        above a given one are added here.
      tasks_B: int32, each example's task.
      weights_B: 1 for an example, 0 for a filler row, which then counts for nothing.
      label_smoothing: mass that moves from the targets to the uniform distribution over siblings.
      class_weights_L: a factor for examples (exclusive tasks) or positives (multilabel) of each label; None for 1.
      soft: a teacher's answers to some of the examples.
      temperature: T of distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531): the teacher's answers were
        softened with it, the logits are here, and the loss is multiplied by T², which keeps its gradients' size.

    Returns:
      A scalar: the sum of the weighted losses over the number of examples (at least 1).
    """
    losses_B = _example_losses(table, logits_BL, targets_BL, tasks_B, label_smoothing, class_weights_L)
    if soft is not None:
        soft_B = _teacher_losses(table, logits_BL, tasks_B, soft, temperature)
        losses_B = (1 - soft.share_B) * losses_B + soft.share_B * soft_B
    return (losses_B * weights_B).sum() / jnp.maximum(weights_B.sum(), 1.0)


def teacher_loss(
    table: LabelTable,
    logits_BL: jax.Array,
    tasks_B: jax.Array,
    weights_B: jax.Array,
    soft: SoftTargets,
    temperature: float,
) -> jax.Array:
    """The mean over the examples that a teacher answered of what its answers add to `classification_loss`.

    Arguments as there. NaN of a batch without any.
    """
    answered_B = weights_B * (soft.share_B > 0)
    soft_B = _teacher_losses(table, logits_BL, tasks_B, soft, temperature)
    mean = (soft_B * answered_B).sum() / jnp.maximum(answered_B.sum(), 1.0)
    return jnp.where(answered_B.any(), mean, jnp.nan)


def relation_loss(pooled_BD: jax.Array, vectors_BV: jax.Array, weights_B: jax.Array) -> jax.Array:
    """The difference between a student's and its teachers' similarities of the texts of a batch.

    The mean over pairs of different texts of the squared difference between the student's and the teachers' cosine
    similarity: relational knowledge distillation (Park et al. 2019, https://arxiv.org/abs/1904.05068) of the
    similarities of Tung & Mori 2019 (https://arxiv.org/abs/1907.09682). The vectors' sizes need not be the same.

    Args:
      pooled_BD: the student's vectors, as its head reads them.
      vectors_BV: the teachers'; zeros for an example without one, which then is in no pair.
      weights_B: 1 for an example, 0 for a filler row, which is in no pair either.

    Returns:
      A scalar in [0, 4]; 0 of a batch without any pair.
    """
    known_B = (weights_B > 0) & (vectors_BV != 0).any(axis=-1)
    pairs_BB = known_B[:, None] & known_B & ~jnp.eye(len(known_B), dtype=bool)
    squares_BB = (_cosines(pooled_BD) - _cosines(vectors_BV)) ** 2
    return jnp.where(pairs_BB, squares_BB, 0.0).sum() / jnp.maximum(pairs_BB.sum(), 1)


def _cosines(x_BD: jax.Array) -> jax.Array:
    """(B, B) cosine similarities of the rows, with those of zeros 0."""
    x_BD = x_BD.astype(jnp.float32)
    unit_BD = x_BD * lax.rsqrt(jnp.maximum((x_BD**2).sum(axis=-1, keepdims=True), 1e-12))
    return unit_BD @ unit_BD.T


def answers(table: LabelTable, logits_BL: jax.Array, tasks_B: jax.Array) -> jax.Array:
    """A classifier's probabilities of what can be given as an answer, as `classification_loss` takes targets.

    Exclusive tasks: of the leaves, 0 for inner labels. `decode.probabilities` on the device, for examples of all tasks.

    Args:
      table, logits_BL, tasks_B: see `classification_loss`.

    Returns:
      float32 (B, L); 0 for labels of other tasks.
    """
    log_probs_BL = constrain(_log_probs_of_siblings(table, logits_BL), "batch", None)
    path_BL, above_L = log_probs_BL, table.parent_L
    while (above_L >= 0).any():
        rows = np.flatnonzero(above_L >= 0)
        path_BL = path_BL.at[:, rows].add(log_probs_BL[:, above_L[rows]])
        above_L = np.where(above_L >= 0, table.parent_L[above_L], -1)
    leaf_L = np.ones(len(table.parent_L), bool)
    leaf_L[table.parent_L[table.parent_L >= 0]] = False
    probs_BL = jnp.where(table.exclusive_L, jnp.exp(path_BL), jax.nn.sigmoid(logits_BL))
    return jnp.where((tasks_B[:, None] == jnp.asarray(table.task_L)) & leaf_L, probs_BL, 0.0)


def _teacher_losses(
    table: LabelTable, logits_BL: jax.Array, tasks_B: jax.Array, soft: SoftTargets, temperature: float
) -> jax.Array:
    """(B,): T² times the cross-entropy with the teacher's answer."""
    return temperature**2 * _example_losses(table, logits_BL / temperature, soft.targets_BL, tasks_B, 0.0, None)


def _example_losses(
    table: LabelTable,
    logits_BL: jax.Array,
    targets_BL: jax.Array,
    tasks_B: jax.Array,
    label_smoothing: float,
    class_weights_L: jax.Array | None,
) -> jax.Array:
    """(B,); arguments as for `classification_loss`."""
    losses_B = jnp.zeros(len(logits_BL))
    if table.exclusive_L.any():
        losses_B += _sibling_cross_entropy(table, logits_BL, targets_BL, label_smoothing, class_weights_L)
    if not table.exclusive_L.all():
        losses_BL = optax.sigmoid_binary_cross_entropy(logits_BL, targets_BL)
        if class_weights_L is not None:
            losses_BL *= jnp.where(targets_BL > 0.5, class_weights_L, 1.0)
        mine_BL = (tasks_B[:, None] == jnp.asarray(table.task_L)) & ~table.exclusive_L
        losses_B += jnp.where(mine_BL, losses_BL, 0.0).sum(axis=-1)
    return losses_B


def _sibling_cross_entropy(
    table: LabelTable,
    logits_BL: jax.Array,
    targets_BL: jax.Array,
    label_smoothing: float,
    class_weights_L: jax.Array | None,
) -> jax.Array:
    """(B,): −Σ over the labels on the path of log P(label | parent); 0 for examples of multilabel tasks."""
    given_BL = jnp.where(table.exclusive_L, targets_BL, 0.0)
    held_BL = _with_ancestors(table.parent_L, given_BL)
    sizes_G = np.bincount(table.group_L, minlength=table.num_groups).astype(np.float32)
    mass_BL = _sum_of_siblings(table, held_BL)
    smooth_BL = (1 - label_smoothing) * held_BL + label_smoothing * mass_BL / sizes_G[table.group_L]
    losses_B = -(smooth_BL * _log_probs_of_siblings(table, logits_BL)).sum(axis=-1)
    if class_weights_L is not None:
        losses_B *= (given_BL * class_weights_L).sum(axis=-1)
    return losses_B


def _log_probs_of_siblings(table: LabelTable, logits_BL: jax.Array) -> jax.Array:
    """(B, L): the log of each label's probability given the label above it."""
    shifted_BL = logits_BL - _of_siblings(jax.ops.segment_max, table, lax.stop_gradient(logits_BL))
    return shifted_BL - jnp.log(_sum_of_siblings(table, jnp.exp(shifted_BL)))


def _sum_of_siblings(table: LabelTable, x_BL: jax.Array) -> jax.Array:
    """(B, L): for each label the sum over it and its siblings."""
    return _of_siblings(jax.ops.segment_sum, table, x_BL)


def _of_siblings(segments: Callable[..., jax.Array], table: LabelTable, x_BL: jax.Array) -> jax.Array:
    """(B, L): for each label what `segments` makes of it and its siblings; fillers are each other's siblings."""
    filled_BL = fill_labels(x_BL)
    fill = filled_BL.shape[1] - x_BL.shape[1]
    group_L = np.pad(table.group_L, (0, fill), constant_values=table.num_groups)
    return segments(filled_BL.T, group_L, table.num_groups + (fill > 0))[group_L].T[:, : x_BL.shape[1]]


def _with_ancestors(parent_L: np.ndarray, given_BL: jax.Array) -> jax.Array:
    """`data.taxonomy.with_ancestors` on the device, where all labels of a row are on one."""
    given_BL = constrain(given_BL, "batch", None)
    held_BL, above_L = given_BL, parent_L
    while (above_L >= 0).any():
        rows = np.flatnonzero(above_L >= 0)
        held_BL = held_BL.at[:, above_L[rows]].add(given_BL[:, rows])
        above_L = np.where(above_L >= 0, parent_L[above_L], -1)
    return constrain(held_BL, "batch", None)


def balanced_class_weights(table: LabelTable, positives_L: np.ndarray, examples_T: np.ndarray) -> jax.Array:
    """Factors that make every label of a task weigh the same in all, float32 (L,).

    Exclusive tasks: examples of the task / (its labels that occur × examples with the label), so that the mean over
    examples is 1. Multilabel: negatives / positives, at most 100. A label without examples gets 1.

    Args:
      table: of the taxonomy.
      positives_L: examples with each label.
      examples_T: examples of each task.
    """
    examples_L = np.asarray(examples_T)[table.task_L]
    occurring_L = np.bincount(table.task_L, positives_L > 0, len(examples_T))[table.task_L]
    positive_L = np.maximum(positives_L, 1)
    balanced_L = np.where(
        table.exclusive_L,
        examples_L / (positive_L * np.maximum(occurring_L, 1)),
        np.minimum((examples_L - positives_L) / positive_L, 100.0),
    )
    return jnp.asarray(np.where(positives_L > 0, balanced_L, 1.0), jnp.float32)
