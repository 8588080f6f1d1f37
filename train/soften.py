"""A teacher's probabilities at another temperature. Axes: N texts, L labels of one task, K probabilities above 0."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from ..data.taxonomy import Task, with_ancestors


def soften(task: Task, probs: csr_array, temperature: float) -> csr_array:
    """A teacher's probabilities as its logits divided by `temperature` would give them.

    Exclusive tasks: p^(1/T) among siblings, p being what each has of its parent's probability, to sum to what they
    summed to before, as `losses.classification_loss` divides the logits of each set of siblings. Multilabel: p^(1/T)
    and (1 − p)^(1/T), to sum to 1.
    """
    if temperature == 1:
        return probs
    softened = csr_array(probs, dtype=np.float64)
    if task.kind.exclusive:
        softened.eliminate_zeros()
        softened.data *= _softening(task, softened, temperature)
    else:
        held, other = softened.data ** (1 / temperature), np.maximum(1 - softened.data, 0.0) ** (1 / temperature)
        softened.data = held / (held + other)
    return csr_array(softened, dtype=np.float32)


def _softening(task: Task, probs: csr_array, temperature: float) -> np.ndarray:
    """For each probability that is not 0, in the order of `probs.data`, by how much softening multiplies it."""
    L = len(task.labels)
    held = csr_array(with_ancestors(task.parent_L, probs)).tocoo()
    place_K = held.coords[0].astype(np.int64) * L + held.coords[1]
    order = np.argsort(place_K)
    place_K, held_K = place_K[order], held.data[order]
    # Sets of siblings, row by row.
    _, set_K = np.unique(place_K // L * L + task.group_L[place_K % L], return_inverse=True)
    softened_K = held_K ** (1 / temperature)
    sums_K, softened_sums_K = (np.bincount(set_K, x_K)[set_K] for x_K in (held_K, softened_K))
    factor_K = softened_K / softened_sums_K * sums_K / held_K

    row_N = np.repeat(np.arange(len(probs.indptr) - 1, dtype=np.int64), np.diff(probs.indptr))
    total, label = np.ones(len(probs.data)), probs.indices
    while len(below := np.flatnonzero(label >= 0)):  # one step up the tree at a time
        total[below] *= factor_K[np.searchsorted(place_K, row_N[below] * L + label[below])]
        label = np.where(label >= 0, task.parent_L[label], -1)
    return total
