"""What a job's data are read as, what is said about them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from classer.data.errors import InputError
from classer.data.examples import Example
from classer.data.readers import read_examples
from classer.data.taxonomy import Task, TaskKind
from classer.tests.helpers import printed, write_toy_data
from classer.train.config import Recipe, TrainJob
from classer.train.datasets import Dataset, load_dataset


def load(data: Path, **fields: object) -> tuple[Dataset, list[str]]:
    """The data set, and the sentences said."""
    recipe = Recipe(dev_fraction=0.2, seed=3)
    job = TrainJob(data=data, out=data.parent / "out", recipe=recipe, **fields)  # pyright: ignore[reportArgumentType]
    return printed(lambda: load_dataset(job))


def write_rows(file: Path, *rows: tuple[str, str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return file


def write_folder(folder: Path, kind: str = "multiclass", labels: tuple[str, ...] = ("a", "b", "c"), **splits) -> Path:
    folder.mkdir()
    task = {"name": "letters", "kind": kind, "labels": [{"name": name} for name in labels]}
    (folder / "task.json").write_text(json.dumps(task))
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", *rows)
    return folder


def task_of(dataset: Dataset) -> Task:
    (task,) = dataset.taxonomy.tasks
    return task


def only(split: dict[str, list[Example]]) -> list[Example]:
    """The examples of the one task."""
    (examples,) = split.values()
    return examples


@pytest.mark.parametrize("kind", [TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_the_kind_is_found_and_a_share_set_aside_for_development(tmp_path: Path, kind: TaskKind) -> None:
    dataset, said = load(write_toy_data(tmp_path / "tickets.jsonl", kind, 100))
    assert (task_of(dataset).name, task_of(dataset).kind) == ("tickets", kind)
    assert len(only(dataset.train)) + len(only(dataset.dev)) == 100
    assert len(only(dataset.dev)) == pytest.approx(20, abs=2)
    assert "tickets" not in dataset.test
    assert any(f"a {kind} task" in sentence for sentence in said)
    assert any(f"Set {len(only(dataset.dev))} of 100 training examples aside" in sentence for sentence in said)
    assert not {example.source for example in only(dataset.train)} & {example.source for example in only(dataset.dev)}


@pytest.mark.parametrize("kind", [TaskKind.BINARY, TaskKind.MULTILABEL])
def test_examples_in_memory_are_treated_as_those_of_files(tmp_path: Path, kind: TaskKind) -> None:
    files = {
        split: write_toy_data(tmp_path / f"{split}.jsonl", kind, count, seed=count)
        for split, count in (("train", 60), ("dev", 12), ("test", 9))
    }
    expected, said = load(files["train"], dev=files["dev"], test=files["test"])
    examples = {
        split: read_examples(file, text_column="text", label_column=None, task="") for split, file in files.items()
    }
    job = TrainJob(data=tmp_path / "train", out=tmp_path / "out", recipe=Recipe(dev_fraction=0.2, seed=3))
    assert printed(lambda: load_dataset(job, examples)) == (expected, said)


def test_the_split_follows_the_seed_alone(tmp_path: Path) -> None:
    file = write_toy_data(tmp_path / "tickets.jsonl", TaskKind.MULTICLASS, 100)
    assert load(file)[0] == load(file)[0]


def test_a_part_of_the_training_examples_is_drawn_before_the_split(tmp_path: Path) -> None:
    file = write_toy_data(tmp_path / "tickets.jsonl", TaskKind.MULTICLASS, 100)
    whole, _ = load(file)
    part, said = load(file, texts=50)
    assert "Drew 50 of 100 training examples." in said
    assert len(only(part.train)) + len(only(part.dev)) == 50
    sources = {example.source for example in only(part.train) + only(part.dev)}
    assert len(sources) == 50
    assert sources < {example.source for example in only(whole.train) + only(whole.dev)}
    assert load(file, texts=50)[0] == part
    assert load(file, texts=100)[0] == whole


def test_files_for_development_and_test_are_taken_as_given(tmp_path: Path) -> None:
    train, dev, test = (
        write_toy_data(tmp_path / f"{name}.jsonl", TaskKind.MULTICLASS, count, seed=count)
        for name, count in (("train", 60), ("dev", 20), ("test", 30))
    )
    dataset, said = load(train, dev=dev, test=test)
    assert [len(split) for split in (only(dataset.train), only(dataset.dev), only(dataset.test))] == [60, 20, 30]
    assert "train" in dataset.test
    assert "Examples: 60 to train on, 20 for development, 30 to test." in said
    assert not any("aside" in sentence for sentence in said)


def test_a_folder_brings_its_task_and_splits(tmp_path: Path) -> None:
    rows = [(f"text {i}", "abc"[i % 3]) for i in range(12)]
    folder = write_folder(tmp_path / "letters", train=rows, dev=[("x", "a")], test=[("y", "b"), ("z", "c")])
    dataset, said = load(folder)
    assert [len(split) for split in (only(dataset.train), only(dataset.dev), only(dataset.test))] == [12, 1, 2]
    assert task_of(dataset).label_names == ("a", "b", "c")
    assert said[0].endswith("letters: task 'letters', multiclass, 3 labels.")


def test_a_file_given_takes_the_place_of_a_folders_split(tmp_path: Path) -> None:
    rows = [(f"text {i}", "abc"[i % 3]) for i in range(12)]
    folder = write_folder(tmp_path / "letters", train=rows, test=[("y", "b")])
    test = write_rows(tmp_path / "mine.jsonl", ("mine", "c"))
    assert [example.text for example in only(load(folder, test=test)[0].test)] == ["mine"]


def test_texts_that_stand_in_two_splits_are_warned_of(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", *((f"text {i}", "ab"[i % 2]) for i in range(10)))
    test = write_rows(tmp_path / "test.jsonl", ("TEXT  4", "a"), ("text 5", "a"), ("new", "b"))
    dev = write_rows(tmp_path / "dev.jsonl", ("other", "a"))
    _, said = load(train, dev=dev, test=test)
    warnings = [sentence for sentence in said if sentence.startswith("Warning: ")]
    assert len(warnings) == 1
    assert "2 texts of test also in train" in warnings[0]
    assert "1 of them with other labels there" in warnings[0]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_label_that_train_has_not_is_refused_with_its_row(tmp_path: Path, split: str) -> None:
    train = write_rows(tmp_path / "train.jsonl", *((f"text {i}", "ab"[i % 2]) for i in range(10)))
    other = write_rows(tmp_path / "other.jsonl", ("x", "a"), ("y", "c"))
    with pytest.raises(InputError, match=r"other\.jsonl, line 2: the task 'train' has no label 'c', only 'a', 'b'"):
        load(train, **{split: other})


def test_a_label_that_only_a_folders_test_has_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(10)]
    folder = write_folder(tmp_path / "letters", train=rows, test=[("y", "b"), ("z", "c")])
    with pytest.raises(InputError, match=r"test\.jsonl, line 2: no training example has the label 'c'"):
        load(folder)


def test_a_label_of_a_folders_task_that_no_example_has_is_no_error(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(10)]
    dataset, _ = load(write_folder(tmp_path / "letters", train=rows, test=[("y", "b")]))
    assert task_of(dataset).label_names == ("a", "b", "c")


def test_one_label_only_is_refused(tmp_path: Path) -> None:
    rows = [(f"text {i}", "a") for i in range(10)]
    with pytest.raises(InputError, match=r"train\.jsonl: All 10 rows have the label 'a'; .* at least two"):
        load(write_rows(tmp_path / "train.jsonl", *rows))
    with pytest.raises(InputError, match=r"letters: All 10 training examples of 'letters' have the same label"):
        load(write_folder(tmp_path / "letters", train=rows))


def test_a_multilabel_task_without_any_label_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "letters", kind="multilabel")
    (folder / "train.jsonl").write_text('{"text": "x", "labels": []}\n{"text": "y", "labels": []}\n')
    with pytest.raises(InputError, match=r"None of the 2 training examples of 'letters' has a label"):
        load(folder)


def test_a_folder_without_a_split_to_train_on_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "letters", test=[("y", "b")])
    with pytest.raises(InputError, match=r"letters has no split 'train'; it has test"):
        load(folder)


def test_too_few_examples_to_set_any_aside_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl: 2 examples of 2 labels are too few"):
        load(write_rows(tmp_path / "train.jsonl", ("x", "a"), ("y", "b")))


def write_soft(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": t, "probabilities": {"a": 0.6, "b": 0.4}}) + "\n" for t in texts))
    return file


def test_every_example_of_a_text_has_its_soft_label(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ("x", "a"), ("y", "b"), ("x", "a"), ("x", "b"))
    dev = write_rows(tmp_path / "dev.jsonl", ("z", "a"))
    dataset, said = load(train, dev=dev, soft_labels=write_soft(tmp_path / "soft.jsonl", "x", "new"))
    examples = [(example.text, example.labels, example.soft is not None) for example in only(dataset.train)]
    assert examples[:4] == [("x", ("a",), True), ("y", ("b",), False), ("x", ("a",), True), ("x", ("b",), True)]
    assert examples[4:] == [("new", (), True)]
    assert said[-1].endswith("soft labels for 3 of 4 training examples, and 1 texts without other labels.")


def test_texts_that_were_not_drawn_do_not_come_back_as_soft_examples(tmp_path: Path) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(40)]
    train = write_rows(tmp_path / "train.jsonl", *rows)
    test = write_rows(tmp_path / "test.jsonl", *((f"test {i}", "ab"[i % 2]) for i in range(10)))
    texts = [*(text for text, _ in rows), *(f"TEST {i}" for i in range(10)), "new"]
    soft = write_soft(tmp_path / "soft.jsonl", *texts)
    dataset, said = load(train, test=test, texts=20, held_out_texts=3, soft_labels=soft)
    drawn, extra = only(dataset.train)[:-1], only(dataset.train)[-1]
    assert (extra.text, extra.labels) == ("new", ())
    assert all(example.labels and example.soft for example in drawn)
    measured = len(only(dataset.dev)) + 3
    assert said[-1].endswith(
        f"soft labels for {len(drawn)} of {len(drawn)} training examples, and 1 texts without other labels; "
        f"{measured} left out, which are to be measured on; {50 - len(drawn) - measured} left out, whose examples were "
        "not drawn."
    )
