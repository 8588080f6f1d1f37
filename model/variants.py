"""The precisions that a bundle can be computed in, whatever its weights are stored as.

- int8: int8 weights and products, float32 activations between them;
- bfloat16: weights and activations in bfloat16, products accumulated in float32;
- float32.

From an INT8 bundle the float precisions take its weights as int8 × scale, so that all three are the same classifier up
to rounding; from a float32 bundle int8 is its post-training quantisation. Which is fastest depends on the machine and
on the shape: measure.
"""

from __future__ import annotations

import numpy as np

from .bundle import GOLDEN_LENGTH, GOLDEN_TOLERANCE, Bundle
from .focus import Focus
from .precision import Precision
from .predict import Predictor
from .quantize import to_bfloat16, to_float32, to_int8

VARIANTS = (Precision.float32, Precision.bfloat16, Precision.int8)

# The largest accepted difference between a probability of a golden text and the bundle's own computation of it.
# Rounding to int8 may move either of the two by its tolerance.
AGREEMENT = 2 * GOLDEN_TOLERANCE[Precision.int8]


def variant_predictor(bundle: Bundle, precision: Precision, focus: Focus | None = None) -> Predictor:
    """Puts a bundle's weights on the default device in one of `VARIANTS`, ready to compile programs.

    Raises:
      InputError: `focus` drops tokens, but the model was not trained for focus.
    """
    weights, stored, activations = bundle.weights, Precision.float32, Precision.float32
    if precision == Precision.int8:
        weights = weights if bundle.precision == Precision.int8 else to_int8(weights)
        stored = Precision.int8
    elif bundle.precision == Precision.int8:
        weights = to_float32(weights)
    if precision == Precision.bfloat16:
        weights, activations = to_bfloat16(weights), Precision.bfloat16
    return Predictor(bundle.encoder, bundle.taxonomy.num_labels, weights, stored, activations, focus)


def golden_ids(bundle: Bundle) -> list[np.ndarray]:
    """Token ids of the golden texts, cut as for the golden outputs, and of the empty text, which fits every bucket."""
    texts = dict.fromkeys((*bundle.golden_texts, ""))
    return list(bundle.tokenizer.encode(list(texts), min(GOLDEN_LENGTH, bundle.max_length)).ids)


def disagreement(bundle: Bundle, logits_NL: np.ndarray, reference_NL: np.ndarray) -> float:
    """The largest difference of a probability between two computations of the same texts; NaN if either has one."""
    differences = [
        np.abs(bundle.probabilities(task.name, logits_NL) - bundle.probabilities(task.name, reference_NL)).max()
        for task in bundle.taxonomy.tasks
    ]
    return float(np.max(differences))
