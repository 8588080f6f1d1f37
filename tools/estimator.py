"""`ClasserClassifier`: a text classifier as a scikit-learn estimator.

It stands in `tools`, the only room that may import both `train` and `serve`: `fit` trains, and `predict` runs the
trained bundle in this process.

Axes: N texts, L labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from ..data.errors import InputError
from ..data.examples import Example
from ..data.files import staged_folder
from ..data.splits import stratified_split
from ..data.taxonomy import Label, Task
from ..model.precision import ComputeDtype
from ..model.variants import VARIANTS
from ..serve.client.local import LocalModel, load, text_chunks
from ..serve.core.models import AUTO
from ..serve.core.tokenizing import length_error
from ..serve.wire.errors import InvalidRequest
from ..train.config import Recipe, TrainJob
from ..train.distributed import quiet
from ..train.run import run_job
from .targets import InvalidData, Targets, entries_of, read_targets

TASK = "labels"  # the name of the task in the bundle
_DEFAULT = Recipe()
_CHOICES = {
    "class_weights": ("none", "balanced"),
    "compute_dtype": get_args(ComputeDtype),
    "precision": (AUTO, *VARIANTS),
}


class ClasserClassifier(ClassifierMixin, BaseEstimator):
    """A text classifier as a scikit-learn estimator.

    >>> classifier = classer.ClasserClassifier(epochs=4)
    >>> classifier.fit(texts, labels).predict(["my card has not arrived"])
    array(['card arrival'], dtype='<U12')

    `fit` does what `classer train` does: it fine-tunes a pretrained encoder, calibrates the probabilities on texts that
    it sets aside, and quantises to INT8. The fitted model is in memory; it can be pickled, and leaves no files.

    Texts (`X`) are a list, tuple, NumPy array, pandas or polars Series, or column of a `datasets.Dataset`. Labels (`y`)
    are one str, bool or whole number a text. For a multilabel task they are a list of labels a text, or an indicator
    matrix (N, L): a NumPy array, SciPy sparse matrix or data frame of zeros and ones. `predict` returns the same form.

    Args:
      encoder: as in `train.config.Recipe`, as is every parameter from here to `seed`.
      precision: what to predict in: "float32", "bfloat16" or "int8"; "auto" measures which is fastest for each length,
        so that the last digits of a probability may depend on the machine's load.
      verbose: whether `fit` prints what it does and shows a progress bar.

    Attributes:
      classes_: the labels, in the order of the columns of `predict_proba`; of an indicator matrix the numbers of its
        columns, or their names if it was a data frame.
    """

    _targets: Targets | None = None
    _files: Mapping[str, bytes] | None = None  # of the bundle, by path in it
    _loaded: tuple[str, LocalModel] | None = None  # with its precision; made from `_files` when first used

    def __init__(
        self,
        encoder: str | os.PathLike[str] = _DEFAULT.encoder,
        *,
        max_length: int = _DEFAULT.max_length,
        epochs: int = _DEFAULT.epochs,
        focus_epochs: int = _DEFAULT.focus_epochs,
        batch_size: int = _DEFAULT.batch_size,
        learning_rate: float = _DEFAULT.learning_rate,
        warmup: float = _DEFAULT.warmup,
        weight_decay: float = _DEFAULT.weight_decay,
        label_smoothing: float = _DEFAULT.label_smoothing,
        class_weights: Literal["none", "balanced"] = _DEFAULT.class_weights,
        dropout: float = _DEFAULT.dropout,
        compute_dtype: str = _DEFAULT.compute_dtype.value,
        dev_fraction: float = _DEFAULT.dev_fraction,
        patience: int = _DEFAULT.patience,
        seed: int = _DEFAULT.seed,
        precision: str = "float32",
        verbose: bool = False,
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.epochs = epochs
        self.focus_epochs = focus_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.dropout = dropout
        self.compute_dtype = compute_dtype
        self.dev_fraction = dev_fraction
        self.patience = patience
        self.seed = seed
        self.precision = precision
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Trains on texts and their labels.

        Args:
          X: N texts; see the class.
          y: their labels: N of them, N lists of them, or an indicator matrix (N, L).

        Raises:
          InvalidData: a text is no str, too long, or missing; a label is missing, or of another type than the others;
            the lengths differ; there is one class only; the texts are too few to set `dev_fraction` of them aside. The
            message names the row, from 0.
          InputError: there is no such encoder, or a parameter is out of range.
        """
        recipe = self._recipe()
        _checked("precision", self.precision, AUTO)
        texts, targets = _read_texts(X), read_targets(y)
        if not texts:
            raise InvalidData("There are no texts; a classifier needs some to learn from.")
        if len(texts) != len(targets.columns_N):
            raise InvalidData(
                f"There are {len(texts)} texts, but labels for {len(targets.columns_N)}; the two must be of one length."
            )
        examples = [
            Example(text, tuple(targets.names[column] for column in columns), TASK, source=f"texts[{row}]")
            for row, (text, columns) in enumerate(zip(texts, targets.columns_N, strict=True))
        ]
        try:
            train, dev = stratified_split(examples, recipe.dev_fraction, recipe.seed)
        except InputError:
            raise InvalidData(
                f"{len(texts)} texts of {len(targets.names)} classes are too few to set {recipe.dev_fraction:.0%} "
                "aside for development, as each class needs one to train on; give more texts or a higher dev_fraction."
            ) from None
        with tempfile.TemporaryDirectory(prefix="classer-fit-") as folder, quiet(not self.verbose):
            job = TrainJob(Path(TASK), Path(folder) / "run", recipe)
            run_job(job, {"train": train, "dev": dev}, Task(TASK, targets.kind, tuple(map(Label, targets.names))))
            self._files = _read_files(job.out / "bundle")
        self._targets, self._loaded = dataclasses.replace(targets, columns_N=()), None
        self.classes_ = targets.classes_L
        return self

    def predict(self, X: Any) -> Any:
        """The labels of texts.

        >>> classifier.predict(["my card has not arrived", "where is my refund"])
        array(['card arrival', 'refund status'], dtype='<U13')

        Args:
          X: N texts; see the class.

        Returns:
          An array (N,) of entries of `classes_`; of a multilabel task what `fit` was given: N lists of labels, highest
          probability first, or an indicator matrix (N, L) of int64.

        Raises:
          InvalidData: an entry is no str, or too long; the message names the row, from 0.
          NotFittedError: `fit` has not been called.
        """
        model, targets = self._model()
        if targets.form == "single":
            return self.classes_[self.predict_proba(X).argmax(axis=1)]
        with _as_invalid_data():
            chosen_N = model.predict(X)
        columns_N = [[targets.names.index(name) for name in names] for names in chosen_N]
        if targets.form == "lists":
            return [self.classes_[columns].tolist() for columns in columns_N]
        indicator_NL = np.zeros((len(columns_N), len(targets.names)), np.int64)
        for row, columns in enumerate(columns_N):
            indicator_NL[row, columns] = 1
        return indicator_NL

    def predict_proba(self, X: Any) -> np.ndarray:
        """Calibrated probabilities, float32 (N, L), with columns in the order of `classes_`.

        >>> classifier.predict_proba(["my card has not arrived"]).round(2)
        array([[0.97, 0.03]], dtype=float32)

        The rows of a multilabel task do not sum to one. Raises as `predict`.
        """
        model, _ = self._model()
        with _as_invalid_data():
            return model.predict_proba(X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of texts whose label is right; of a multilabel task, whose labels all are.

        >>> classifier.score(["my card has not arrived"], ["card arrival"])
        1.0

        Args:
          X, y: texts and their labels, as for `fit`.
          sample_weight: N weights; None weighs all texts alike.

        Raises as `predict`.
        """
        predicted = self.predict(X)
        if self._targets is not None and self._targets.form == "lists":
            given = entries_of(y)
            check_consistent_length(given, predicted, sample_weight)
            right_N = [set(labels) == set(answer) for labels, answer in zip(given, predicted, strict=True)]
            return float(np.average(right_N, weights=sample_weight))
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fitted model as a bundle, for `classer.load` and `classer serve`.

        >>> classifier.save("runs/tickets")
        >>> classer.load("runs/tickets").labels
        ('card arrival', 'refund status')

        Args:
          path: a folder that does not exist yet.

        Raises:
          InputError: `path` exists, or the disk is full.
          NotFittedError: `fit` has not been called.
        """
        check_is_fitted(self)
        assert self._files is not None
        with staged_folder(Path(path)) as folder:
            _write_files(self._files, folder)

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_loaded"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = True, False, True
        tags.classifier_tags.multi_label = True
        return tags

    def _recipe(self) -> Recipe:
        """The recipe of the parameters. Raises InputError: one is of the wrong type or out of range."""
        given = self.get_params(deep=False)
        fields = [field for field in dataclasses.fields(Recipe) if field.name in given]
        return Recipe(**{field.name: _checked(field.name, given[field.name], field.default) for field in fields})

    def _model(self) -> tuple[LocalModel, Targets]:
        """The fitted model, loaded from the bundle if it is not yet."""
        check_is_fitted(self)
        assert self._files is not None
        assert self._targets is not None
        if self._loaded is None or self._loaded[0] != self.precision:
            with tempfile.TemporaryDirectory(prefix="classer-") as folder:
                _write_files(self._files, Path(folder))
                self._loaded = self.precision, load(folder, precision=self.precision)
        return self._loaded[1], self._targets


def _checked(name: str, value: Any, default: Any) -> Any:
    """The value of a recipe's field, of the type of its default; NumPy's numbers become Python's."""
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise InvalidData(f"{name} must be one of {', '.join(_CHOICES[name])}; it is {value!r}.")
        return value
    if isinstance(default, str):
        if not isinstance(value, str | os.PathLike):
            raise InvalidData(f"{name} must be a name or a path; it is {value!r}.")
        return os.fspath(value)
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int | np.integer if whole else int | float | np.number):
        raise InvalidData(f"{name} must be a {'whole ' * whole}number; it is {value!r}.")
    return int(value) if whole else float(value)


def _read_texts(texts: Any) -> list[str]:
    """The texts of `fit`. Raises InvalidData: one cannot be trained on."""
    with _as_invalid_data():
        found = [text for chunk in text_chunks(texts, "fit") for text in chunk]
    for row, text in enumerate(found):
        if error := length_error(text):
            raise InvalidData(f"texts[{row}]: {error}")
    return found


@contextlib.contextmanager
def _as_invalid_data() -> Iterator[None]:
    """Raises what the local model says of its arguments as InvalidData."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidData(str(error)) from None


def _read_files(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
