"""`ClasserClassifier` in scikit-learn's own machinery, on a tiny encoder and toy texts."""

from __future__ import annotations

import copy
import io
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

import classer
from classer.data.errors import InputError
from classer.tests.helpers import TOPICS, toy_text
from classer.tools.targets import InvalidData, read_targets
from classer.train.config import Recipe

NAMES = list(TOPICS)
_rng = np.random.default_rng(0)
LABELS = [NAMES[i % 3] for i in range(120)]
TEXTS = [toy_text([label], _rng) for label in LABELS]
LISTS = [[name for name in NAMES if _rng.random() < 0.5] for _ in range(120)]
LIST_TEXTS = [toy_text(held, _rng) for held in LISTS]
INDICATOR = np.array([[int(name in held) for name in NAMES] for held in LISTS])

Make = Callable[..., classer.ClasserClassifier]


@pytest.fixture(scope="module")
def make(tiny_encoder: Path) -> Make:
    """An unfitted classifier that trains in seconds; options override its own."""

    def make(**options: Any) -> classer.ClasserClassifier:
        quick: dict[str, Any] = {"epochs": 6, "learning_rate": 3e-3, "max_length": 16, "batch_size": 8, "patience": 0}
        return classer.ClasserClassifier(tiny_encoder, **{**quick, **options})

    return make


@pytest.fixture(scope="module")
def fitted(make: Make) -> classer.ClasserClassifier:
    return make().fit(TEXTS, LABELS)


@pytest.fixture(scope="module")
def fitted_lists(make: Make) -> classer.ClasserClassifier:
    return make().fit(LIST_TEXTS, LISTS)


def test_the_defaults_are_the_recipe_s() -> None:
    params = classer.ClasserClassifier().get_params()
    recipe = Recipe()
    own = {"precision", "verbose"}
    assert {name: getattr(recipe, name) for name in params.keys() - own} == {
        name: value for name, value in params.items() if name not in own
    }


def test_a_fit_learns(fitted: classer.ClasserClassifier) -> None:
    assert fitted.classes_.tolist() == NAMES
    assert fitted.score(TEXTS, LABELS) > 0.8
    probs_NL = fitted.predict_proba(TEXTS)
    assert probs_NL.shape == (120, 3)
    np.testing.assert_allclose(probs_NL.sum(axis=1), 1, rtol=1e-5)
    assert np.array_equal(fitted.predict(TEXTS), fitted.classes_[probs_NL.argmax(axis=1)])
    assert fitted.predict([]).shape == (0,)
    weights = [1.0] + [0.0] * 119
    assert fitted.score(TEXTS, LABELS, weights) == float(fitted.predict(TEXTS[:1])[0] == LABELS[0])


def test_a_fit_prints_nothing_and_leaves_no_files(
    make: Make, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quiet = make(epochs=1, focus_epochs=1).fit(TEXTS, LABELS)
    quiet.predict(TEXTS[:2])
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "tmp"]
    make(epochs=1, verbose=True).fit(TEXTS, LABELS)
    said = capfd.readouterr()
    assert "108 to train on, 12 for development" in said.out
    assert "epoch 1/1" in said.err


@pytest.mark.parametrize("copied", ["pickle", "joblib", "deepcopy"])
def test_a_copy_answers_the_same(fitted: classer.ClasserClassifier, copied: str) -> None:
    if copied == "deepcopy":
        other = copy.deepcopy(fitted)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(fitted))
    else:
        joblib.dump(fitted, file := io.BytesIO())
        file.seek(0)
        other = joblib.load(file)
    assert np.array_equal(other.predict_proba(TEXTS[:5]), fitted.predict_proba(TEXTS[:5]))


def test_a_clone_is_not_fitted(fitted: classer.ClasserClassifier) -> None:
    other: Any = clone(fitted)
    assert other.get_params() == fitted.get_params()
    for call in (other.predict, other.predict_proba, other.save):
        with pytest.raises(NotFittedError):
            call(TEXTS[:1])
    with pytest.raises(NotFittedError):
        other.score(TEXTS, LABELS)


