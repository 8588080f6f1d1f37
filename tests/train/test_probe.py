"""The head that fine-tuning begins with. Axes: N examples, D features, L labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.special import log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from classer.data.taxonomy import Label, Task, TaskKind
from classer.train import probe


def test_discriminant_head_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SHRINKAGE", 0.0)
    rng = np.random.default_rng(0)
    label_N = rng.choice(4, size=600, p=[0.4, 0.3, 0.2, 0.1])
    features_ND = (rng.normal(size=(4, 8))[label_N] * 2 + rng.normal(size=(600, 8)) @ rng.normal(size=(8, 8))) + 3.0
    head = probe.discriminant_head(features_ND.astype(np.float32), np.eye(4, dtype=np.float32)[label_N])
    logits_NL = features_ND @ head["head.kernel"] + head["head.bias"]
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(features_ND, label_N).decision_function(features_ND)
    np.testing.assert_allclose(logits_NL, theirs - theirs.mean(axis=1, keepdims=True), rtol=1e-3, atol=1e-3)


def test_a_label_without_examples_is_finite() -> None:
    features_ND = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    head = probe.discriminant_head(features_ND, np.eye(3, dtype=np.float32)[np.arange(20) % 2])
    assert all(np.isfinite(value).all() for value in head.values())
    assert head["head.kernel"].shape == (5, 3)


def test_siblings_are_as_sure_as_their_examples_allow() -> None:
    """Two labels with hundreds of examples each, one of them above 100 with one or two each."""
    rng = np.random.default_rng(0)
    labels = (Label("many"), Label("few"), *(Label(f"few{i}", parent="few") for i in range(100)))
    task = Task("tree", TaskKind.HIERARCHICAL, labels)
    centres_LD = np.concatenate([np.zeros((1, 256)), np.full((101, 256), 2.0) + rng.normal(size=(101, 256))])

    def draw(leaves_N: np.ndarray) -> tuple[np.ndarray, csr_array]:
        features_ND = centres_LD[leaves_N] + rng.normal(size=(len(leaves_N), 256)) * 3
        return features_ND.astype(np.float32), csr_array(np.eye(102, dtype=np.float32)[leaves_N])

    train = draw(np.concatenate([np.zeros(600, int), np.arange(2, 102), np.arange(2, 52)]))
    dev, test = (draw(np.concatenate([np.zeros(100, int), rng.integers(2, 102, 100)])) for _ in range(2))
    head = probe.sibling_heads(task, *train, *dev)
    logits_NL = test[0] @ head["head.kernel"] + head["head.bias"]

    def loss(siblings: slice, rows: slice, answers_N: np.ndarray) -> float:
        return -log_softmax(logits_NL[rows, siblings], axis=1)[np.arange(len(answers_N)), answers_N].mean()

    assert loss(slice(0, 2), slice(0, 200), np.repeat([0, 1], 100)) < 0.01
    below = test[1].toarray()[100:, 2:].argmax(axis=1)
    assert loss(slice(2, 102), slice(100, 200), below) < np.log(100)  # better than no answer
    # Smoothing, 0.05 of it to each of the two at the top, punishes a certainty that no answer was wrong to have.
    smooth = probe.sibling_heads(task, *train, *dev, label_smoothing=0.1)
    for one, low, high in ((head, 1.0, np.inf), (smooth, 0.0, 0.25)):
        logits_NL = test[0] @ one["head.kernel"] + one["head.bias"]
        log_probs_NL = log_softmax(logits_NL[:, :2], axis=1)
        assert low < -(log_probs_NL.max(axis=1) * 0.95 + log_probs_NL.min(axis=1) * 0.05).mean() < high
    # With nothing to measure on there, they share the temperature of the rest.
    alone = probe.sibling_heads(task, *train, dev[0][:100], dev[1][:100])
    assert np.isfinite(alone["head.kernel"]).all()


def test_presence_head_is_scikit_learns_of_each_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SHRINKAGE", 0.0)
    rng = np.random.default_rng(0)
    targets_NL = (rng.uniform(size=(900, 3)) < [0.5, 0.2, 0.04]).astype(np.float32)
    features_ND = targets_NL @ rng.normal(size=(3, 6)) + rng.normal(size=(900, 6)) @ rng.normal(size=(6, 6)) + 2.0
    head = probe.presence_head(features_ND.astype(np.float32), targets_NL)
    logits_NL = features_ND @ head["head.kernel"] + head["head.bias"]
    for label in range(3):
        theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(features_ND, targets_NL[:, label])
        np.testing.assert_allclose(logits_NL[:, label], theirs.decision_function(features_ND), rtol=1e-3, atol=1e-3)


def test_labels_that_all_or_none_have_are_finite() -> None:
    features_ND = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    targets_NL = np.stack([np.ones(20), np.zeros(20), np.arange(20) % 2], axis=1).astype(np.float32)
    head = probe.presence_head(features_ND, targets_NL)
    assert all(np.isfinite(value).all() for value in head.values())
    assert np.abs(head["head.kernel"][:, :2]).max() < 1e-9
    assert head["head.bias"][0] > 2 > -2 > head["head.bias"][1]
