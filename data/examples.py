"""The unit of data: one text with its labels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One text of one task with its (hard) labels.

    Attributes:
      text: the raw text, as it stood in the source.
      labels: names of the labels that hold; exactly one for binary and multiclass tasks, any number (also none) for
        multilabel ones.
      task: the name of the task that the labels belong to.
      id: the source's own identifier, if it has one.
      source: where it came from, for error messages: "tickets.csv, row 17".
    """

    text: str
    labels: tuple[str, ...]
    task: str
    id: str | None = None
    source: str = ""
