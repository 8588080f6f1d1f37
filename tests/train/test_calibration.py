from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.special import expit, softmax
from sklearn.metrics import f1_score, log_loss

from classer.data.taxonomy import Label, Task, TaskKind
from classer.model.decode import Calibration, choose_all, probabilities
from classer.train.calibration import (
    MIN_TEMPERATURE,
    best_threshold,
    fit_calibration,
    fit_thresholds,
    negative_log_likelihood,
    without_thresholds,
)
from classer.train.metrics import reliability

ZERO: Any = 0.0  # scikit-learn's own annotation of `zero_division` admits only strings


def task(kind: TaskKind, count: int) -> Task:
    return Task("t", kind, tuple(Label(f"l{i}") for i in range(count)))


def sample(kind: TaskKind, true_temperature: float, n: int = 4000, labels: int = 4):
    """Logits of a model whose temperature is off by a known factor, with targets drawn from the right distribution."""
    rng = np.random.default_rng(7)
    t = task(kind, labels)
    honest = rng.normal(0, 2, (n, labels))
    probs = probabilities(t, honest, Calibration())
    if kind.exclusive:
        targets = (rng.uniform(size=(n, 1)) < probs.cumsum(1)).argmax(1)[:, None] == np.arange(labels)
    else:
        targets = rng.uniform(size=probs.shape) < probs
    return t, honest * true_temperature, targets.astype(np.float32)


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_known_temperature_is_recovered(kind, temperature):
    t, logits, targets = sample(kind, temperature)
    fitted = fit_calibration(t, logits, targets)
    assert fitted.temperature == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_calibration_error_falls(kind):
    t, logits, targets = sample(kind, 3.0)
    before = reliability(t, probabilities(t, logits, Calibration()), targets).ece
    after = reliability(t, probabilities(t, logits, fit_calibration(t, logits, targets)), targets).ece
    assert before > 0.05
    assert after < 0.02


def test_likelihood_equals_scikit_learn():
    t, logits, targets = sample(TaskKind.MULTICLASS, 1.0, n=50)
    expected = log_loss(targets.argmax(1), softmax(logits / 2.0, axis=1), labels=range(4))
    assert negative_log_likelihood(t, logits, targets, 2.0) == pytest.approx(expected, rel=1e-5)
    t, logits, targets = sample(TaskKind.MULTILABEL, 1.0, n=50)
    expected = log_loss(targets.ravel(), expit(logits / 2.0).ravel())
    assert negative_log_likelihood(t, logits, targets, 2.0) == pytest.approx(expected, rel=1e-5)


def logits_and_targets(kind: TaskKind):
    def build(shape_seed):
        n, labels, seed = shape_seed
        elements = st.floats(-50, 50, width=32)
        logits = hnp.arrays(np.float32, (n, labels), elements=elements)
        rng = np.random.default_rng(seed)
        if kind.exclusive:
            targets = np.eye(labels, dtype=np.float32)[rng.integers(0, labels, n)]
        else:
            targets = rng.integers(0, 2, (n, labels)).astype(np.float32)
        return logits.map(lambda x: (task(kind, labels), x, targets))

    return st.tuples(st.integers(1, 12), st.integers(3, 5), st.integers(0, 999)).flatmap(build)


@settings(max_examples=150, deadline=None)
@given(st.one_of(logits_and_targets(TaskKind.MULTICLASS), logits_and_targets(TaskKind.MULTILABEL)))
def test_dev_likelihood_never_gets_worse(drawn):
    t, logits, targets = drawn
    fitted = fit_calibration(t, logits, targets)
    before = negative_log_likelihood(t, logits, targets, 1.0)
    assert negative_log_likelihood(t, logits, targets, fitted.temperature) <= before


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_logits_that_say_nothing_and_no_texts_leave_temperature_one(kind):
    t = task(kind, 3)
    targets = np.eye(3)[[0, 1]]
    assert fit_calibration(t, np.zeros((2, 3)), targets).temperature == 1.0
    nothing = fit_calibration(t, np.zeros((0, 3)), np.zeros((0, 3)))
    assert nothing == Calibration(1.0, None if kind.exclusive else (0.5, 0.5, 0.5))


