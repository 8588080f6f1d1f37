"""The floor that a neural classifier must clearly beat: TF-IDF features and a linear support vector machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_union
from sklearn.svm import LinearSVC

from ..data.errors import InputError
from ..data.examples import Example
from ..data.taxonomy import Task
from .metrics import evaluate


@dataclasses.dataclass(frozen=True, slots=True)
class BaselineScore:
    """How good the baseline is; the fields are those of `Metrics`. It has no probabilities, so no calibration error."""

    n: int
    accuracy: float
    macro_f1: float
    micro_f1: float


def tfidf_svm(train: Sequence[Example], test: Sequence[Example], task: Task) -> BaselineScore:
    """Trains on `train`, measures on `test`.

    Features: TF-IDF of words (1–2-grams) and of characters within words (2–5-grams), sublinear counts. One linear SVM
    against the rest for each label; binary and multiclass tasks take the highest score, multilabel ones every label
    with a positive one. No randomness but LinearSVC's own, which is seeded.

    Raises:
      InputError: no text in `train` has a word, or all have the same label.
    """
    features = make_union(
        # scikit-learn's own pattern drops words of one character: "I", and many a Chinese word.
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True),
        TfidfVectorizer(ngram_range=(2, 5), analyzer="char_wb", sublinear_tf=True),
    )
    try:
        train_NF = features.fit_transform([example.text for example in train])
    except ValueError as e:  # scikit-learn: "empty vocabulary"
        raise InputError(f"Task '{task.name}': no training text has a word, so there is no baseline ({e}).") from None
    test_NF = features.transform([example.text for example in test])
    train_NL, test_NL = _targets(train, task), _targets(test, task)

    if task.kind.exclusive:
        train_N = train_NL.argmax(axis=1)
        if len(np.unique(train_N)) < 2:
            raise InputError(f"Task '{task.name}': all training texts have the same label, so there is no baseline.")
        said_N = np.asarray(LinearSVC(random_state=0).fit(train_NF, train_N).predict(test_NF))
        chosen_NL = said_N[:, None] == np.arange(len(task.labels))
    else:
        chosen_NL = np.zeros(test_NL.shape, bool)
        for label, held_N in enumerate(train_NL.T):
            constant = held_N.all() or not held_N.any()  # a label that tells no text from another cannot be learnt
            chosen_NL[:, label] = (
                held_N.all() if constant else LinearSVC(random_state=0).fit(train_NF, held_N).predict(test_NF)
            )
    metrics = evaluate(task, chosen_NL.astype(np.float32), test_NL, chosen_NL)
    return BaselineScore(metrics.n, metrics.accuracy, metrics.macro_f1, metrics.micro_f1)


def _targets(examples: Sequence[Example], task: Task) -> np.ndarray:
    """(N, L) bool, where each label holds."""
    held_NL = np.zeros((len(examples), len(task.labels)), bool)
    for row, example in enumerate(examples):
        held_NL[row, [task.index[label] for label in example.labels]] = True
    return held_NL
