"""Logits → probabilities → labels, the same in evaluation and in serving. NumPy only.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data.errors import InputError
from ..data.taxonomy import Task, TaskKind


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One task's temperature and thresholds, fitted on the dev set.

    Attributes:
      temperature: divides the logits (Guo et al. 2017, "On Calibration of Modern Neural Networks", §4.2); above 1 it
        flattens the probabilities. Positive and finite.
      thresholds: multilabel only, one a label: a label is chosen when its probability reaches its threshold. None
        means that no label can be chosen (see `choose`).

    Raises:
      InputError: a temperature or threshold out of range.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"A calibration's temperature must be positive and finite, not {self.temperature}.")
        for i, threshold in enumerate(self.thresholds or ()):
            if not 0.0 <= threshold <= 1.0:
                raise InputError(f"A calibration's threshold {i} must lie between 0 and 1, not {threshold}.")

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"temperature": self.temperature}
        if self.thresholds is not None:
            data["thresholds"] = list(self.thresholds)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> Calibration:
        """Reads what `to_json` wrote; `source` names the file in errors (InputError)."""
        try:
            thresholds = data.get("thresholds")
            return cls(
                temperature=float(data["temperature"]),
                thresholds=None if thresholds is None else tuple(float(t) for t in thresholds),
            )
        except KeyError:
            raise InputError(f"{source}: the calibration has no field 'temperature'.") from None
        except (TypeError, ValueError, AttributeError):
            raise InputError(f"{source}: the calibration must hold numbers, but is {data!r}.") from None
        except InputError as e:
            raise InputError(f"{source}: {e}") from None


def probabilities(task: Task, logits_NL: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Calibrated probabilities of one task's labels.

    Binary and multiclass: a softmax (each row sums to 1). Multilabel: a sigmoid a label. Hierarchical: a softmax among
    siblings, multiplied along the path from the top (a hierarchical softmax), so that the leaves of each row sum to 1
    and a label's probability is the sum over the labels below it. Computed in float64: finite logits of any size give
    finite probabilities. A NaN logit makes its own row NaN (one label of it when multilabel), and no other row.

    Args:
      task: the columns are its labels.
      logits_NL: (N, L) any float dtype; N may be 0.
      calibration: the task's.

    Returns:
      (N, L) float32.

    Raises:
      ValueError: the last axis is not the task's number of labels.
    """
    _check_width(task, logits_NL.shape)
    scaled_NL = np.asarray(logits_NL, np.float64) / calibration.temperature
    if task.kind is TaskKind.HIERARCHICAL:
        probs_NL = _along_paths(task, _softmax_of_siblings(task, scaled_NL))
        return probs_NL.astype(np.float32)
    if task.kind.exclusive:
        with np.errstate(invalid="ignore"):  # a row of inf or NaN stays NaN, without a warning
            exp_NL = np.exp(scaled_NL - scaled_NL.max(axis=-1, keepdims=True))
        return (exp_NL / exp_NL.sum(axis=-1, keepdims=True)).astype(np.float32)
    # exp of the negative magnitude never overflows; the two branches of the sigmoid share it.
    exp_NL = np.exp(-np.abs(scaled_NL))
    return (np.where(scaled_NL >= 0, 1.0, exp_NL) / (1.0 + exp_NL)).astype(np.float32)


def _softmax_of_siblings(task: Task, scaled_NL: np.ndarray) -> np.ndarray:
    """Each label's probability given its parent."""
    order = np.argsort(task.group_L, kind="stable")
    starts = np.flatnonzero(np.diff(task.group_L[order], prepend=-1))
    groups_L = task.group_L
    with np.errstate(invalid="ignore"):
        highest_NG = np.maximum.reduceat(scaled_NL[:, order], starts, axis=1)
        exp_NL = np.exp(scaled_NL - highest_NG[:, groups_L])
        return exp_NL / np.add.reduceat(exp_NL[:, order], starts, axis=1)[:, groups_L]


def _along_paths(task: Task, given_parent_NL: np.ndarray) -> np.ndarray:
    """Products of the conditional probabilities from the top down; in place."""
    for depth in range(1, int(task.depth_L.max()) + 1):
        level = np.flatnonzero(task.depth_L == depth)
        given_parent_NL[:, level] *= given_parent_NL[:, task.parent_L[level]]
    return given_parent_NL


def choose(task: Task, probs_L: np.ndarray, calibration: Calibration, threshold: float | None = None) -> list[int]:
    """The chosen labels, as positions within the task, in the task's order.

    Binary and multiclass: the most probable label (the first of equals). Multilabel: all that reach their thresholds,
    perhaps none. Hierarchical: the most probable leaf; with a threshold, the first label from that leaf upwards that
    reaches it, or else the topmost, so that an uncertain answer stops at an inner label.

    Args:
      task: the probabilities are of its labels.
      probs_L: (L,) from `probabilities`.
      calibration: the task's.
      threshold: the least probability of a hierarchical task's answer; None for none. Other kinds ignore it.

    Raises:
      ValueError: the number of probabilities or of thresholds is not the task's number of labels; a multilabel task has
        no thresholds.
    """
    return np.flatnonzero(choose_all(task, probs_L[None], calibration, threshold)[0]).tolist()


def choose_all(
    task: Task, probs_NL: np.ndarray, calibration: Calibration, threshold: float | None = None
) -> np.ndarray:
    """`choose` for many texts: (N, L) probabilities → (N, L) bool, True where a label is chosen. Raises as `choose`."""
    _check_width(task, probs_NL.shape)
    if task.kind is TaskKind.HIERARCHICAL:
        best_N = np.where(task.leaves_L, probs_NL, -1.0).argmax(axis=-1)
        rows_N = np.arange(len(probs_NL))
        for _ in range(int(task.depth_L.max()) if threshold is not None else 0):
            unsure_N = (probs_NL[rows_N, best_N] < threshold) & (task.parent_L[best_N] >= 0)
            best_N = np.where(unsure_N, task.parent_L[best_N], best_N)
        return best_N[:, None] == np.arange(len(task.labels))
    if task.kind.exclusive:
        return probs_NL.argmax(axis=-1)[:, None] == np.arange(len(task.labels))
    if calibration.thresholds is None:
        raise ValueError(f"Task '{task.name}' is multilabel, but its calibration has no thresholds to choose by.")
    count = len(calibration.thresholds)
    if count != len(task.labels):
        raise ValueError(f"Task '{task.name}' has {len(task.labels)} labels, its calibration {count} thresholds.")
    # In the dtype of the probabilities, so that a threshold equal to one of them admits it.
    return probs_NL >= np.asarray(calibration.thresholds, probs_NL.dtype)


def _check_width(task: Task, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] != len(task.labels):
        raise ValueError(f"Task '{task.name}' has {len(task.labels)} labels, so needs an array (N, that), not {shape}.")