def test_faultless_dev_set_keeps_the_temperature_in_bounds():
    t = task(TaskKind.MULTICLASS, 3)
    fitted = fit_calibration(t, np.eye(3) * 4, np.eye(3))
    assert MIN_TEMPERATURE <= fitted.temperature < 2 * MIN_TEMPERATURE


def test_thresholds_have_known_values():
    held = np.array([True, True, False, False])
    # One label is told apart below 0.5, one above, one by 0.5 itself.
    assert best_threshold(np.array([0.4, 0.3, 0.2, 0.1]), held) == pytest.approx(0.25)
    assert best_threshold(np.array([0.9, 0.8, 0.7, 0.6]), held) == pytest.approx(0.75)
    assert best_threshold(np.array([0.9, 0.8, 0.3, 0.2]), held) == 0.5


def test_of_equal_thresholds_the_one_nearest_a_half_wins():
    # Choosing the first text alone and choosing all four both reach F1 2/3; two reach 1/2.
    held = np.array([True, False, False, True])
    assert best_threshold(np.array([0.9, 0.8, 0.35, 0.35]), held) == pytest.approx(0.175)
    assert best_threshold(np.array([0.7, 0.6, 0.25, 0.25]), held) == pytest.approx(0.65)


def test_threshold_tells_neighbouring_floats_apart():
    low = np.float32(0.7)
    for _ in range(2):  # of two neighbouring pairs, one has its middle rounded down
        high = np.nextafter(low, np.float32(1))
        assert best_threshold(np.array([high, low]), np.array([True, False])) == float(high)
        low = high


def test_label_without_positive_texts_keeps_a_half():
    assert best_threshold(np.array([0.9, 0.1]), np.array([False, False])) == 0.5


def test_labels_without_positive_texts_take_the_median_of_the_others_and_it_is_said():
    probs = np.array([[0.9, 0.4, 0.5, 0.9, 0.3], [0.6, 0.2, 0.1, 0.5, 0.1]], np.float32)
    targets = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert fit_thresholds(probs, targets) == pytest.approx((0.75, 0.3, 0.7, 0.7, 0.7))
    t = task(TaskKind.MULTILABEL, 5)
    assert without_thresholds(t, csr_array(targets)) == (
        "Task 't': no example for development has 'l2', 'l4' (of 5 labels), by which to choose a threshold; it is the "
        "median of the others'."
    )
    none = without_thresholds(t, csr_array((0, 5)))
    assert "'l0', 'l1', 'l2' and 2 more (of 5 labels)" in none
    assert none.endswith("it is 0.5.")
    assert without_thresholds(t, csr_array(np.eye(5))) == ""
    assert without_thresholds(task(TaskKind.MULTICLASS, 5), csr_array(targets)) == ""


label_of_texts = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=30)


@given(label_of_texts)
@settings(deadline=None)
def test_no_cut_reaches_a_higher_f1(texts):
    probs, held = np.array([p for p, _ in texts], np.float32), np.array([h for _, h in texts])
    single = task(TaskKind.MULTILABEL, 1)

    def f1(threshold: float) -> float:
        chosen = choose_all(single, probs[:, None], Calibration(thresholds=(threshold,)))[:, 0]
        return float(f1_score(held, chosen, zero_division=ZERO))

    best = f1(best_threshold(probs, held))
    assert all(best >= f1(float(p)) - 1e-12 for p in [0.5, *probs[probs > 0]])


def test_thresholds_are_fitted_on_calibrated_probabilities():
    t, logits, targets = sample(TaskKind.MULTILABEL, 3.0, n=500)
    fitted = fit_calibration(t, logits, targets)
    assert fitted.thresholds is not None
    probs = probabilities(t, logits, fitted)
    for i, threshold in enumerate(fitted.thresholds):
        assert threshold == best_threshold(probs[:, i], targets[:, i] > 0.5)


def test_broken_logits_are_refused():
    t = task(TaskKind.MULTICLASS, 3)
    with pytest.raises(ValueError, match="not finite"):
        fit_calibration(t, np.full((2, 3), np.nan), np.eye(3)[:2])
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        fit_calibration(t, np.zeros((2, 3)), np.eye(3))