def test_a_saved_bundle_answers_the_same(fitted: classer.ClasserClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "topics")
    model = classer.load(tmp_path / "topics", precision="float32")
    assert model.labels == tuple(NAMES)
    assert np.array_equal(model.predict_proba(TEXTS[:9]), fitted.predict_proba(TEXTS[:9]))
    with pytest.raises(InputError, match=r"topics exists already and was not touched; name a new folder\.$"):
        fitted.save(tmp_path / "topics")


TEXT_FORMS: dict[str, Callable[[list[str]], Any]] = {
    "tuple": tuple,
    "array of str": np.array,
    "array of objects": lambda texts: np.array(texts, object),
    "pandas": lambda texts: pd.Series(texts, index=range(100, 100 + len(texts))),
    "polars": pl.Series,
    "column of a dataset": lambda texts: hf_datasets.Dataset.from_dict({"text": texts})["text"],
    "pyarrow": pa.array,
    "pyarrow, chunked": lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_texts_come_in_any_form(fitted: classer.ClasserClassifier, form: str) -> None:
    texts = TEXT_FORMS[form](TEXTS[:4])
    assert np.array_equal(fitted.predict_proba(texts), fitted.predict_proba(TEXTS[:4]))
    labels = TEXT_FORMS[form](LABELS)
    given = read_targets(labels)
    assert given.names == tuple(NAMES)
    assert list(given.columns_N) == [[NAMES.index(label)] for label in LABELS]
    assert fitted.score(texts, TEXT_FORMS[form](LABELS[:4])) == fitted.score(TEXTS[:4], LABELS[:4])


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        ([10, 2, 2], np.array([2, 10]), ("2", "10")),
        (np.array([3, 1], np.int8), np.array([1, 3], np.int8), ("1", "3")),
        ([True, False], np.array([False, True]), ("false", "true")),
        (np.array([1.0, 0.0]), np.array([0.0, 1.0]), ("0", "1")),
        (["b", "a"], np.array(["a", "b"]), ("a", "b")),
        (np.array(["b", "a"], object), np.array(["a", "b"], object), ("a", "b")),
        (pd.Series(["b", "a"], dtype="category"), np.array(["a", "b"]), ("a", "b")),
        (pl.Series([7, 5]), np.array([5, 7]), ("5", "7")),
        ([[2], [10, 2], []], np.array([2, 10]), ("2", "10")),
        ([("b",), {"a"}], np.array(["a", "b"]), ("a", "b")),
        (INDICATOR, np.arange(3), ("0", "1", "2")),
        (INDICATOR.tolist(), np.arange(3), ("0", "1", "2")),
        (INDICATOR.astype(bool), np.arange(3), ("0", "1", "2")),
        (sparse.csr_array(INDICATOR), np.arange(3), ("0", "1", "2")),
        (pd.DataFrame(INDICATOR, columns=NAMES), np.array(NAMES), tuple(NAMES)),
        (pl.DataFrame(INDICATOR, schema=NAMES), np.array(NAMES), tuple(NAMES)),
    ],
)
def test_classes_keep_their_type(labels: Any, classes: np.ndarray, names: tuple[str, ...]) -> None:
    targets = read_targets(labels)
    assert np.array_equal(targets.classes_L, classes)
    assert targets.classes_L.dtype == classes.dtype
    assert targets.names == names


def test_one_number_a_text_in_lists_is_multilabel(make: Make) -> None:
    model = make(epochs=1).fit(TEXTS, [[10 * NAMES.index(label)] for label in LABELS])
    assert model.classes_.tolist() == [0, 10, 20]
    predicted = model.predict(TEXTS)
    assert all(isinstance(answer, list) for answer in predicted)
    assert {type(label) for answer in predicted for label in answer} <= {int}
    assert not np.allclose(model.predict_proba(TEXTS).sum(axis=1), 1, atol=1e-3)


