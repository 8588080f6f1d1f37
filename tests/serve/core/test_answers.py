"""Decoding: which labels an answer holds, with which scores, for each kind of task."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.model.decode import Calibration
from classer.serve.client.results import read_classification
from classer.serve.core.answers import AnswerDecoder
from classer.serve.core.tokenizing import TokenizedText
from classer.serve.core.work import Output, Scored
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.wire.errors import InternalError, InvalidRequest, UnknownTask

TOPIC = Task("topic", TaskKind.MULTICLASS, tuple(Label(name) for name in "abcdefg"))
TAGS = Task("tags", TaskKind.MULTILABEL, (Label("x"), Label("y"), Label("z")))
ANSWERS = AnswerDecoder(
    Taxonomy((TOPIC, TAGS)), {"topic": Calibration(2.0), "tags": Calibration(1.0, (0.9, 0.1, 0.5))}, "m", "v1"
)
TREE = Task(
    "tree",
    TaskKind.HIERARCHICAL,
    (Label("pets"), Label("cat", parent="pets"), Label("dog", parent="pets"), Label("cars")),
)
TOKENS = TokenizedText(np.arange(5, dtype=np.int32), truncated=True)


def answer(task: Task, logits: list[float], top_k: int = 0) -> pb.ClassifyResponse:
    (response,) = ANSWERS.answer(task, [TOKENS], [Scored(Output(np.array(logits, np.float32)), 0.25, 0.5)], top_k)
    assert isinstance(response, pb.ClassifyResponse)
    return response


def answer_tree(logits: list[float], top_k: int, threshold: float | None) -> pb.ClassifyResponse:
    answers = AnswerDecoder(Taxonomy((TREE,)), {"tree": Calibration()}, "m", "v1")
    scored = [Scored(Output(np.array(logits, np.float32)), 0.0, 0.0)]
    (response,) = answers.answer(TREE, [TOKENS], scored, top_k, threshold=threshold)
    assert isinstance(response, pb.ClassifyResponse)
    return response


def test_multiclass_gives_the_best_five_of_its_own_slice() -> None:
    response = answer(TOPIC, [0, 1, 2, 3, 6, 5, 4, 100, 100, 100])
    exp = np.exp(np.array([6, 5, 4, 3, 2, 1, 0]) / 2)
    assert [label.label for label in response.labels] == ["e", "f", "g", "d", "c"]
    np.testing.assert_allclose([label.score for label in response.labels], (exp / exp.sum())[:5], rtol=1e-6)
    assert [label.chosen for label in response.labels] == [True, False, False, False, False]
    assert (response.task, response.tokens, response.truncated, response.model_version) == ("topic", 5, True, "v1")
    assert (response.queue_duration.ToTimedelta(), response.compute_duration.ToTimedelta()) == (
        timedelta(seconds=0.25),
        timedelta(seconds=0.5),
    )


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (7, 7), (4_000_000_000, 7)])
def test_top_k_says_how_many(top_k: int, count: int) -> None:
    assert len(answer(TOPIC, [0.0] * 10, top_k).labels) == count


def test_multilabel_always_holds_what_was_chosen() -> None:
    response = answer(TAGS, [0.0] * 7 + [2.0, -1.0, 0.5], top_k=1)  # probabilities .88, .27, .62; thresholds .9, .1, .5
    assert [(label.label, label.chosen) for label in response.labels] == [("x", False), ("z", True), ("y", True)]


def test_scores_that_are_not_finite_fail_their_text_only() -> None:
    good = Scored(Output(np.arange(10, dtype=np.float32)), 0.0, 0.0)
    for broken in (np.nan, np.inf, -np.inf):
        bad = Scored(Output(np.where(np.arange(10) == 3, broken, 0).astype(np.float32)), 0.0, 0.0)
        first, second, third = ANSWERS.answer(TOPIC, [TOKENS] * 3, [good, bad, good], 0)
        assert isinstance(second, InternalError)
        assert isinstance(first, pb.ClassifyResponse)
        assert first == third
        # The other task of the same text is sound.
        assert isinstance(ANSWERS.answer(TAGS, [TOKENS], [bad], 0)[0], pb.ClassifyResponse)


def test_no_texts_no_answers() -> None:
    assert ANSWERS.answer(TOPIC, [], [], 0) == []


def test_tasks_are_found_by_name() -> None:
    assert ANSWERS.task("tags") is TAGS
    with pytest.raises(UnknownTask, match=r"it has: topic, tags\.") as unknown:
        ANSWERS.task("secret")
    assert "secret" not in str(unknown.value)
    with pytest.raises(InvalidRequest, match="name one of: topic, tags"):
        ANSWERS.task("")
    assert AnswerDecoder(Taxonomy((TAGS,)), {"tags": Calibration()}, "m", "v1").task("") is TAGS


def test_a_tree_s_labels_have_paths_and_an_unsure_answer_stops_higher_up() -> None:
    def chosen(threshold: float | None) -> list[tuple[str, list[str]]]:
        response = answer_tree([2.0, 0.1, 0.0, 0.0], 1, threshold)
        return [(label.label, list(label.path)) for label in response.labels if label.chosen]

    assert chosen(None) == [("cat", ["pets", "cat"])]
    assert chosen(0.8) == chosen(1.0) == [("pets", ["pets"])]


@pytest.mark.parametrize(
    ("logits", "threshold", "top_k", "names"),
    [  # pets .88, of which cat .46 and dog .42; cars .12
        ([2.0, 0.1, 0.0, 0.0], None, 5, ["cat", "dog", "cars"]),
        ([2.0, 0.1, 0.0, 0.0], None, 2, ["cat", "dog"]),
        ([2.0, 0.1, 0.0, 0.0], 0.8, 5, ["pets", "cat", "dog", "cars"]),
        ([2.0, 0.1, 0.0, 0.0], 0.8, 1, ["pets"]),
        ([2.0, 100.0, 0.0, 0.0], 1.0, 2, ["pets", "cat"]),  # as probable as its leaf
        ([0.0, 0.0, 9.0, 2.0], 0.8, 2, ["cars", "dog"]),  # a leaf at the top
    ],
)
def test_of_a_tree_leaves_are_ranked_after_the_label_at_which_the_answer_stops(
    logits: list[float], threshold: float | None, top_k: int, names: list[str]
) -> None:
    response = answer_tree(logits, top_k, threshold)
    assert [label.label for label in response.labels] == names
    assert [label.chosen for label in response.labels] == [True] + [False] * (len(names) - 1)
    scores = [label.score for label in response.labels]
    assert scores == sorted(scores, reverse=True)
    assert all(tuple(label.path) == TREE.path(TREE.index[label.label]) for label in response.labels)
    assert read_classification(response).best.label == names[0]


def test_the_best_label_is_what_a_tree_chose_and_else_the_one_of_the_highest_score() -> None:
    labels = [pb.ScoredLabel(label="pets", score=0.9), pb.ScoredLabel(label="cat", score=0.6, chosen=True)]
    assert read_classification(pb.ClassifyResponse(labels=labels)).best.label == "pets"
    labels = [
        pb.ScoredLabel(label="pets", score=0.9, path=["pets"]),
        pb.ScoredLabel(label="cat", score=0.6, chosen=True, path=["pets", "cat"]),
    ]
    assert read_classification(pb.ClassifyResponse(labels=labels)).best.label == "cat"
