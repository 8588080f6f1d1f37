"""A head to begin with: linear discriminant analysis of the pretrained encoder's features.

Fine-tuning from a random head first bends the encoder towards noise. From a head that already separates the classes it
keeps more of what pretraining knew (Kumar et al. 2022, https://arxiv.org/abs/2202.10054: linear probing, then
fine-tuning).

Axes: N examples, D features, L labels.
"""

from __future__ import annotations

import numpy as np

from ..data.taxonomy import Task
from ..model.config import EncoderConfig
from ..model.predict import Predictor
from ..model.quantize import Weights
from .calibration import fit_calibration
from .config import Recipe
from .evaluation import TokenizedSplit

# Share of the identity in the covariance (Friedman 1989): keeps it invertible with few examples.
SHRINKAGE = 0.02
# More examples than this change a covariance of some hundred features little; of long texts, so many tokens have to do.
MAX_EXAMPLES = 10_000
MAX_TOKENS = 500_000


def probe_head(
    recipe: Recipe, task: Task, encoder: EncoderConfig, weights: Weights, train: TokenizedSplit, dev: TokenizedSplit
) -> Weights:
    """The head that `discriminant_head` finds on train, as sure of itself as dev allows.

    Args:
      recipe: for the seed and the compute dtype.
      task: a binary or multiclass one.
      encoder, weights: the pretrained encoder.
      train: examples to fit on; of many or long ones, a random part of `MAX_EXAMPLES` or `MAX_TOKENS`.
      dev: examples to fit the temperature on, by which the head is divided.

    Returns:
      `head.kernel` (D, L) and `head.bias` (L,).
    """
    # A head that is the identity makes logits of the pooled features.
    identity = {"head.kernel": np.eye(encoder.d_model), "head.bias": np.zeros(encoder.d_model)}
    as_float32 = {name: value.astype(np.float32) for name, value in identity.items()}
    predictor = Predictor(encoder, encoder.d_model, weights | as_float32, "float32", recipe.compute_dtype)
    rows = np.random.default_rng(recipe.seed).permutation(len(train.ids))[:MAX_EXAMPLES]
    tokens_N = np.cumsum([len(train.ids[row]) for row in rows])
    rows = rows[: max(1, np.searchsorted(tokens_N, MAX_TOKENS, side="right"))]
    head = discriminant_head(predictor.logits([train.ids[row] for row in rows]), train.targets_NL[rows])
    dev_logits_NL = predictor.logits(dev.ids) @ head["head.kernel"] + head["head.bias"]
    temperature = fit_calibration(task, dev_logits_NL, dev.targets_NL).temperature
    return {name: (value / temperature).astype(np.float32) for name, value in head.items()}


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
    covariance_DD = within_ND.T @ within_ND / len(x_ND)
    scale = np.trace(covariance_DD) / len(covariance_DD)
    covariance_DD = (1 - SHRINKAGE) * covariance_DD + (SHRINKAGE * scale + 1e-8) * np.eye(len(covariance_DD))
    kernel_DL = np.linalg.solve(covariance_DD, centres_LD.T)
    bias_L = -0.5 * np.einsum("LD,DL->L", centres_LD, kernel_DL) + np.log(np.maximum(counts_L, 1) / len(x_ND))
    bias_L -= mean_D @ kernel_DL
    return {
        "head.kernel": (kernel_DL - kernel_DL.mean(axis=1, keepdims=True)).astype(np.float32),
        "head.bias": (bias_L - bias_L.mean()).astype(np.float32),
    }
