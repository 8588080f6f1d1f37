"""The labels of texts in the forms of scikit-learn: one a text, lists, or an indicator matrix.

Axes: N texts, L labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import sparse
from sklearn.utils.validation import column_or_1d

from ..data.errors import InputError
from ..data.taxonomy import TaskKind
from ..serve.client.local import described

_SEVERAL = (list, tuple, set, frozenset, np.ndarray)
_MISSING = ("nan", "null")  # how NumPy and data frames write a missing label among strings


class InvalidData(InputError, ValueError):
    """Texts or labels that an estimator cannot take; a ValueError, as scikit-learn's tools expect of estimators."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """The labels of N texts.

    Attributes:
      form: how they were given: one a text, lists of labels, or an indicator matrix.
      classes_L: the distinct labels, sorted, in their own type; of a matrix its columns' names, or else numbers.
      names: the labels as a bundle names them, in that order.
      columns_N: for each text the positions of its labels in `classes_L`.
    """

    form: Literal["single", "lists", "indicator"]
    classes_L: np.ndarray
    names: tuple[str, ...]
    columns_N: Sequence[Sequence[int]]

    @property
    def kind(self) -> TaskKind:
        if self.form != "single":
            return TaskKind.MULTILABEL
        return TaskKind.BINARY if len(self.names) == 2 else TaskKind.MULTICLASS


def read_targets(labels: Any) -> Targets:
    """Reads labels: N labels, N lists of labels, or an indicator matrix (N, L).

    A label is a str, a bool or a whole number. A matrix is an array, a sparse matrix, a data frame, or nested lists of
    equal length above 1 that hold only 0 and 1.

    Raises:
      InvalidData: a label is missing, of another type than the first one, or no label at all; a matrix has other
        entries than 0 and 1; there is only one class. The message names the row, from 0.
    """
    if labels is None:
        raise InvalidData("fit requires y, the labels of the texts, but the target y is None.")
    if isinstance(labels, str | bytes):
        raise InvalidData("labels is one string; give a label for each text.")
    if hasattr(labels, "columns") or sparse.issparse(labels) or getattr(labels, "ndim", 1) > 1:
        names = [*labels.columns] if hasattr(labels, "columns") else None
        array = labels.toarray() if sparse.issparse(labels) else np.asarray(labels)
        if array.ndim > 2:
            raise InvalidData(f"labels has the shape {array.shape}; an indicator matrix has two dimensions.")
        if array.shape[1] != 1:
            return _from_indicator(array, names)
        labels = column_or_1d(array, warn=True)
    values = entries_of(labels)
    if not any(isinstance(value, _SEVERAL) for value in values):
        return _from_values(values, _dtype(labels))
    if _is_indicator(values):
        return _from_indicator(np.asarray(values), None)
    return _from_lists(values)


def entries_of(labels: Any) -> list[Any]:
    """The entries of a list, array, Series or column; Python's own types where NumPy's or Arrow's have them."""
    for method in ("to_pylist", "to_list", "tolist"):  # of pyarrow; pandas and polars; NumPy
        if hasattr(labels, method):
            return getattr(labels, method)()
    return list(labels)


def _from_values(values: list[Any], dtype: np.dtype | None) -> Targets:
    labels = [_label(value, f"labels[{row}]") for row, value in enumerate(values)]
    classes = _distinct((f"labels[{row}]", label) for row, label in enumerate(labels))
    if len(classes) == 1:
        raise InvalidData(f"All {len(labels)} labels are {classes[0]!r}, one class; a classifier needs at least two.")
    index = {label: column for column, label in enumerate(classes)}
    names = tuple(map(_name, classes))
    return Targets("single", np.array(classes, dtype), names, [[index[label]] for label in labels])


