"""Predictions of a chunk of texts, and the output columns made of them. Axes: `N` texts, `L` labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from classer.data.errors import InputError, listed

if TYPE_CHECKING:
    import pyarrow


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of N texts.

    Attributes:
      chosen: the names of each text's labels, highest score first; at most one where labels exclude each other.
      scores_N: the score of each text's label, or of its best label where none was chosen.
      truncated_N: whether a text was cut to the maximum length.
      probs_NL: the score of every label, if asked for.
      failed: position → reason, of texts without an answer; the other attributes are undefined at these positions.
    """

    chosen: list[tuple[str, ...]]
    scores_N: np.ndarray
    truncated_N: np.ndarray
    probs_NL: np.ndarray | None = None
    failed: dict[int, str] = dataclasses.field(default_factory=dict)

    def without_failed(self) -> Predictions:
        """The predictions of the texts that have an answer."""
        if not self.failed:
            return self
        kept = [i for i in range(len(self.chosen)) if i not in self.failed]
        probs_NL = None if self.probs_NL is None else self.probs_NL[kept]
        return Predictions([self.chosen[i] for i in kept], self.scores_N[kept], self.truncated_N[kept], probs_NL)


@dataclasses.dataclass(frozen=True)
class PredictedColumns:
    """The columns that are appended to those of the input.

    Attributes:
      multilabel: whether a text may have several labels or none; then `labels` is appended, else `label` and `score`.
      scored: the labels in the object `scores`; if empty, there is no such column.
      prefix: the start of all their names.
    """

    multilabel: bool
    scored: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def names(self) -> list[str]:
        names = ["labels"] if self.multilabel else ["label", "score"]
        return [self.prefix + name for name in (*names, *(["scores"] if self.scored else []), "truncated")]

    def check_free(self, columns: Sequence[str], source: str) -> None:
        """Raises InputError if the input has a column of one of these names."""
        taken = [name for name in self.names if name in columns]
        if taken:
            raise InputError(
                f"{source} has a column {listed(taken)} already; give the predicted columns other names with --prefix, "
                "such as --prefix predicted_."
            )

    def values(self, predictions: Predictions) -> list[tuple[Any, ...]]:
        """The values of each text as Python objects; scores have the digits that float32 needs."""
        truncated = predictions.truncated_N.tolist()
        columns: list[Sequence[Any]] = []
        if self.multilabel:
            columns.append([list(names) for names in predictions.chosen])
        else:
            columns.append([names[0] if names else None for names in predictions.chosen])
            columns.append(_shortest(predictions.scores_N))
        if self.scored:
            assert predictions.probs_NL is not None
            columns.append([dict(zip(self.scored, _shortest(row_L), strict=True)) for row_L in predictions.probs_NL])
        return list(zip(*columns, truncated, strict=True))

    def schema(self, before: pyarrow.Schema) -> pyarrow.Schema:
        """Arrow's schema of the input's columns and these."""
        import pyarrow as pa

        text, score = pa.string(), pa.float32()
        types = [pa.list_(text)] if self.multilabel else [text, score]
        if self.scored:
            types.append(pa.struct([pa.field(label, score) for label in self.scored]))
        for name, kind in zip(self.names, [*types, pa.bool_()], strict=True):
            before = before.append(pa.field(name, kind))
        return before


def _shortest(scores: np.ndarray) -> list[float]:
    """The floats with the fewest digits that distinguish float32 values."""
    return [float(str(score)) for score in scores.astype(np.float32)]
