import json
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from classer.data.taxonomy import Label, Task, TaskKind
from classer.model.decode import Calibration, choose_all
from classer.train.metrics import NUM_BINS, evaluate, reliability

ZERO: Any = 0.0  # scikit-learn's own annotation of `zero_division` admits only strings


def task(kind: TaskKind, count: int) -> Task:
    return Task("t", kind, tuple(Label(f"l{i}") for i in range(count)))


@st.composite
def predictions(draw, kind: TaskKind):
    """A task with probabilities, targets and choices; some labels occur nowhere."""
    n, labels = draw(st.integers(0, 12)), draw(st.integers(3, 7))
    probs = draw(hnp.arrays(np.float32, (n, labels), elements=st.floats(0, 1, width=32)))
    if kind.exclusive:
        truth = draw(hnp.arrays(np.int64, n, elements=st.integers(0, labels - 1)))
        targets = np.eye(labels, dtype=np.float32)[truth]
    else:
        targets = draw(hnp.arrays(np.float32, (n, labels), elements=st.sampled_from([0.0, 1.0])))
    t = task(kind, labels)
    return t, probs, targets, choose_all(t, probs, Calibration(thresholds=(0.5,) * labels))


@given(predictions(TaskKind.MULTICLASS))
def test_single_label_equals_scikit_learn(drawn):
    t, probs, targets, chosen = drawn
    found = evaluate(t, probs, targets, chosen)
    assert found.n == len(probs)
    if not found.n:
        assert (found.accuracy, found.macro_f1, found.micro_f1, found.ece) == (0, 0, 0, 0)
        return
    truth, said = targets.argmax(1), chosen.argmax(1)
    assert found.accuracy == pytest.approx(sk.accuracy_score(truth, said))
    assert found.macro_f1 == pytest.approx(sk.f1_score(truth, said, average="macro", zero_division=ZERO))
    assert found.micro_f1 == pytest.approx(found.accuracy)
    check_labels(
        found, sk.precision_recall_fscore_support(truth, said, labels=range(len(t.labels)), zero_division=ZERO)
    )


@given(predictions(TaskKind.MULTILABEL))
def test_multilabel_equals_scikit_learn(drawn):
    t, probs, targets, chosen = drawn
    found = evaluate(t, probs, targets, chosen)
    if not found.n:
        return
    occurs = np.flatnonzero(targets.any(0) | chosen.any(0))
    assert found.accuracy == pytest.approx(sk.accuracy_score(targets, chosen))
    assert found.micro_f1 == pytest.approx(sk.f1_score(targets, chosen, average="micro", zero_division=ZERO))
    if len(occurs):
        macro = sk.f1_score(targets, chosen, labels=occurs, average="macro", zero_division=ZERO)
        assert found.macro_f1 == pytest.approx(macro)
    else:
        assert found.macro_f1 == 0
    check_labels(found, sk.precision_recall_fscore_support(targets, chosen, zero_division=ZERO))


def check_labels(found, expected):
    precision, recall, f1, support = expected
    for i, label in enumerate(found.labels):
        assert (label.precision, label.recall, label.f1) == pytest.approx((precision[i], recall[i], f1[i]))
        assert label.support == support[i]


def test_label_without_texts_is_zero_and_left_out_of_the_mean():
    t = task(TaskKind.MULTICLASS, 3)
    probs = np.eye(3, dtype=np.float32)[[0, 1]]
    found = evaluate(t, probs, probs, probs > 0.5)
    assert (found.labels[2].f1, found.labels[2].support) == (0.0, 0)
    assert found.macro_f1 == 1.0


def test_ece_of_a_hand_made_example():
    # Four answers with confidence 0.9, of which two are right; two with 0.6 (on a bin's upper edge), both right.
    first = np.array([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    probs = np.stack([first, 1 - first], axis=1)
    targets = np.eye(2)[[0, 0, 1, 1, 0, 0]]
    found = reliability(task(TaskKind.BINARY, 2), probs, targets)
    assert found.ece == pytest.approx((4 * 0.4 + 2 * 0.4) / 6)
    assert found.counts[13] == 4
    assert found.counts[8] == 2  # (8/15, 9/15] holds 0.6
    assert found.confidence[13] == pytest.approx(0.9)
    assert found.accuracy[13] == 0.5


def test_ece_of_multilabel_counts_every_decision():
    probs = np.array([[0.8, 0.1], [0.8, 0.1]])
    targets = np.array([[1.0, 0.0], [0.0, 0.0]])
    found = reliability(task(TaskKind.MULTILABEL, 2), probs, targets)
    assert found.counts.sum() == 4
    assert found.ece == pytest.approx((2 * 0.3 + 2 * 0.1) / 4)


def test_ece_of_a_tree_is_that_of_its_leaves():
    labels = (Label("a"), Label("b"), Label("a1", parent="a"), Label("a2", parent="a"))
    tree = Task("t", TaskKind.HIERARCHICAL, labels)
    probs = np.array([[0.9, 0.1, 0.6, 0.3], [0.3, 0.7, 0.2, 0.1]])
    targets = np.eye(4)[[2, 0]]
    found = reliability(tree, probs, targets)
    assert found.counts.sum() == 2
    assert found.ece == pytest.approx((abs(0.6 - 1) + 0.7) / 2)


def test_ece_tells_calibrated_from_overconfident():
    rng = np.random.default_rng(0)
    honest = rng.uniform(0.5, 1, 20_000)
    targets = np.eye(2)[(rng.uniform(size=honest.size) > honest).astype(int)]
    binary = task(TaskKind.BINARY, 2)
    sure = np.minimum(honest + 0.2, 1)
    assert reliability(binary, np.stack([honest, 1 - honest], 1), targets).ece < 0.01
    assert reliability(binary, np.stack([sure, 1 - sure], 1), targets).ece > 0.1


@given(st.floats(0, 1, width=32))
def test_every_probability_falls_into_the_bin_that_holds_it(p):
    found = reliability(task(TaskKind.MULTILABEL, 1), np.array([[p]], np.float32), np.ones((1, 1)))
    (m,) = np.flatnonzero(found.counts)
    assert m / NUM_BINS - 1e-9 <= p <= (m + 1) / NUM_BINS + 1e-9


def test_json_is_plain():
    t = task(TaskKind.MULTICLASS, 3)
    probs = np.eye(3, dtype=np.float32)
    data = json.loads(json.dumps(evaluate(t, probs, probs, probs > 0.5).to_json(), allow_nan=False))
    assert data["accuracy"] == 1.0
    assert data["labels"][1] == {
        "name": "l1",
        "precision": 1.0,
        "recall": 1.0,
        "f1": 1.0,
        "support": 1,
        "predicted": 1,
    }


def test_broken_predictions_are_refused():
    t = task(TaskKind.MULTICLASS, 3)
    ok = np.eye(3)
    nan = np.where(np.arange(9).reshape(3, 3) == 4, np.nan, ok)
    with pytest.raises(ValueError, match=r"1 of 3 texts are not finite \(first: text 1\)"):
        evaluate(t, nan, ok, ok > 0.5)
    with pytest.raises(ValueError, match="the targets have the shape"):
        evaluate(t, ok, ok[:2], ok > 0.5)
