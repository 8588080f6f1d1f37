import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classer.data.errors import InputError
from classer.data.taxonomy import Label, Task, TaskKind
from classer.model.decode import Calibration, choose, choose_all, probabilities
from classer.tests.strategies import trees


def task(kind: TaskKind, count: int) -> Task:
    return Task("t", kind, tuple(Label(f"l{i}") for i in range(count)))


MULTICLASS = task(TaskKind.MULTICLASS, 3)
MULTILABEL = task(TaskKind.MULTILABEL, 3)
logits = hnp.arrays(np.float64, (4, 3), elements=st.floats(-1e30, 1e30))
temperatures = st.floats(0.01, 100)


def test_softmax_has_known_values():
    probs = probabilities(MULTICLASS, np.log([[1.0, 2.0, 5.0]]), Calibration())
    np.testing.assert_allclose(probs, [[0.125, 0.25, 0.625]], rtol=1e-6)
    assert probs.dtype == np.float32


def test_sigmoid_has_known_values():
    probs = probabilities(MULTILABEL, np.array([[0.0, np.log(3), -np.log(3)]]), Calibration())
    np.testing.assert_allclose(probs, [[0.5, 0.75, 0.25]], rtol=1e-6)


def test_temperature_divides_logits():
    probs = probabilities(MULTICLASS, 2 * np.log([[1.0, 2.0, 5.0]]), Calibration(temperature=2.0))
    np.testing.assert_allclose(probs, [[0.125, 0.25, 0.625]], rtol=1e-6)


@given(logits, temperatures)
def test_softmax_of_any_finite_logits_is_a_distribution(logits_NL, temperature):
    probs = probabilities(MULTICLASS, logits_NL, Calibration(temperature))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-6)


@given(logits, temperatures)
def test_sigmoid_of_any_finite_logits_is_symmetric(logits_NL, temperature):
    probs = probabilities(MULTILABEL, logits_NL, Calibration(temperature))
    negated = probabilities(MULTILABEL, -logits_NL, Calibration(temperature))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs + negated, 1, atol=1e-6)


@given(logits, temperatures)
def test_temperature_never_changes_the_most_probable_logit(logits_NL, temperature):
    probs = probabilities(MULTICLASS, logits_NL, Calibration(temperature))
    best = logits_NL.argmax(axis=1)
    assert (probs[np.arange(4), best] == probs.max(axis=1)).all()


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_row_leaves_the_others_alone(kind, bad):
    good = np.array([[1.0, -2.0, 0.5]])
    rows = np.concatenate([good, [[bad, 0.0, 0.0]], good])
    probs = probabilities(task(kind, 3), rows, Calibration())
    alone = probabilities(task(kind, 3), good, Calibration())
    np.testing.assert_array_equal(probs[[0, 2]], np.concatenate([alone, alone]))


def test_no_texts_give_no_rows():
    assert probabilities(MULTICLASS, np.zeros((0, 3)), Calibration()).shape == (0, 3)
    assert choose_all(MULTICLASS, np.zeros((0, 3)), Calibration()).shape == (0, 3)


def test_exclusive_task_chooses_the_most_probable():
    assert choose(MULTICLASS, np.array([0.2, 0.5, 0.3], np.float32), Calibration()) == [1]
    assert choose(MULTICLASS, np.array([0.4, 0.4, 0.2], np.float32), Calibration()) == [0]


def test_multilabel_task_chooses_all_over_their_thresholds():
    probs = np.array([0.4, 0.6, 0.9], np.float32)
    assert choose(MULTILABEL, probs, Calibration(thresholds=(0.5, 0.5, 0.5))) == [1, 2]
    assert choose(MULTILABEL, probs, Calibration(thresholds=(0.3, 0.7, 0.95))) == [0]
    assert choose(MULTILABEL, probs, Calibration(thresholds=(1.0, 1.0, 1.0))) == []


@given(hnp.arrays(np.float32, 3, elements=st.floats(0, 1, width=32)))
def test_threshold_equal_to_the_probability_admits_it(probs_L):
    assert choose(MULTILABEL, probs_L, Calibration(thresholds=tuple(probs_L.tolist()))) == [0, 1, 2]


