"""The losses against NumPy formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from classer.data.taxonomy import Label, LabelTable, Task, TaskKind, Taxonomy
from classer.model.decode import Calibration, probabilities
from classer.tests.strategies import trees
from classer.train.losses import (
    SoftTargets,
    answers,
    balanced_class_weights,
    classification_loss,
    relation_loss,
    teacher_loss,
)

RNG = np.random.default_rng(0)
LOGITS_BL = RNG.normal(0, 3, (5, 4)).astype(np.float32)
ONE_HOT_BL = np.eye(4, dtype=np.float32)[[2, 0, 3, 2, 1]]
MULTI_HOT_BL = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
CLASS_WEIGHTS_L = np.array([0.5, 1.0, 2.0, 4.0], np.float32)
ALL_B = np.ones(5, np.float32)


def table_of(kind: TaskKind, num_labels: int) -> LabelTable:
    return Taxonomy((Task("toy", kind, tuple(Label(str(i)) for i in range(num_labels))),)).table


def loss(kind: TaskKind, logits_BL, targets_BL, weights_B=ALL_B, **options) -> float:
    tasks_B = np.zeros(len(logits_BL), np.int32)
    arrays = [jnp.asarray(x) for x in (logits_BL, targets_BL, tasks_B, weights_B)]
    return float(classification_loss(table_of(kind, logits_BL.shape[1]), *arrays, **options))


def balanced(kind: TaskKind, targets_NL: np.ndarray) -> np.ndarray:
    table = table_of(kind, targets_NL.shape[1])
    return np.asarray(balanced_class_weights(table, targets_NL.sum(axis=0), np.array([len(targets_NL)])))


def softmax_losses(smoothing: float = 0.0) -> np.ndarray:
    """(B,) in float64."""
    logits_BL = LOGITS_BL.astype(np.float64)
    log_probs_BL = logits_BL - np.log(np.exp(logits_BL).sum(axis=1, keepdims=True))
    targets_BL = (1 - smoothing) * ONE_HOT_BL + smoothing / 4
    return -(targets_BL * log_probs_BL).sum(axis=1)


def sigmoid_losses(positive_weights_L: float | np.ndarray = 1.0) -> np.ndarray:
    """(B,) in float64."""
    probs_BL = 1 / (1 + np.exp(-LOGITS_BL.astype(np.float64)))
    losses_BL = -np.where(MULTI_HOT_BL == 1, positive_weights_L * np.log(probs_BL), np.log(1 - probs_BL))
    return losses_BL.sum(axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multiclass_is_the_cross_entropy_of_the_smoothed_softmax(smoothing: float) -> None:
    got = loss(TaskKind.MULTICLASS, LOGITS_BL, ONE_HOT_BL, label_smoothing=smoothing)
    assert got == pytest.approx(softmax_losses(smoothing).mean(), rel=1e-5)


def test_binary_is_the_same_over_two_labels() -> None:
    logits_BL, targets_BL = LOGITS_BL[:, :2], np.eye(2, dtype=np.float32)[[0, 1, 1, 0, 1]]
    margin_B = (logits_BL * (2 * targets_BL - 1)).sum(axis=1).astype(np.float64)
    assert loss(TaskKind.BINARY, logits_BL, targets_BL) == pytest.approx(np.log1p(np.exp(-margin_B)).mean(), rel=1e-5)


def test_multilabel_is_the_sum_of_the_sigmoids_cross_entropies_and_not_smoothed() -> None:
    expected = sigmoid_losses().mean()
    assert loss(TaskKind.MULTILABEL, LOGITS_BL, MULTI_HOT_BL) == pytest.approx(expected, rel=1e-5)
    assert loss(TaskKind.MULTILABEL, LOGITS_BL, MULTI_HOT_BL, label_smoothing=0.1) == pytest.approx(expected, rel=1e-5)


def test_class_weights_multiply_the_losses_of_examples_of_the_class() -> None:
    got = loss(TaskKind.MULTICLASS, LOGITS_BL, ONE_HOT_BL, label_smoothing=0.1, class_weights_L=CLASS_WEIGHTS_L)
    expected = softmax_losses(0.1) * np.array([2.0, 0.5, 4.0, 2.0, 1.0])
    assert got == pytest.approx(expected.mean(), rel=1e-5)


def test_class_weights_multiply_the_positives_of_a_multilabel_task() -> None:
    got = loss(TaskKind.MULTILABEL, LOGITS_BL, MULTI_HOT_BL, class_weights_L=CLASS_WEIGHTS_L)
    assert got == pytest.approx(sigmoid_losses(CLASS_WEIGHTS_L).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "targets_BL"), [(TaskKind.MULTICLASS, ONE_HOT_BL), (TaskKind.MULTILABEL, MULTI_HOT_BL)]
)
def test_filler_rows_count_for_nothing(kind: TaskKind, targets_BL: np.ndarray) -> None:
    def of_logits(logits_BL, targets_BL, weights_B):
        tasks_B = jnp.zeros(len(logits_BL), jnp.int32)
        return classification_loss(table_of(kind, 4), logits_BL, targets_BL, tasks_B, weights_B, label_smoothing=0.1)

    value_and_gradient = jax.value_and_grad(of_logits)
    alone, alone_BL = value_and_gradient(LOGITS_BL[:3], targets_BL[:3], ALL_B[:3])
    padded_targets_BL = np.concatenate([targets_BL[:3], np.zeros((2, 4), np.float32)])
    padded, padded_BL = value_and_gradient(LOGITS_BL, padded_targets_BL, np.array([1, 1, 1, 0, 0], np.float32))
    assert float(padded) == pytest.approx(float(alone), rel=1e-6)
    np.testing.assert_allclose(padded_BL[:3], alone_BL, rtol=1e-5)
    assert not padded_BL[3:].any()


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_a_batch_of_fillers_alone_and_huge_logits_are_finite(kind: TaskKind) -> None:
    assert loss(kind, LOGITS_BL, np.zeros((5, 4), np.float32), np.zeros(5, np.float32)) == 0.0
    huge = np.where(ONE_HOT_BL == 1, -1e6, 1e6).astype(np.float32)
    assert 1e5 < loss(kind, huge, ONE_HOT_BL) < 1e8


def test_balanced_weights_give_each_label_the_same_mass_and_the_mean_example_weight_one() -> None:
    targets_NL = np.eye(4, dtype=np.float32)[[0] * 6 + [1] * 3 + [3]]  # label 2 has no example
    weights_L = balanced(TaskKind.MULTICLASS, targets_NL)
    assert weights_L.dtype == np.float32
    np.testing.assert_allclose(weights_L, [10 / 18, 10 / 9, 1.0, 10 / 3], rtol=1e-6)
    mass_L = (targets_NL * weights_L).sum(axis=0)
    np.testing.assert_allclose(mass_L, [10 / 3, 10 / 3, 0, 10 / 3], rtol=1e-6)
    assert (targets_NL @ weights_L).mean() == pytest.approx(1.0)


def test_balanced_weights_of_a_multilabel_task_weigh_positives_against_negatives() -> None:
    targets_NL = np.zeros((500, 3), np.float32)
    targets_NL[:100, 0] = 1
    targets_NL[0, 1] = 1  # 499 negatives to one: held at 100
    np.testing.assert_allclose(balanced(TaskKind.MULTILABEL, targets_NL), [4.0, 100.0, 1.0])


# Several kinds in a batch: a tree (a ─ b, c;  d), two flags, three topics

TREE = Task(
    "tree",
    TaskKind.HIERARCHICAL,
    tuple(Label(name, parent=parent) for name, parent in (("a", None), ("b", "a"), ("c", "a"), ("d", None))),
)
FLAGS = Task("flags", TaskKind.MULTILABEL, (Label("x"), Label("y")))
TOPICS = Task("topics", TaskKind.MULTICLASS, tuple(map(Label, "pqr")))
MIXED = Taxonomy((TREE, FLAGS, TOPICS))
MIXED_LOGITS_BL = RNG.normal(0, 2, (5, 9)).astype(np.float32)
TASKS_B = np.array([0, 1, 2, 0, 0], np.int32)
GIVEN = ((0, 2), (1, 4), (2, 8), (3, 3), (4, 0))  # c; x; r; d; the inner label a
MIXED_TARGETS_BL = np.zeros((5, 9), np.float32)
for row, column in GIVEN:
    MIXED_TARGETS_BL[row, column] = 1


def mixed_losses(logits_BL: np.ndarray = MIXED_LOGITS_BL) -> np.ndarray:
    """(B,) in float64, from the probabilities that decoding gives."""
    losses = []
    for row, column in GIVEN:
        task = MIXED.tasks[TASKS_B[row]]
        part = MIXED.slice_of(task.name)
        probs_L = probabilities(task, logits_BL[row : row + 1, part].astype(np.float64), Calibration())[0]
        probs_L = probs_L.astype(np.float64)
        held = np.arange(len(probs_L)) == column - part.start
        losses.append(-np.log(np.where(held, probs_L, 1 - probs_L) if not task.kind.exclusive else probs_L[held]).sum())
    return np.array(losses)


def mixed_loss(targets_BL=MIXED_TARGETS_BL, weights_B=ALL_B, logits_BL=MIXED_LOGITS_BL, **options) -> float:
    arrays = [jnp.asarray(x) for x in (logits_BL, targets_BL, TASKS_B, weights_B)]
    return float(classification_loss(MIXED.table, *arrays, **options))


def test_a_mixed_batch_is_the_likelihood_that_decoding_gives() -> None:
    for row in range(5):
        alone_B = (np.arange(5) == row).astype(np.float32)
        assert mixed_loss(weights_B=alone_B) == pytest.approx(mixed_losses()[row], rel=1e-4)
    assert mixed_loss() == pytest.approx(mixed_losses().mean(), rel=1e-4)


def test_an_example_moves_its_own_tasks_logits_alone() -> None:
    def of_logits(logits_BL):
        arrays = [jnp.asarray(x) for x in (MIXED_TARGETS_BL, TASKS_B, ALL_B)]
        return classification_loss(MIXED.table, logits_BL, *arrays, label_smoothing=0.1)

    gradient_BL = np.asarray(jax.grad(of_logits)(jnp.asarray(MIXED_LOGITS_BL)))
    mine_BL = TASKS_B[:, None] == MIXED.table.task_L
    assert not gradient_BL[~mine_BL].any()
    assert gradient_BL[0, :4].all()  # the whole tree: both sets of siblings on the path of c
    assert gradient_BL[3, [0, 3]].all()
    assert not gradient_BL[3, [1, 2]].any()  # d is given: nothing is said about what is below a
    assert gradient_BL[4, [0, 3]].all()
    assert not gradient_BL[4, [1, 2]].any()


def test_smoothing_is_among_siblings() -> None:
    only_first = np.array([1, 0, 0, 0, 0], np.float32)
    log_probs = [np.log(p) for p in (_softmax(MIXED_LOGITS_BL[0, [0, 3]]), _softmax(MIXED_LOGITS_BL[0, [1, 2]]))]
    expected = -(0.95 * log_probs[0][0] + 0.05 * log_probs[0][1]) - (0.05 * log_probs[1][0] + 0.95 * log_probs[1][1])
    assert mixed_loss(weights_B=only_first, label_smoothing=0.1) == pytest.approx(expected, rel=1e-4)


def _softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x.astype(np.float64))
    return exp / exp.sum()


def test_balanced_weights_are_of_each_task_alone() -> None:
    targets = np.concatenate([MIXED_TARGETS_BL, MIXED_TARGETS_BL[[0]]])  # c twice, d and a once; x once in one
    weights_L = np.asarray(balanced_class_weights(MIXED.table, targets.sum(axis=0), np.array([4, 1, 1])))
    np.testing.assert_allclose(weights_L, [4 / 3, 1, 4 / 6, 4 / 3, 0, 1, 1, 1, 1])


def test_answers_are_those_that_decoding_gives_of_the_examples_own_task() -> None:
    got_BL = np.asarray(answers(MIXED.table, jnp.asarray(MIXED_LOGITS_BL), jnp.asarray(TASKS_B)))
    for row, task in enumerate(MIXED.tasks[i] for i in TASKS_B):
        part = MIXED.slice_of(task.name)
        probs_L = probabilities(task, MIXED_LOGITS_BL[row : row + 1, part], Calibration())[0]
        np.testing.assert_allclose(got_BL[row, part], np.where(task.leaves_L, probs_L, 0), rtol=1e-5)
        assert not np.delete(got_BL[row], np.arange(part.start, part.stop)).any()
    assert got_BL[0, 0] == 0  # the inner label a
    huge_BL = jnp.full((5, 9), -1e4).at[:, 2].set(1e4)
    assert np.isfinite(answers(MIXED.table, huge_BL, jnp.asarray(TASKS_B))).all()


@settings(deadline=None, max_examples=15)
@given(trees(), st.integers(0, 99))
def test_the_losses_probabilities_of_any_tree_are_decodings(task: Task, seed: int) -> None:
    table = Taxonomy((task,)).table
    logits_BL = np.random.default_rng(seed).normal(0, 3, (2, len(task.labels))).astype(np.float32)
    tasks_B = jnp.zeros(2, jnp.int32)
    probs_BL = probabilities(task, logits_BL, Calibration())
    got_BL = np.asarray(answers(table, jnp.asarray(logits_BL), tasks_B))
    np.testing.assert_allclose(got_BL.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(got_BL, np.where(task.leaves_L, probs_BL, 0), rtol=1e-4, atol=1e-9)
    for label in range(len(task.labels)):  # inner ones too: none is likelier than the one above
        targets_BL = jnp.zeros(logits_BL.shape).at[:, label].set(1)
        got = classification_loss(table, jnp.asarray(logits_BL), targets_BL, tasks_B, jnp.ones(2))
        assert float(got) == pytest.approx(-np.log(probs_BL[:, label].astype(np.float64)).mean(), rel=1e-4, abs=1e-5)


def test_a_teachers_answers_are_mixed_in_where_there_are_any() -> None:
    soft_BL = np.zeros((5, 9), np.float32)
    soft_BL[2, 6:] = (0.2, 0.5, 0.3)
    soft_BL[0, [1, 2, 3]] = (0.1, 0.6, 0.3)  # leaves of the tree
    share_B = np.array([0.25, 0, 1, 0, 0], np.float32)
    soft = SoftTargets(jnp.asarray(soft_BL), jnp.asarray(share_B))
    temperature = 2.0
    hard = mixed_losses()
    cool = MIXED_LOGITS_BL / temperature
    topics = -(np.array([0.2, 0.5, 0.3]) * np.log(_softmax(cool[2, 6:]))).sum()
    top, below = np.log(_softmax(cool[0, [0, 3]])), np.log(_softmax(cool[0, [1, 2]]))
    tree = -(0.1 * (top[0] + below[0]) + 0.6 * (top[0] + below[1]) + 0.3 * top[1])
    expected = [0.75 * hard[0] + 0.25 * 4 * tree, hard[1], 4 * topics, hard[3], hard[4]]
    assert mixed_loss(soft=soft, temperature=temperature) == pytest.approx(np.mean(expected), rel=1e-4)
    # What is logged of it: over the two examples that the teacher answered, whatever it weighs there.
    logits_BL, tasks_B = jnp.asarray(MIXED_LOGITS_BL), jnp.asarray(TASKS_B)
    told = teacher_loss(MIXED.table, logits_BL, tasks_B, jnp.asarray(ALL_B), soft, temperature)
    assert float(told) == pytest.approx(4 * (tree + topics) / 2, rel=1e-4)
    untold_B = jnp.asarray(np.array([0, 1, 0, 1, 1], np.float32))
    assert np.isnan(float(teacher_loss(MIXED.table, logits_BL, tasks_B, untold_B, soft, temperature)))


# Of seven texts: a student's vectors, two teachers', and a filler row and a text that no teacher has seen.
POOLED_BD = RNG.normal(size=(7, 4)).astype(np.float32)
VECTORS_BV = np.where(np.arange(7)[:, None] == 2, 0, RNG.normal(size=(7, 6))).astype(np.float16)
FILLED_B = np.array([1, 1, 1, 1, 1, 1, 0], np.float32)


def relations(pooled_BD=POOLED_BD, vectors_BV=VECTORS_BV, weights_B=FILLED_B) -> jax.Array:
    return relation_loss(jnp.asarray(pooled_BD), jnp.asarray(vectors_BV), jnp.asarray(weights_B))


def test_the_relation_loss_is_the_mean_squared_difference_of_cosines_over_pairs_of_known_texts() -> None:
    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    pooled, vectors = POOLED_BD.astype(np.float64), VECTORS_BV.astype(np.float64)
    known = (0, 1, 3, 4, 5)
    pairs = [(i, j) for i in known for j in known if i != j]
    expected = np.mean([(cosine(pooled[i], pooled[j]) - cosine(vectors[i], vectors[j])) ** 2 for i, j in pairs])
    assert float(relations()) == pytest.approx(expected, rel=1e-5)
    # What stands in rows that are in no pair changes nothing, nor does it get a gradient; nor are zeros a trouble.
    other = POOLED_BD.copy()
    other[[2, 6]] = ((9, 9, -9, 9), (0, 0, 0, 0))
    assert float(relations(other)) == float(relations())
    gradient_BD = np.asarray(jax.grad(relations)(jnp.asarray(other)))
    assert not gradient_BD[[2, 6]].any()
    assert np.abs(gradient_BD[list(known)]).min() > 1e-6
    assert float(relations(weights_B=np.eye(7)[0])) == 0, "one text is in no pair"


def test_equal_relations_have_no_loss_and_no_gradient_however_the_vectors_are_turned() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    turned_BV = VECTORS_BV.astype(np.float32) @ rotation.astype(np.float32)
    assert float(relations(vectors_BV=turned_BV)) == pytest.approx(float(relations()), rel=1e-5)
    student_BD = 3 * np.hstack([turned_BV, np.zeros((7, 2), np.float32)])
    loss, gradient_BD = jax.value_and_grad(relations)(jnp.asarray(student_BD))
    assert float(loss) < 1e-12
    assert np.abs(gradient_BD).max() < 1e-7


def test_the_relation_losss_gradient_is_that_of_finite_differences() -> None:
    check_grads(relations, (jnp.asarray(POOLED_BD),), order=1, modes=["rev"], atol=1e-3, rtol=1e-3)
