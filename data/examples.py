"""A labelled text, the unit of training data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A text with its labels for one task.

    Attributes:
      text: the raw text, unchanged from the source.
      labels: label names: exactly one for binary, multiclass and hierarchical tasks (it implies its ancestors), any
        number, including none, for multilabel tasks.
      task: the name of the task.
      id: the identifier in the source, if there is one.
      source: the place in the source, for error messages: "tickets.csv, row 17".
      soft: a teacher's probabilities by label name, for distillation; missing labels have 0.
      vector: (V,), the teachers' pooled vector of the text, for distillation of relations.
    """

    text: str
    labels: tuple[str, ...]
    task: str
    id: str | None = None
    source: str = ""
    soft: Mapping[str, float] | None = None
    vector: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
