"""The precisions that a bundle can be computed in, whatever its weights are stored as.

- "int8": int8 weights and products, float32 activations between them;
- "bfloat16": weights and activations in bfloat16, products added up in float32;
- "float32".

From an INT8 bundle the float ones take its weights as int8 × scale, so that all three are the same classifier up to
rounding; from a float32 bundle "int8" is its post-training quantisation. Which is fastest depends on the machine and on
the shape: measure.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from .bundle import GOLDEN_LENGTH, GOLDEN_TOLERANCE, Bundle, quantize
from .config import ComputeDtype
from .focus import Focus
from .predict import Predictor
from .quantize import Precision, Weights, dequantize

Variant = Literal["float32", "bfloat16", "int8"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

# How far a probability of a golden text may be from the bundle's own computation of it. Rounding to int8 may move
# either of the two by its tolerance; a variant that is further off computes something else.
AGREEMENT = 2 * GOLDEN_TOLERANCE["int8"]


def variant_predictor(bundle: Bundle, variant: Variant, focus: Focus | None = None) -> Predictor:
    """Puts a bundle's weights on the default device in one precision, ready to compile programs.

    Raises:
      InputError: the model was not trained for the focus.
    """
    weights = bundle.weights
    if variant == "int8" and bundle.precision == "float32":
        weights = quantize(bundle).weights
    elif variant != "int8" and bundle.precision == "int8":
        weights = dequantize(weights)
    if variant == "bfloat16":
        weights = _in_bfloat16(weights)
    precision: Precision = "int8" if variant == "int8" else "float32"
    compute: ComputeDtype = "bfloat16" if variant == "bfloat16" else "float32"
    return Predictor(bundle.encoder, bundle.taxonomy.num_labels, weights, precision, compute, focus)


def native(bundle: Bundle) -> Variant:
    """The variant that the bundle's golden outputs were computed with."""
    return "int8" if bundle.precision == "int8" else "float32"


def golden_ids(bundle: Bundle) -> list[np.ndarray]:
    """The token ids of the golden texts, cut as for the golden outputs, and of the empty text, which always fits."""
    texts = dict.fromkeys((*bundle.golden_texts, ""))
    return list(bundle.tokenizer.encode(list(texts), min(GOLDEN_LENGTH, bundle.max_length)).ids)


def disagreement(bundle: Bundle, logits_NL: np.ndarray, reference_NL: np.ndarray) -> float:
    """The largest difference of a probability between two computations of the same texts; NaN if either has one."""
    differences = [
        np.abs(bundle.probabilities(task.name, logits_NL) - bundle.probabilities(task.name, reference_NL)).max()
        for task in bundle.taxonomy.tasks
    ]
    return float(np.max(differences))


def _in_bfloat16(weights: Weights) -> Weights:
    """Rounds the encoder's kernels and tables, once, instead of in every run; what is small or calibrated stays."""
    rounded = (".kernel", ".table")
    return {
        name: value.astype(jnp.bfloat16) if name.startswith("encoder.") and name.endswith(rounded) else value
        for name, value in weights.items()
    }
