"""Calibrated probabilities from logits in traceable JAX, equivalent to `model.decode.probabilities`.

Axes: B texts, L labels of one task, G sets of siblings, M the most members of one, P the longest path of a tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from classer.data.taxonomy import Task, TaskKind, Taxonomy
from classer.model.decode import Calibration
from classer.model.focus import MASKED_SCORE


class Tree(NamedTuple):
    """Index arrays that decode a hierarchical task with gathers, one softmax and one product.

    Attributes:
      members_GM: int64, the labels of each set of siblings, padded with L. L indexes a column of `MASKED_SCORE` that is
        appended to the logits.
      place_L: int64, each label's index in the flattened `members_GM`.
      path_LP: int64, each label followed by its ancestors, padded with L. L indexes a column of ones that is appended
        to the conditional probabilities.
    """

    members_GM: np.ndarray
    place_L: np.ndarray
    path_LP: np.ndarray


def tree_of(task: Task) -> Tree:
    L = len(task.labels)
    groups = [np.flatnonzero(task.group_L == group) for group in np.unique(task.group_L)]
    members_GM = np.full((len(groups), max(map(len, groups))), L, np.int64)
    place_L = np.zeros(L, np.int64)
    for i, group in enumerate(groups):
        members_GM[i, : len(group)] = group
        place_L[group] = i * members_GM.shape[1] + np.arange(len(group))
    columns = [np.arange(L)]
    for _ in range(int(task.depth_L.max())):
        above_L = columns[-1]
        columns.append(np.where(above_L < L, np.append(task.parent_L, -1)[above_L], -1))
        columns[-1][columns[-1] < 0] = L
    return Tree(members_GM, place_L, np.stack(columns, axis=1).astype(np.int64))


def traced_probabilities(
    taxonomy: Taxonomy, calibration: Mapping[str, Calibration], logits_BL: jax.Array | np.ndarray
) -> jax.Array:
    """Probabilities of all labels of all tasks, float32 (B, all labels), in the taxonomy's order."""
    logits_BL = jnp.asarray(logits_BL)
    parts = [
        _task_probabilities(task, logits_BL[:, taxonomy.slice_of(task.name)] / calibration[task.name].temperature)
        for task in taxonomy.tasks
    ]
    return jnp.concatenate(parts, axis=1)


def _task_probabilities(task: Task, scaled_BL: jax.Array) -> jax.Array:
    if task.kind is TaskKind.MULTILABEL:
        return jax.nn.sigmoid(scaled_BL)
    if task.kind is not TaskKind.HIERARCHICAL:
        return jax.nn.softmax(scaled_BL, axis=1)
    tree = tree_of(task)
    filled_BL = jnp.pad(scaled_BL, ((0, 0), (0, 1)), constant_values=MASKED_SCORE)
    siblings_BGM = jax.nn.softmax(filled_BL[:, tree.members_GM], axis=-1)
    given_parent_BL = siblings_BGM.reshape(siblings_BGM.shape[0], -1)[:, tree.place_L]
    filled_BL = jnp.pad(given_parent_BL, ((0, 0), (0, 1)), constant_values=1.0)
    return filled_BL[:, tree.path_LP].prod(axis=-1)
