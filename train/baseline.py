"""A baseline: TF-IDF features and a linear support vector machine."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_union
from sklearn.svm import LinearSVC

from ..data.errors import InputError
from ..data.examples import Example
from ..data.taxonomy import Task, TaskKind
from .metrics import evaluate

MOST_LABELS = 1000  # of a tree, before it is walked down


@dataclasses.dataclass(frozen=True, slots=True)
class BaselineScore:
    """Scores of the baseline; the fields are those of `Metrics`. It has no probabilities, so no calibration error."""

    n: int
    accuracy: float
    macro_f1: float
    micro_f1: float


def tfidf_svm(
    train: Sequence[Example], test: Sequence[Example], task: Task, *, most_labels: int = MOST_LABELS
) -> BaselineScore:
    """Trains on `train`, measures on `test`.

    Features: TF-IDF of words (1–2-grams) and of characters within words (2–5-grams), sublinear counts. One linear SVM
    against the rest for each label; binary and multiclass tasks take the highest score, multilabel ones every label
    with a positive one. A tree of more than `most_labels` is walked down from the top, with features and SVMs for each
    set of siblings: a row of weights for each of thousands of labels would take tens of gigabytes. No randomness but
    LinearSVC's own, which is seeded.

    Raises:
      InputError: no text in `train` has a word, or all have the same label.
    """
    if task.kind.exclusive:  # examples with a teacher's answer only have no label
        train = [example for example in train if example.labels]
    if task.kind is TaskKind.HIERARCHICAL and len(task.labels) > most_labels:
        said_N = _walk_down(train, test, task)
        chosen_NL = said_N[:, None] == np.arange(len(task.labels))
    elif task.kind.exclusive:
        train_NF, test_NF = _features(train, test, task)
        chosen_NL = _said(train_NF, _label_indices(train, task), test_NF, task)[:, None] == np.arange(len(task.labels))
    else:
        train_NF, test_NF = _features(train, test, task)
        chosen_NL = np.zeros((len(test), len(task.labels)), bool)
        for label, held_N in enumerate(_targets(train, task).T):
            constant = held_N.all() or not held_N.any()  # a label that tells no text from another cannot be learnt
            chosen_NL[:, label] = (
                held_N.all() if constant else LinearSVC(random_state=0).fit(train_NF, held_N).predict(test_NF)
            )
    metrics = evaluate(task, chosen_NL.astype(np.float32), _targets(test, task), chosen_NL)
    return BaselineScore(metrics.n, metrics.accuracy, metrics.macro_f1, metrics.micro_f1)


def _features(train: Sequence[Example], test: Sequence[Example], task: Task) -> tuple[Any, Any]:
    """Sparse (N, F) of both, by the vocabulary of `train`."""
    features = make_union(
        # scikit-learn's own pattern drops words of one character: "I", and many a Chinese word.
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True),
        TfidfVectorizer(ngram_range=(2, 5), analyzer="char_wb", sublinear_tf=True),
    )
    try:
        train_NF = features.fit_transform([example.text for example in train])
    except ValueError as e:  # scikit-learn: "empty vocabulary"
        raise InputError(f"Task '{task.name}': no training text has a word, so there is no baseline ({e}).") from None
    return train_NF, features.transform([example.text for example in test])


def _said(train_NF: Any, train_N: np.ndarray, test_NF: Any, task: Task) -> np.ndarray:
    """int (N,): the label that scores highest for each test text."""
    if len(np.unique(train_N)) < 2:
        raise InputError(f"Task '{task.name}': all training texts have the same label, so there is no baseline.")
    with warnings.catch_warnings():  # that with a label for every two texts they may be numbers: they are not
        warnings.filterwarnings("ignore", message="The number of unique classes")
        return np.asarray(LinearSVC(random_state=0).fit(train_NF, train_N).predict(test_NF))


def _walk_down(train: Sequence[Example], test: Sequence[Example], task: Task) -> np.ndarray:
    """int (N,): the label at which each test text ends that goes to the best-scored child of each label."""
    paths = [task.path(label) for label in _label_indices(train, task)]
    said_N = np.full(len(test), -1)
    # (how far down, the training texts below a label, the test texts that have come to it)
    left = [(0, np.arange(len(train)), np.arange(len(test)))]
    while left:
        depth, rows, asked = left.pop()
        rows = rows[[len(paths[row]) > depth for row in rows]]
        branches = np.array([task.index[paths[row][depth]] for row in rows])
        children = np.unique(branches)
        if not len(asked) or not len(children):
            continue
        if len(children) == 1:
            said_N[asked] = children
        else:
            train_NF, test_NF = _features([train[i] for i in rows.tolist()], [test[i] for i in asked.tolist()], task)
            said_N[asked] = _said(train_NF, branches, test_NF, task)
        left += [(depth + 1, rows[branches == child], asked[said_N[asked] == child]) for child in children]
    return said_N


def _label_indices(examples: Sequence[Example], task: Task) -> np.ndarray:
    """int (N,) of examples with one label each."""
    return np.array([task.index[example.labels[0]] for example in examples])


def _targets(examples: Sequence[Example], task: Task) -> np.ndarray:
    """(N, L) bool, where each label holds."""
    held_NL = np.zeros((len(examples), len(task.labels)), bool)
    for row, example in enumerate(examples):
        held_NL[row, [task.index[label] for label in example.labels]] = True
    return held_NL