def _from_lists(values: list[Any]) -> Targets:
    label_lists = []
    for row, value in enumerate(values):
        if not isinstance(value, _SEVERAL):
            raise InvalidData(
                f"labels[{row}] is {described(value)}, but other texts have a list of labels; give one here."
            )
        held = [_label(one, f"labels[{row}]") for one in value]
        if len(set(held)) < len(held):
            raise InvalidData(f"labels[{row}] names a label twice; an indicator matrix must be a NumPy array.")
        label_lists.append(held)
    classes = _distinct((f"labels[{row}]", label) for row, held in enumerate(label_lists) for label in held)
    index = {label: column for column, label in enumerate(classes)}
    columns_N = [[index[label] for label in held] for held in label_lists]
    if not classes:
        raise InvalidData(f"None of the {len(values)} texts has a label; a classifier needs some to learn from.")
    return Targets("lists", np.array(classes), tuple(map(_name, classes)), columns_N)


def _from_indicator(array_NL: np.ndarray, names: list[Any] | None) -> Targets:
    right_NL = (array_NL == 0) | (array_NL == 1)
    if not right_NL.all():
        row, column = np.argwhere(~right_NL)[0]
        raise InvalidData(
            f"labels[{row}, {column}] is {str(array_NL[row, column])[:40]}; an indicator matrix holds only 0 and 1."
        )
    if not array_NL.any():
        raise InvalidData(f"None of the {len(array_NL)} texts has a label; a classifier needs some to learn from.")
    columns_N = [np.flatnonzero(row_L).tolist() for row_L in array_NL == 1]
    classes_L = np.arange(array_NL.shape[1])
    if names is not None and all(isinstance(name, str) for name in names):
        _distinct(
            (f"column {column} of labels", _label(name, f"column {column} of labels"))
            for column, name in enumerate(names)
        )
        classes_L = np.array(names)
    return Targets("indicator", classes_L, tuple(map(_name, classes_L.tolist())), columns_N)


def _is_indicator(values: list[Any]) -> bool:
    """Whether nested lists are rows of an indicator matrix: as lists of labels, all texts would have the same two."""
    lengths = {len(value) if isinstance(value, _SEVERAL) else -1 for value in values}
    if len(lengths) != 1 or min(lengths) < 2:
        return False
    return all(
        isinstance(one, int | float | np.number | np.bool_) and one in (0, 1) for value in values for one in value
    )


def _label(value: Any, where: str) -> str | bool | int | float:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        if not value or value.isspace():
            raise InvalidData(f"{where} is an empty label; name one.")
        if value.casefold() in _MISSING:
            raise InvalidData(f"{where} is '{value}', a missing value; name a label or remove the row.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidData(
                f"{where} holds a lone surrogate, which UTF-8 cannot carry; decode it properly."
            ) from None
        return value
    if isinstance(value, float) and np.isfinite(value) and not value.is_integer():
        raise InvalidData(f"Unknown label type: {where} is {value}; a label is a str, a bool or a whole number.")
    if isinstance(value, int | float) and np.isfinite(value):
        return value
    raise InvalidData(f"{where} is {described(value)}; a label is a str, a bool or a whole number.")


def _distinct(labels: Any) -> list[Any]:
    """The distinct labels, sorted. Raises InvalidData: one has another type than the first."""
    seen: dict[Any, str] = {}
    first: tuple[str, Any] | None = None
    for where, label in labels:
        first = first or (where, label)
        if _type(label) != _type(first[1]):
            raise InvalidData(
                f"{where} is {described(label)}, but {first[0]} {described(first[1])}; give all labels one type."
            )
        seen.setdefault(label, where)
    return sorted(seen)


def _type(label: Any) -> str:
    return "number" if isinstance(label, int | float) and not isinstance(label, bool) else type(label).__name__


def _name(label: str | bool | int | float) -> str:
    """The name of a label in a bundle; booleans and numbers as `data.readers` names them."""
    if isinstance(label, bool):
        return str(label).lower()
    return label if isinstance(label, str) else str(int(label))


def _dtype(labels: Any) -> np.dtype | None:
    return labels.dtype if isinstance(labels, np.ndarray) else None
