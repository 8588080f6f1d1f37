"""Temperature scaling, and per-label thresholds, both fitted on dev.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array
from scipy.special import logsumexp

from ..data.taxonomy import Task, with_ancestors
from ..model.decode import Calibration, probabilities

# A dev set without a single error would drive the temperature to 0, and one without signal to infinity.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0
DEFAULT_THRESHOLD = 0.5  # where dev has no labels at all
NAMED = 3  # labels that a sentence names


def fit_calibration(task: Task, logits_NL: np.ndarray, targets_NL: np.ndarray) -> Calibration:
    """Fits a task's temperature and, when it is multilabel, one threshold a label.

    The temperature minimises the negative log-likelihood (Guo et al. 2017, "On Calibration of Modern Neural Networks",
    §4.2) between MIN_TEMPERATURE and MAX_TEMPERATURE, and is 1 where nothing does better, so that the likelihood of the
    dev set never falls. Thresholds are those of `fit_thresholds` at that temperature.

    Args:
      task: whose labels the columns are.
      logits_NL: (N, L) uncalibrated outputs on texts that the model was not trained on; N may be 0 (temperature 1).
      targets_NL: (N, L) 1 where a label holds, else 0.

    Raises:
      ValueError: the shapes differ, or a logit is NaN or infinite.
    """
    expected = (len(logits_NL), len(task.labels))
    if logits_NL.shape != expected or targets_NL.shape != expected:
        raise ValueError(
            f"Task '{task.name}': calibration needs logits and targets of the shape {expected}, "
            f"not {logits_NL.shape} and {targets_NL.shape}."
        )
    if not np.isfinite(logits_NL).all():
        raise ValueError(f"Task '{task.name}': some logits are not finite, so there is nothing to calibrate.")

    temperature = _fit_temperature(task, logits_NL, targets_NL) if len(logits_NL) else 1.0
    if task.kind.exclusive:
        return Calibration(temperature)
    return Calibration(
        temperature, fit_thresholds(probabilities(task, logits_NL, Calibration(temperature)), targets_NL)
    )


def fit_thresholds(probs_NL: np.ndarray, targets_NL: np.ndarray) -> tuple[float, ...]:
    """A multilabel task's thresholds, each the best for its label's F1; see `best_threshold`.

    A label without texts gets the median of the other thresholds; where no text has any label, all get
    DEFAULT_THRESHOLD. `without_thresholds` is the warning for the user.

    Args:
      probs_NL: (N, L) calibrated probabilities; N may be 0.
      targets_NL: (N, L) 1 where a label holds, else 0.
    """
    held_NL = targets_NL > 0.5
    thresholds_L = np.array([best_threshold(p_N, held_N) for p_N, held_N in zip(probs_NL.T, held_NL.T, strict=True)])
    known_L = held_NL.any(axis=0)
    if known_L.any():
        thresholds_L[~known_L] = np.median(thresholds_L[known_L])
    return tuple(thresholds_L.tolist())


def without_thresholds(task: Task, targets: csr_array) -> str:
    """A sentence about the labels of a multilabel task whose thresholds `fit_thresholds` cannot choose; empty for none.

    Args:
      task: whose labels the columns are.
      targets: sparse (N, L), of the dev set.
    """
    missing = [] if task.kind.exclusive else np.flatnonzero(targets.sum(axis=0) == 0).tolist()
    if not missing:
        return ""
    names = ", ".join(f"'{task.label_names[i]}'" for i in missing[:NAMED])
    more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
    instead = "the median of the others'" if len(missing) < len(task.labels) else str(DEFAULT_THRESHOLD)
    return (
        f"Task '{task.name}': no example for development has {names}{more} (of {len(task.labels):,} labels), by which "
        f"to choose a threshold; it is {instead}."
    )


def negative_log_likelihood(task: Task, logits_NL: np.ndarray, targets_NL: np.ndarray, temperature: float) -> float:
    """Mean over the texts (multilabel: over texts and labels), in nats; shapes as for `fit_calibration`."""
    scaled_NL = logits_NL.astype(np.float64) / temperature
    if task.kind.exclusive:
        # −log P(label) is a sum over its path; a label that stands above the given one counts with it.
        held_NL, losses_N = with_ancestors(task.parent_L, targets_NL), np.zeros(len(scaled_NL))
        for group in range(int(task.group_L.max()) + 1):
            siblings = np.flatnonzero(task.group_L == group)
            if len(siblings) > 1:
                mass_N = held_NL[:, siblings].sum(axis=1)
                losses_N += mass_N * logsumexp(scaled_NL[:, siblings], axis=1)
                losses_N -= (held_NL[:, siblings] * scaled_NL[:, siblings]).sum(axis=1)
        return float(np.mean(losses_N))
    # −log σ(z) = log(1 + exp(−z)), and a label that does not hold adds z.
    return float(np.mean(np.logaddexp(0.0, -scaled_NL) + (1.0 - targets_NL) * scaled_NL))


def best_threshold(probs_N: np.ndarray, held_N: np.ndarray) -> float:
    """The threshold for `probs_N >= threshold` of the highest F1; of equals, the one nearest 0.5.

    Candidates are 0.5 and the middles between neighbouring probabilities, which leave new texts a margin on both
    sides. Without a positive text F1 says nothing, and the answer is 0.5.

    Args:
      probs_N: (N,) a label's calibrated probabilities.
      held_N: (N,) bool, where it holds.
    """
    if not held_N.any():
        return DEFAULT_THRESHOLD
    order = np.argsort(-probs_N, kind="stable")
    falling_N, hits_N = probs_N[order], np.cumsum(held_N[order])

    levels = np.unique(np.concatenate([[0.0], probs_N]).astype(probs_N.dtype))
    below, above = levels[:-1], levels[1:]
    middle = below + (above - below) / 2
    # Between neighbouring floats the middle rounds down and would let the lower one in.
    candidates = np.append(np.where(middle > below, middle, above), probs_N.dtype.type(DEFAULT_THRESHOLD))

    chosen = np.searchsorted(-falling_N, -candidates, side="right")
    f1 = 2 * np.where(chosen > 0, hits_N[chosen - 1], 0) / (chosen + held_N.sum())
    distance = np.abs(candidates - DEFAULT_THRESHOLD)
    return float(candidates[np.lexsort((distance, -f1))[0]])


def _fit_temperature(task: Task, logits_NL: np.ndarray, targets_NL: np.ndarray) -> float:
    def nll(log_temperature: float) -> float:
        return negative_log_likelihood(task, logits_NL, targets_NL, math.exp(log_temperature))

    # The loss is convex in 1/T, so it has one valley in log T too.
    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    # A gain within rounding is none: it would let logits that say nothing pick any temperature.
    return math.exp(found.x) if found.fun < nll(0.0) - 1e-9 else 1.0