def test_lists_of_labels(fitted_lists: classer.ClasserClassifier) -> None:
    predicted = fitted_lists.predict(LIST_TEXTS)
    assert fitted_lists.classes_.tolist() == NAMES
    assert fitted_lists.predict_proba(LIST_TEXTS).shape == (120, 3)
    right = [sorted(answer) == held for answer, held in zip(predicted, LISTS, strict=True)]
    assert fitted_lists.score(LIST_TEXTS, LISTS) == np.mean(right) > 0.5
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        fitted_lists.score(LIST_TEXTS, LISTS[:3])


def test_an_indicator_matrix(make: Make, fitted_lists: classer.ClasserClassifier) -> None:
    model = make().fit(LIST_TEXTS, INDICATOR)
    predicted = model.predict(LIST_TEXTS)
    assert predicted.shape == INDICATOR.shape
    assert set(np.unique(predicted)) == {0, 1}
    assert model.score(LIST_TEXTS, INDICATOR) == (predicted == INDICATOR).all(axis=1).mean()
    # the same examples of the same task
    assert np.array_equal(model.predict_proba(LIST_TEXTS), fitted_lists.predict_proba(LIST_TEXTS))


def test_cross_validation(make: Make) -> None:
    numbers = np.array([NAMES.index(label) for label in LABELS]) * 10
    probs_NL: Any = cross_val_predict(make(), pd.Series(TEXTS), numbers, cv=2, method="predict_proba")
    np.testing.assert_allclose(probs_NL.sum(axis=1), 1, rtol=1e-5)
    assert (probs_NL.argmax(axis=1) * 10 == numbers).mean() > 0.5


def test_cross_validation_of_several_labels(make: Make) -> None:
    scores = cross_val_score(make(), np.array(LIST_TEXTS), INDICATOR, cv=2, scoring="f1_micro")
    assert (scores > 0.5).all()


@pytest.mark.slow
def test_cross_validation_of_lists(make: Make) -> None:
    folds = KFold(2)  # scikit-learn cannot stratify lists
    scores = cross_val_score(make(), LIST_TEXTS, LISTS, cv=folds)
    assert (scores > 0.2).all()


@pytest.mark.slow
def test_a_grid_in_a_pipeline_in_two_processes(make: Make) -> None:
    lower = FunctionTransformer(np.char.lower)
    pipeline = Pipeline([("lower", lower), ("classify", make())])
    grid: Any = GridSearchCV(pipeline, {"classify__epochs": np.array([1, 8])}, cv=2, n_jobs=2)
    grid.fit(TEXTS, LABELS)
    assert grid.best_params_ == {"classify__epochs": 8}
    assert grid.score([text.upper() for text in TEXTS], LABELS) > 0.8
    assert grid.predict_proba(TEXTS[:2]).shape == (2, 3)


def test_calibration_on_held_out_texts(fitted: classer.ClasserClassifier) -> None:
    calibrated = CalibratedClassifierCV(FrozenEstimator(fitted)).fit(TEXTS, LABELS)
    assert calibrated.predict_proba(TEXTS[:4]).shape == (4, 3)


SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("texts", "labels", "sentence"),
    [
        (["a", 5], ["x", "y"], "texts[1] is an int; fit takes texts, each a str."),
        (["a", None], ["x", "y"], "texts[1] is None, a missing value; fit takes texts, each a str."),
        (["a", float("nan")], ["x", "y"], "texts[1] is NaN, a missing value; fit takes texts, each a str."),
        (pd.Series(["a", None]), ["x", "y"], "texts[1] is NaN, a missing value; fit takes texts, each a str."),
        ([SURROGATE], ["x"], "texts[0] holds a lone surrogate, which UTF-8 cannot carry; decode it properly."),
        (["a" * 1_000_001, "b"], ["x", "y"], "texts[0]: The text has 1000001 characters"),
        ("a text", ["x"], "fit takes a list, array, Series or other iterable of texts; "),
        (np.array([["a"], ["b"]]), ["x", "y"], "this array has the shape (2, 1) instead of (N,)."),
        (pd.DataFrame({"text": ["a"]}), ["x"], "not a table; give one of its columns, such as data['text']."),
        (["a", "b", "c"], ["x", "y"], "There are 3 texts, but labels for 2; the two must be of one length."),
        ([], [], "There are no texts"),
        (["a", "b"], ["x", "x"], "All 2 labels are 'x', one class; a classifier needs at least two."),
        (["a", "b"], ["x", None], "labels[1] is None, a missing value; a label is a str, a bool or a whole number."),
        (["a", "b"], np.array(["x", np.nan]), "labels[1] is 'nan', a missing value; name a label or remove the row."),
        (["a", "b"], [1, np.nan], "labels[1] is NaN, a missing value; a label is a str, a bool or a whole number."),
        (["a", "b"], [1, pd.NA], "labels[1] is <NA>, a missing value; a label is a str, a bool or a whole number."),
        (["a", "b"], ["x", 5], "labels[1] is an int, but labels[0] a str; give all labels one type."),
        (["a", "b"], [True, 5], "labels[1] is an int, but labels[0] a bool; give all labels one type."),
        (["a", "b"], ["x", " "], "labels[1] is an empty label; name one."),
        (["a", "b"], ["x", SURROGATE], "labels[1] holds a lone surrogate"),
        (["a", "b"], [1.0, 0.5], "Unknown label type: labels[1] is 0.5; a label is a str, a bool or a whole number."),
        (["a", "b"], [["x"], "y"], "labels[1] is a str, but other texts have a list of labels; give one here."),
        (["a", "b"], [["x"], ["y", "y"]], "labels[1] names a label twice; an indicator matrix must be a NumPy array."),
        (["a", "b"], np.array([[1, 0], [2, 0]]), "labels[1, 0] is 2; an indicator matrix holds only 0 and 1."),
        (["a", "b"], np.zeros((2, 3)), "None of the 2 texts has a label; a classifier needs some to learn from."),
        (["a", "b"], "xy", "labels is one string; give a label for each text."),
        (["a", "b"], None, "fit requires y, the labels of the texts, but the target y is None."),
        (["a", "b"], ["x", "y"], "2 texts of 2 classes are too few to set 10% aside for development"),
    ],
)
def test_bad_examples_are_one_sentence(make: Make, texts: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(InvalidData, match=re.escape(sentence)) as caught:
        make().fit(texts, labels)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, InputError)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"epochs": "3"}, "epochs must be a whole number; it is '3'."),
        ({"epochs": 1.5}, "epochs must be a whole number; it is 1.5."),
        ({"epochs": True}, "epochs must be a whole number; it is True."),
        ({"epochs": -1}, "epochs must be at least 0; it is -1."),
        ({"learning_rate": None}, "learning_rate must be a number; it is None."),
        ({"class_weights": "even"}, "class_weights must be one of none, balanced; it is 'even'."),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of float32, bfloat16; it is 'int8'."),
        ({"precision": "fp8"}, "precision must be one of auto, "),
        ({"max_length": 400}, "max_length is 400, but the encoder has only 48 positions."),
        ({"encoder": 5}, "encoder must be a name or a path; it is 5."),
        ({"encoder": "./nowhere"}, "nowhere"),
    ],
)
def test_bad_parameters_are_one_sentence(make: Make, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        make().set_params(**params).fit(TEXTS, LABELS)
    assert "\n" not in str(caught.value)


def test_bad_texts_to_predict_are_one_sentence(fitted: classer.ClasserClassifier) -> None:
    for call in (fitted.predict, fitted.predict_proba):
        with pytest.raises(InvalidData, match=r"texts\[1\] is None, a missing value; predict"):
            call(["a", None])


# Those of scikit-learn's checks that fit nothing, or that need no table of numbers.
CHECKS = (
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_mixin_order,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
    estimator_checks.check_estimators_unfitted,
    estimator_checks.check_non_transformer_estimators_n_iter,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checks_of_scikit_learn(make: Make, check: Callable[..., None]) -> None:
    check("ClasserClassifier", make())