def test_multilabel_task_without_thresholds_chooses_nothing_in_silence():
    with pytest.raises(ValueError, match="Task 't' is multilabel, but its calibration has no thresholds"):
        choose(MULTILABEL, np.array([0.4, 0.6, 0.9], np.float32), Calibration())


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="has 3 labels"):
        probabilities(MULTICLASS, np.zeros((2, 4)), Calibration())
    with pytest.raises(ValueError, match="2 thresholds"):
        choose(MULTILABEL, np.zeros(3), Calibration(thresholds=(0.1, 0.2)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_impossible_temperature_is_refused(temperature):
    with pytest.raises(InputError, match="temperature"):
        Calibration(temperature)


def test_impossible_threshold_is_refused():
    with pytest.raises(InputError, match="threshold 1"):
        Calibration(thresholds=(0.5, 1.5))


@given(st.floats(1e-3, 1e3), st.none() | st.lists(st.floats(0, 1)).map(tuple))
def test_json_round_trip(temperature, thresholds):
    calibration = Calibration(temperature, thresholds)
    assert Calibration.from_json(calibration.to_json(), source="x") == calibration


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "calibration.json: the calibration has no field 'temperature'"),
        ({"temperature": "hot"}, "calibration.json: the calibration must hold numbers"),
        ({"temperature": None}, "calibration.json: the calibration must hold numbers"),
        ({"temperature": 0}, "calibration.json: A calibration's temperature must be positive"),
        ({"temperature": 1, "thresholds": 3}, "calibration.json: the calibration must hold numbers"),
        ([], "calibration.json: the calibration must hold numbers"),
    ],
)
def test_damaged_json_is_refused_by_name(data, message):
    with pytest.raises(InputError, match=message):
        Calibration.from_json(data, source="calibration.json")


# Trees: a ─ b ─ c, d;  a ─ e;  f

TREE = Task(
    "tree",
    TaskKind.HIERARCHICAL,
    tuple(
        Label(name, parent=parent)
        for name, parent in (("c", "b"), ("a", None), ("b", "a"), ("d", "b"), ("e", "a"), ("f", None))
    ),
)
tree_logits = hnp.arrays(np.float64, (4, 6), elements=st.floats(-1e30, 1e30))


def test_a_trees_probabilities_are_products_along_paths():
    # P(a) = 3/4, P(b | a) = 2/3, P(c | b) = 1/5
    logits_NL = np.log([[1.0, 3.0, 2.0, 4.0, 1.0, 1.0]])
    probs = probabilities(TREE, logits_NL, Calibration())
    np.testing.assert_allclose(probs, [[0.1, 0.75, 0.5, 0.4, 0.25, 0.25]], rtol=1e-6)


@given(trees(), st.data(), temperatures)
def test_a_trees_leaves_sum_to_one_and_a_parent_is_as_probable_as_its_children(tree, data, temperature):
    logits_NL = data.draw(hnp.arrays(np.float64, (4, len(tree.labels)), elements=st.floats(-1e30, 1e30)))
    probs = probabilities(tree, logits_NL, Calibration(temperature))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs[:, tree.leaves_L].sum(axis=1), 1, rtol=1e-5)
    for label, parent in enumerate(tree.parent_L):
        if parent >= 0:
            assert (probs[:, parent] >= probs[:, label]).all()
    for parent in np.flatnonzero(~tree.leaves_L):
        np.testing.assert_allclose(probs[:, parent], probs[:, tree.parent_L == parent].sum(axis=1), atol=1e-6)


def test_a_nan_in_a_tree_stays_in_its_row():
    logits_NL = np.zeros((2, 6))
    logits_NL[0, 3] = np.nan
    probs = probabilities(TREE, logits_NL, Calibration())
    assert np.isnan(probs[0]).any()
    assert np.isfinite(probs[1]).all()


def test_the_best_leaf_is_chosen_and_an_unsure_answer_stops_above_it():
    probs_L = np.array([0.1, 0.75, 0.5, 0.4, 0.25, 0.25], np.float32)
    assert choose(TREE, probs_L, Calibration()) == [3]
    assert choose(TREE, probs_L, Calibration(), 0.3) == [3]
    assert choose(TREE, probs_L, Calibration(), 0.45) == [2]
    assert choose(TREE, probs_L, Calibration(), 0.6) == [1]
    assert choose(TREE, probs_L, Calibration(), 0.9) == [1]  # no label reaches the threshold: the top one


@given(tree_logits, st.floats(0, 1))
def test_one_label_is_chosen_and_reaches_the_threshold_if_any_above_the_leaf_does(logits_NL, threshold):
    probs = probabilities(TREE, logits_NL, Calibration())
    chosen = choose_all(TREE, probs, Calibration(), threshold)
    assert (chosen.sum(axis=1) == 1).all()
    leaves = choose_all(TREE, probs, Calibration()).argmax(axis=1)
    for row, (leaf, label) in enumerate(zip(leaves, chosen.argmax(axis=1), strict=True)):
        path = [TREE.index[name] for name in TREE.path(leaf)]
        assert label in path
        below = path[path.index(label) + 1 :]
        assert (probs[row, below] < threshold).all()
        assert probs[row, label] >= threshold or label == path[0]
