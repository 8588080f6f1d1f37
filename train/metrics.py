"""Accuracy, F1 and calibration of predictions. NumPy only.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..data.taxonomy import Task
from ..model.decode import Calibration, choose_all

NUM_BINS = 15  # of the expected calibration error, as in Guo et al. 2017


@dataclasses.dataclass(frozen=True, slots=True)
class LabelMetrics:
    """One label against the rest. A ratio without a denominator is 0, as in scikit-learn with `zero_division=0`.

    Attributes:
      name: the label.
      precision: share of the texts given this label that have it.
      recall: share of the texts with this label that were given it.
      f1: harmonic mean of the two; 0 where `support` is 0.
      support: number of texts that have the label.
      predicted: number of texts that were given it.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """The result of `evaluate`. All ratios lie between 0 and 1, are never NaN, and are 0 when there are no texts.

    Attributes:
      n: number of texts.
      accuracy: share of the texts whose labels are all right (multilabel: subset accuracy).
      macro_f1: mean F1 of the labels that occur among the targets or the predictions. This is scikit-learn's default
        for binary and multiclass tasks; for multilabel ones scikit-learn also counts, as 0, labels that occur nowhere,
        which tells more about the sample than about the model.
      micro_f1: F1 of all label decisions counted together; equals the accuracy unless multilabel.
      ece: expected calibration error, see `Reliability`.
      labels: one entry a label, in the task's order.
    """

    n: int
    accuracy: float
    macro_f1: float
    micro_f1: float
    ece: float
    labels: tuple[LabelMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence against truth in equal-width bins (Guo et al. 2017, "On Calibration of Modern Neural Networks", §2).

    Binary and multiclass: one decision a text; its confidence is the highest probability, and it is right when that
    label holds. Hierarchical: the same of the most probable leaf. Multilabel: one decision for each text and label; its
    confidence is the label's probability, and it is right when the label holds.

    Attributes:
      counts: (NUM_BINS,) int, decisions in each bin; bin m covers (m / NUM_BINS, (m + 1) / NUM_BINS], the first 0 too.
      confidence: (NUM_BINS,) mean confidence in each bin; 0 in empty ones.
      accuracy: (NUM_BINS,) share of right decisions in each bin; 0 in empty ones.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |accuracy − confidence| over the decisions (Guo et al. 2017, eq. 3)."""
        gap = np.abs(self.accuracy - self.confidence)
        return float((self.counts * gap).sum() / max(self.counts.sum(), 1))


def evaluate(task: Task, probs_NL: np.ndarray, targets_NL: np.ndarray, chosen_NL: np.ndarray) -> Metrics:
    """Compares predictions with the truth.

    Args:
      task: whose labels the columns are.
      probs_NL: (N, L) calibrated probabilities; N may be 0.
      targets_NL: (N, L) 1 where a label holds, else 0; any dtype.
      chosen_NL: (N, L) bool, the labels that were decided for (`model.decode.choose_all`).

    Raises:
      ValueError: the shapes differ, or a probability is NaN or infinite.
    """
    check_predictions(task, probs_NL, targets_NL, chosen_NL)
    held_NL, chosen_NL = targets_NL > 0.5, chosen_NL.astype(bool)
    hits_L = (held_NL & chosen_NL).sum(axis=0)
    support_L, predicted_L = held_NL.sum(axis=0), chosen_NL.sum(axis=0)

    precision_L = _ratio(hits_L, predicted_L)
    recall_L = _ratio(hits_L, support_L)
    f1_L = _ratio(2 * hits_L, support_L + predicted_L)
    occurs_L = support_L + predicted_L > 0

    labels = tuple(
        LabelMetrics(name, float(p), float(r), float(f1), int(support), int(predicted))
        for name, p, r, f1, support, predicted in zip(
            task.label_names, precision_L, recall_L, f1_L, support_L, predicted_L, strict=True
        )
    )
    return Metrics(
        n=len(probs_NL),
        accuracy=float(_ratio((held_NL == chosen_NL).all(axis=1).sum(), len(probs_NL))),
        macro_f1=float(_ratio(f1_L[occurs_L].sum(), occurs_L.sum())),
        micro_f1=float(_ratio(2 * hits_L.sum(), (support_L + predicted_L).sum())),
        ece=reliability(task, probs_NL, targets_NL).ece,
        labels=labels,
    )


def reliability(task: Task, probs_NL: np.ndarray, targets_NL: np.ndarray) -> Reliability:
    """Bins the decisions by confidence; arguments as for `evaluate`."""
    held_NL = targets_NL > 0.5
    if task.kind.exclusive:
        answer_NL = choose_all(task, probs_NL, Calibration())
        confidence, right = probs_NL[answer_NL], held_NL[answer_NL]
    else:
        confidence, right = probs_NL.ravel(), held_NL.ravel()
    confidence = confidence.astype(np.float64)
    # Bins are open below and closed above, hence ceil − 1.
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    return Reliability(
        counts=counts,
        confidence=_ratio(np.bincount(bins, confidence, NUM_BINS), counts),
        accuracy=_ratio(np.bincount(bins, right, NUM_BINS), counts),
    )


def check_predictions(task: Task, probs_NL: np.ndarray, targets_NL: np.ndarray, chosen_NL: np.ndarray) -> None:
    """Raises ValueError where the arrays do not belong together; arguments as for `evaluate`."""
    expected = (len(probs_NL), len(task.labels))
    for name, array in (("probabilities", probs_NL), ("targets", targets_NL), ("choices", chosen_NL)):
        if array.shape != expected:
            raise ValueError(f"Task '{task.name}': the {name} have the shape {array.shape}, not {expected}.")
    finite_N = np.asarray(np.isfinite(probs_NL).all(axis=1))
    if not finite_N.all():
        broken = int((~finite_N).sum())
        raise ValueError(
            f"Task '{task.name}': the probabilities of {broken} of {len(finite_N)} texts are not finite "
            f"(first: text {int(finite_N.argmin())}); the model's weights or logits have probably overflowed."
        )


def _ratio(top: Any, bottom: Any) -> np.ndarray:
    """Division in which anything over zero is 0."""
    top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    return np.divide(top, bottom, out=np.zeros(np.broadcast(top, bottom).shape), where=bottom > 0)
