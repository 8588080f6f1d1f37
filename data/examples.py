"""The unit of data: one text with its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One text of one task with its labels.

    Attributes:
      text: the raw text, as it stood in the source.
      labels: names of the labels that are given; exactly one for binary, multiclass and hierarchical tasks (those above
        it in the tree hold with it), any number (also none) for multilabel ones.
      task: the name of the task that the labels belong to.
      id: the source's own identifier, if it has one.
      source: where it came from, for error messages: "tickets.csv, row 17".
      soft: a teacher's probabilities by label name, if it has been asked; labels that are left out have 0.
      vector: teachers' pooled vector of the text, if they are to be learnt from.
    """

    text: str
    labels: tuple[str, ...]
    task: str
    id: str | None = None
    source: str = ""
    soft: Mapping[str, float] | None = None
    vector: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
