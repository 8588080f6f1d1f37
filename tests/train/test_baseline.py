import pytest

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.taxonomy import Label, Task, TaskKind
from classer.train.baseline import tfidf_svm


def task(kind: TaskKind, *labels: str) -> Task:
    return Task("t", kind, tuple(Label(name) for name in labels))


def examples(*rows: tuple[str, str]) -> list[Example]:
    """Rows of a text and its labels, separated by spaces."""
    return [Example(text, tuple(labels.split()), "t") for text, labels in rows]


ANIMALS = examples(
    ("the cat purrs", "cat"),
    ("a cat says miaow", "cat"),
    ("the dog barks", "dog"),
    ("a dog says woof", "dog"),
    ("a cow says moo", "cow"),
    ("the cow grazes", "cow"),
)


def test_single_label_task_is_learnt():
    test = examples(("my cat", "cat"), ("my dog", "dog"), ("my cow", "cow"), ("my cows", "dog"))
    score = tfidf_svm(ANIMALS, test, task(TaskKind.MULTICLASS, "dog", "cat", "cow"))
    assert (score.n, score.accuracy) == (4, 0.75)
    assert score.micro_f1 == 0.75


def test_texts_that_only_a_teacher_answered_are_left_out():
    """They have no label; they are not examples of the first one."""
    unlabelled = examples(*[("my cow", "")] * 20)
    test, kinds = examples(("my cow", "cow")), task(TaskKind.MULTICLASS, "dog", "cat", "cow")
    assert tfidf_svm([*ANIMALS, *unlabelled], test, kinds).accuracy == 1.0


def test_large_tree_is_walked_down():
    tree = Task(
        "t",
        TaskKind.HIERARCHICAL,
        (
            Label("wild"),
            Label("pet"),
            *(Label(name, parent="pet") for name in ("cat", "dog")),
            *(Label(name, parent="wild") for name in ("wolf", "bear")),
        ),
    )
    wild = examples(("the wolf howls", "wolf"), ("a grey wolf", "wolf"), ("a brown bear", "bear"), ("the bear", "bear"))
    train = [*ANIMALS[:4], *wild, *examples(("a beast of the woods", "wild"))]
    test = examples(("my cat", "cat"), ("my dog", "dog"), ("that wolf", "wolf"), ("bear!", "bear"), ("cat", "bear"))
    assert tfidf_svm(train, test, tree, most_labels=3).accuracy == 0.8
    # A label whose only child has examples needs no SVM, one without any is an end.
    assert tfidf_svm([*ANIMALS[:2], *wild], test[:1], tree, most_labels=3).accuracy == 1.0


def test_multilabel_task_is_learnt_and_label_never_seen_is_never_chosen():
    train = examples(
        ("red hat", "red hat"), ("red shoe", "red"), ("blue hat", "hat"), ("blue shoe", ""), ("grey shoe", "")
    )
    score = tfidf_svm(train, examples(("red", "red"), ("hat", "hat")), task(TaskKind.MULTILABEL, "hat", "red", "green"))
    assert score.accuracy == 1.0
    assert score.macro_f1 == 1.0  # "green" occurs nowhere


def test_same_data_give_the_same_score():
    kinds = task(TaskKind.MULTICLASS, "dog", "cat", "cow")
    assert tfidf_svm(ANIMALS, ANIMALS, kinds) == tfidf_svm(ANIMALS, ANIMALS, kinds)


def test_unusable_training_texts_are_refused():
    binary = task(TaskKind.BINARY, "dog", "cat")
    with pytest.raises(InputError, match="same label"):
        tfidf_svm(ANIMALS[:2], ANIMALS[:2], binary)
    with pytest.raises(InputError, match="no training text has a word"):
        tfidf_svm(examples(("", "cat"), ("…", "dog")), ANIMALS[:2], binary)
