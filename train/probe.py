"""An initial head: linear discriminant analysis of the pretrained encoder's features.

Fine-tuning from a random head first bends the encoder towards noise. From a head that already separates the classes it
keeps more of the pretrained features (Kumar et al. 2022, https://arxiv.org/abs/2202.10054: linear probing, then
fine-tuning).

Axes: N examples, D features, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array
from scipy.special import logsumexp

from ..data.taxonomy import Task, Taxonomy, with_ancestors
from ..model.config import EncoderConfig
from ..model.precision import Precision
from ..model.predict import Predictor
from ..model.quantize import Weights
from .calibration import fit_calibration
from .config import Recipe
from .tokenized import TokenizedSplit

# Share of the identity in the covariance (Friedman 1989): keeps it invertible with few examples.
SHRINKAGE = 0.02
# More examples than this change a covariance of some hundred features little, but many labels need some each; of long
# texts, so many tokens have to do.
MAX_EXAMPLES = 10_000
EXAMPLES_PER_LABEL = 5
MAX_TOKENS = 500_000
# From so many examples for development on, siblings have a temperature of their own.
OWN_TEMPERATURE = 20
# Discriminants of labels with one or two examples each are up to thousands of times too sure.
TEMPERATURE_RANGE = (0.1, 1e5)


def probe_head(
    recipe: Recipe,
    taxonomy: Taxonomy,
    encoder: EncoderConfig,
    weights: Weights,
    train: Mapping[str, TokenizedSplit],
    dev: Mapping[str, TokenizedSplit],
    tasks: Collection[str],
) -> Weights:
    """A head whose rows of some tasks are discriminants found on train, as sure of themselves as dev allows.

    Of a hierarchical task each set of siblings is told apart on the examples below their parent, and has a temperature
    of its own, for those with few examples a label are surer by far than they may be; siblings of whom fewer than two
    have examples begin with zeros. Of a multilabel task each label is told from its absence.

    Args:
      recipe: for the seed and the compute dtype.
      taxonomy: all tasks.
      encoder, weights: the pretrained encoder, perhaps with a head, whose other tasks' rows stay what they are.
      train: examples to fit on, by task, of which those with labels of their own are taken; of many or long ones a
        random part, see `MAX_EXAMPLES` and `MAX_TOKENS`.
      dev: examples to fit the temperatures on, by which the rows are divided.
      tasks: whose rows to find.

    Returns:
      `head.kernel` (D, L) and `head.bias` (L,) over all labels.
    """
    D = encoder.d_model
    kernel_DL = weights.get("head.kernel", np.zeros((D, taxonomy.num_labels), np.float32)).copy()
    bias_L = weights.get("head.bias", np.zeros(taxonomy.num_labels, np.float32)).copy()
    predictor = Predictor(encoder, taxonomy.num_labels, weights, Precision.float32, recipe.compute_dtype)
    for task in taxonomy.tasks:
        if task.name not in tasks:
            continue
        split = train[task.name]
        most = max(MAX_EXAMPLES, EXAMPLES_PER_LABEL * len(task.labels))
        labelled = np.flatnonzero(split.labelled_N)
        rows = labelled[np.random.default_rng(recipe.seed).permutation(len(labelled))[:most]]
        tokens_N = np.cumsum([len(split.ids[row]) for row in rows])
        rows = rows[: max(1, np.searchsorted(tokens_N, MAX_TOKENS, side="right"))]
        features_ND = predictor.pooled([split.ids[row] for row in rows])
        dev_features_ND = predictor.pooled(dev[task.name].ids)
        if task.kind.exclusive:
            head = sibling_heads(
                task,
                features_ND,
                split.targets[rows],
                dev_features_ND,
                dev[task.name].targets,
                label_smoothing=recipe.label_smoothing,
            )
        else:
            head = presence_head(features_ND, split.targets[rows].toarray())
            dev_logits_NL = dev_features_ND @ head["head.kernel"] + head["head.bias"]
            temperature = fit_calibration(task, dev_logits_NL, dev[task.name].targets_NL).temperature
            head = {name: value / temperature for name, value in head.items()}
        kernel_DL[:, taxonomy.slice_of(task.name)] = head["head.kernel"]
        bias_L[taxonomy.slice_of(task.name)] = head["head.bias"]
    return {"head.kernel": kernel_DL, "head.bias": bias_L}


def sibling_heads(
    task: Task,
    features_ND: np.ndarray,
    targets: csr_array,
    dev_features_ND: np.ndarray,
    dev_targets: csr_array,
    *,
    label_smoothing: float = 0.0,
) -> Weights:
    """The head of a task whose siblings exclude each other, as sure of itself as the examples for development allow.

    Args:
      task: with one set of siblings, or a tree of them.
      features_ND, dev_features_ND: float32.
      targets, dev_targets: sparse (N, L), 1 where a label is given.
      label_smoothing: of the training to come, by whose loss the temperatures are chosen: siblings that are told apart
        without an error would otherwise begin surer than it wants them.

    Returns:
      `head.kernel` (D, L) and `head.bias` (L,), float32.
    """
    head = {
        "head.kernel": np.zeros((features_ND.shape[1], len(task.labels)), np.float32),
        "head.bias": np.zeros(len(task.labels), np.float32),
    }
    held = csr_array(with_ancestors(task.parent_L, targets)).tocsc()
    dev_held = csr_array(with_ancestors(task.parent_L, dev_targets)).tocsc()
    # (labels, logits and targets of the examples for development below their parent)
    sets: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for group in range(int(task.group_L.max()) + 1):
        siblings = np.flatnonzero(task.group_L == group)
        held_NL, dev_held_NL = held[:, siblings].toarray(), dev_held[:, siblings].toarray()
        below_N, dev_below_N = held_NL.any(axis=1), dev_held_NL.any(axis=1)
        if held_NL.any(axis=0).sum() >= 2:
            found = discriminant_head(features_ND[below_N], held_NL[below_N])
            head["head.kernel"][:, siblings] = found["head.kernel"]
            head["head.bias"][siblings] = found["head.bias"]
            logits_NL = dev_features_ND[dev_below_N] @ found["head.kernel"] + found["head.bias"]
            smooth_NL = (1 - label_smoothing) * dev_held_NL[dev_below_N] + label_smoothing / len(siblings)
            sets.append((siblings, logits_NL, smooth_NL))
    shared = _temperature(sets)
    for one in sets:
        siblings, logits_NL, _ = one
        temperature = _temperature([one]) if len(logits_NL) >= OWN_TEMPERATURE else shared
        head["head.kernel"][:, siblings] /= temperature
        head["head.bias"][siblings] /= temperature
    return head


def _temperature(sets: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """What makes the targets of some sets of siblings likeliest under the softmax of their logits; 1 without any."""
    if not any(len(logits_NL) for _, logits_NL, _ in sets):
        return 1.0

    def nll(log_temperature: float) -> float:
        loss = 0.0
        for _, logits_NL, targets_NL in sets:
            scaled_NL = logits_NL.astype(np.float64) / math.exp(log_temperature)
            loss += (logsumexp(scaled_NL, axis=1) - (targets_NL * scaled_NL).sum(axis=1)).sum()
        return loss

    low, high = map(math.log, TEMPERATURE_RANGE)
    found: Any = minimize_scalar(nll, bounds=(low, high), method="bounded")
    return math.exp(found.x)


def presence_head(features_ND: np.ndarray, targets_NL: np.ndarray) -> Weights:
    """The head whose sigmoids are the posteriors of Gaussians with one covariance: a label's, and its absence's.

    Args:
      features_ND: float32.
      targets_NL: 1 where a label holds. A label that all or none have keeps a kernel of zeros.

    Returns:
      `head.kernel` (D, L) and `head.bias` (L,), float32.
    """
    x_ND = features_ND.astype(np.float64)
    N, mean_D = len(x_ND), x_ND.mean(axis=0)
    counts_L = targets_NL.sum(axis=0, dtype=np.float64)
    # Seen from the mean of all, the centres of those with and without a label lie on one line.
    sums_LD = targets_NL.T @ (x_ND - mean_D)
    with_LD = sums_LD / np.maximum(counts_L, 1)[:, None]
    without_LD = -sums_LD / np.maximum(N - counts_L, 1)[:, None]
    between_DL = (with_LD - without_LD).T
    kernel_DL = np.linalg.solve(_shrunk(np.cov(x_ND.T, bias=True)), between_DL)
    # One solve for all labels, by the covariance of all texts; that within a label and its absence only scales it
    # (Sherman and Morrison).
    shares_L = counts_L / N
    kernel_DL /= 1 - shares_L * (1 - shares_L) * np.einsum("DL,DL->L", between_DL, kernel_DL)
    middle_LD = (with_LD + without_LD) / 2 + mean_D
    prior_L = np.log(np.maximum(counts_L, 1) / np.maximum(N - counts_L, 1))
    bias_L = prior_L - np.einsum("LD,DL->L", middle_LD, kernel_DL)
    return {"head.kernel": kernel_DL.astype(np.float32), "head.bias": bias_L.astype(np.float32)}


def _shrunk(covariance_DD: np.ndarray) -> np.ndarray:
    scale = np.trace(covariance_DD) / len(covariance_DD)
    return (1 - SHRINKAGE) * covariance_DD + (SHRINKAGE * scale + 1e-8) * np.eye(len(covariance_DD))


def discriminant_head(features_ND: np.ndarray, targets_NL: np.ndarray) -> Weights:
    """The head whose softmax is the posterior of Gaussian classes with one covariance.

    Args:
      features_ND: float32.
      targets_NL: one-hot. A label without examples gets the mean of all as its centre, and the prior of one example.

    Returns:
      `head.kernel` (D, L) and `head.bias` (L,), float32; the logits of a text average to zero.
    """
    x_ND = features_ND.astype(np.float64)
    counts_L = targets_NL.sum(axis=0)
    mean_D = x_ND.mean(axis=0)
    centres_LD = (targets_NL.T @ (x_ND - mean_D)) / np.maximum(counts_L, 1)[:, None]
    within_ND = x_ND - mean_D - targets_NL @ centres_LD
    kernel_DL = np.linalg.solve(_shrunk(within_ND.T @ within_ND / len(x_ND)), centres_LD.T)
    bias_L = -0.5 * np.einsum("LD,DL->L", centres_LD, kernel_DL) + np.log(np.maximum(counts_L, 1) / len(x_ND))
    bias_L -= mean_D @ kernel_DL
    return {
        "head.kernel": (kernel_DL - kernel_DL.mean(axis=1, keepdims=True)).astype(np.float32),
        "head.bias": (bias_L - bias_L.mean()).astype(np.float32),
    }
