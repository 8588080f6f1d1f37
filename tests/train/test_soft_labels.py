"""Soft labels: files of them, softening, and what a student makes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.soft_labels import read_soft_labels, write_soft_labels
from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.decode import Calibration, probabilities
from classer.tests.helpers import TREE, printed
from classer.tests.strategies import trees
from classer.train.config import TrainJob
from classer.train.datasets import load_dataset
from classer.train.losses import SoftTargets, classification_loss
from classer.train.soften import soften
from classer.train.tokenized import TokenizedSplit, join_tasks, tokenize


def test_texts_of_dev_and_test_are_no_soft_examples(tasks: Path, tmp_path: Path) -> None:
    test_text = json.loads((tasks / "topic" / "test.jsonl").read_text().splitlines()[0])["text"]
    train_text = json.loads((tasks / "topic" / "train.jsonl").read_text().splitlines()[0])["text"]
    soft = tmp_path / "soft.jsonl"
    answers = [(test_text, 0.5), ("a new text", 0.5), (train_text, 1.0)]
    soft.write_text(
        "".join(json.dumps({"text": text, "probabilities": {"food": p, "sport": 1 - p}}) + "\n" for text, p in answers)
    )
    job = TrainJob(data=tasks / "topic", out=tmp_path / "run", soft_labels=soft)
    dataset, said = printed(lambda: load_dataset(job))
    assert said[-1].endswith("1 texts without other labels; 1 left out, which are to be measured on.")
    extra = [example for example in dataset.train["topic"] if not example.labels]
    assert [(example.text, example.soft) for example in extra] == [("a new text", {"food": 0.5, "sport": 0.5})]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"probabilities": {"food": 1}}, "'text' must be a text"),
        ({"text": "x", "probabilities": [1]}, "'probabilities' must be an object of numbers by label"),
        ({"text": "x", "probabilities": {"drink": 1}}, "the task 'where' has no label 'drink'"),
        ({"text": "x", "probabilities": {"food": 1.5}}, "the probability of 'food' must lie between 0 and 1"),
        ({"text": "x", "probabilities": {"food": True}}, "the probability of 'food' must lie between 0 and 1"),
        ({"text": "x", "probabilities": {"food": 0.5}}, r"sum to 0\.500; they must sum to 1 \(of hierarchical"),
        ({"text": "x", "task": "who", "probabilities": {"food": 1}}, "there is no task 'who', only where"),
    ],
)
def test_soft_labels_that_are_none_are_refused_with_their_row(tmp_path: Path, row: dict, message: str) -> None:
    file = tmp_path / "soft.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"soft\.jsonl, line 1: .*{message}"):
        read_soft_labels(file, Taxonomy((TREE,)))


def test_soft_labels_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "soft.jsonl"
    probs_NL = np.array([[0.7, 0.7, 0.3, 0.29999, 0.00001]], np.float32)  # inside, food, outside, sport, weather
    write_soft_labels(file, TREE, ["x"], probs_NL)
    ((key, answer),) = read_soft_labels(file, Taxonomy((TREE,))).items()
    assert key == ("where", "x")
    assert answer == pytest.approx({"food": 0.7, "sport": 0.3}, abs=1e-4)


def test_softening_is_dividing_the_teachers_logits(tiny_bundle) -> None:
    rng = np.random.default_rng(0)
    logits_NL = rng.normal(0, 3, (4, 3))
    for kind in (TaskKind.MULTICLASS, TaskKind.MULTILABEL):
        task = Task("t", kind, tuple(map(Label, "abc")))

        def answers(scale: float, exclusive: bool = kind.exclusive) -> np.ndarray:
            exp_NL = np.exp(logits_NL / scale)
            return exp_NL / exp_NL.sum(1, keepdims=True) if exclusive else exp_NL / (1 + exp_NL)

        rows = [Example("x", (), "t", soft=dict(zip("abc", row.tolist(), strict=True))) for row in answers(1.0)]
        split = tokenize(task, rows, tiny_bundle.tokenizer, 8)
        assert split.soft is not None
        np.testing.assert_allclose(soften(task, split.soft, 2.5).toarray(), answers(2.5), rtol=1e-4)


def test_of_very_many_labels_about_as_likely_as_each_other_some_are_written(tmp_path: Path) -> None:
    task = Task("t", TaskKind.MULTICLASS, tuple(Label(f"l{i}") for i in range(20_000)))
    probs_NL = np.full((1, 20_000), 1 / 20_000)
    probs_NL[0, 7], probs_NL[0, 8] = 9e-5, 1e-6
    file = tmp_path / "soft.jsonl"
    write_soft_labels(file, task, ["x"], probs_NL)
    (answer,) = read_soft_labels(file, Taxonomy((task,))).values()
    assert max(answer, key=lambda label: answer[label]) == "l7"
    assert len(answer) == 19_999
    assert answer["l0"] == pytest.approx(5e-5, rel=0.1)


flat = st.sampled_from(
    [Task("t", kind, tuple(map(Label, "abc"))) for kind in (TaskKind.MULTICLASS, TaskKind.MULTILABEL)]
)


@settings(deadline=None, max_examples=15)
@given(flat | trees(), st.integers(0, 99))
def test_a_student_with_its_teachers_logits_has_nothing_to_learn(task: Task, seed: int) -> None:
    logits_NL = np.random.default_rng(seed).normal(0, 2, (3, len(task.labels))).astype(np.float32)
    probs_NL = np.where(task.leaves_L, probabilities(task, logits_NL, Calibration()), 0)
    taxonomy, ones = Taxonomy((task,)), jnp.ones(3)
    split = TokenizedSplit([np.zeros(2, np.int32)] * 3, csr_array((3, len(task.labels)), dtype=np.float32))
    split = dataclasses.replace(split, soft=csr_array(probs_NL), has_soft_N=np.ones(3, bool))

    @jax.grad
    def gradient(logits_BL, soft_BL, temperature):
        soft = SoftTargets(soft_BL, ones)
        tasks_B, targets_BL = jnp.zeros(3, jnp.int32), jnp.zeros_like(logits_BL)
        return classification_loss(
            taxonomy.table, logits_BL, targets_BL, tasks_B, ones, soft=soft, temperature=temperature
        )

    for temperature in (1.0, 2.0):
        soft = join_tasks(taxonomy, {"t": split}, soft_share=1.0, temperature=temperature).soft
        assert soft is not None
        gradient_BL = gradient(jnp.asarray(logits_NL), jnp.asarray(soft.toarray()), temperature)
        np.testing.assert_allclose(gradient_BL, 0, atol=1e-5)


def test_what_lies_below_a_label_has_as_much_of_it_once_softened() -> None:
    """Also of answers that stop at inner labels."""
    probs_NL = np.array([[0.2, 0.5, 0.0, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9, 0.1]])
    soft_NL = soften(TREE, csr_array(probs_NL), 2.0).toarray()
    # inside 0.7 of which food 5/7, outside 0.3 of which all goes on to sport and weather, 1 to 2
    inside, sport = 0.7**0.5 / (0.7**0.5 + 0.3**0.5), 1 / (1 + 2**0.5)
    first = [inside * 2 / 7, inside * 5 / 7, 0, (1 - inside) * sport, (1 - inside) * (1 - sport)]
    np.testing.assert_allclose(soft_NL, [first, [0] * 5, [0, 0, 0, 0.75, 0.25]], rtol=1e-5)


def test_joined_examples_have_their_tasks_columns(tiny_bundle) -> None:
    taxonomy = tiny_bundle.taxonomy
    topic, tags = taxonomy.tasks

    def split(task: Task, *labels: tuple[str, ...]) -> TokenizedSplit:
        return tokenize(task, [Example("bread", of_row, task.name) for of_row in labels], tiny_bundle.tokenizer, 8)

    joined = join_tasks(taxonomy, {"topic": split(topic, ("topic 3",)), "tags": split(tags, (), ("angry", "spam"))})
    assert joined.tasks_N.tolist() == [0, 1, 1]
    assert joined.vectors_NV is None
    assert [np.flatnonzero(row).tolist() for row in joined.targets.toarray()] == [[3], [], [8, 9]]

    known = Example("soup", ("spam",), "tags", vector=np.array([0.5, 2], np.float16))
    tagged = tokenize(tags, [Example("bread", (), "tags"), known], tiny_bundle.tokenizer, 8)
    joined = join_tasks(taxonomy, {"topic": split(topic, ("topic 3",)), "tags": tagged})
    assert joined.vectors_NV is not None
    assert joined.vectors_NV.tolist() == [[0, 0], [0, 0], [0.5, 2]]
