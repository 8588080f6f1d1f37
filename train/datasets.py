"""A job's examples: read, split, checked against one another, and joined with a teacher's answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.errors import InputError
from ..data.examples import Example
from ..data.readers import check_labels, infer_task, read_examples, read_task_folder, task_folders
from ..data.soft_labels import read_soft_labels, read_teachers, read_vectors, vectors_file
from ..data.splits import describe_duplicates, find_duplicates, stratified_split
from ..data.taxonomy import Task, Taxonomy
from .config import TrainJob
from .distributed import say


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The examples of one or several tasks, by the name of the task.

    Attributes:
      taxonomy: the tasks.
      train, dev: examples of every task.
      test: of those tasks that have any.
      undrawn: the other examples, where the job draws only some.
    """

    taxonomy: Taxonomy
    train: dict[str, list[Example]]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    undrawn: dict[str, list[Example]] = dataclasses.field(default_factory=dict)


def load_dataset(
    job: TrainJob,
    examples: Mapping[str, Sequence[Example]] | None = None,
    task: Task | None = None,
) -> Dataset:
    """Reads a job's examples, or takes those given by split, and reports what it found.

    A task's folder brings its task and its splits; a folder of such folders brings several. The task of a file, or of
    `examples` without `task`, is inferred from its labels. Examples for development are the folder's split `dev`, the
    file given, or a stratified share of the training examples.

    Raises:
      InputError: as `read_examples` and `read_task_folder`; a label in dev or test that no training example has; a
        folder of tasks none of which can be trained on.
    """
    folders = task_folders(job.data) if examples is None and job.data.is_dir() else []
    if not folders:
        loaded = [_load_task(job, examples, task)]
    else:
        if job.dev is not None or job.test is not None:
            raise InputError(f"{job.data} holds several tasks, which bring their own splits; give no --dev or --test.")
        loaded = []
        for folder in folders:
            one = dataclasses.replace(job, data=folder)
            if "train" not in read_task_folder(folder, ()).there:
                say(f"{folder} has no split 'train' and is left out.")
            else:
                loaded.append(_load_task(one))
        if not loaded:
            raise InputError(f"No folder in {job.data} has a split 'train'.")
    taxonomy = Taxonomy(tuple(task for task, _ in loaded))
    splits = {
        split: {task.name: examples[split] for task, examples in loaded if examples[split]}
        for split in ("train", "dev", "test", "undrawn")
    }
    dataset = Dataset(taxonomy, **splits)
    if job.soft_labels is not None:
        dataset = add_soft_labels(dataset, job.soft_labels)
        for teacher in read_teachers(job.soft_labels):
            say(f"Teacher {teacher}")
        if job.recipe.relation_share:
            dataset = add_vectors(dataset, job.soft_labels)
    return dataset


def _load_task(
    job: TrainJob,
    examples: Mapping[str, Sequence[Example]] | None = None,
    task: Task | None = None,
) -> tuple[Task, dict[str, list[Example]]]:
    """One task and its splits train, dev, test and undrawn; the last two may be empty."""
    given: dict[str, list[Example]] = {}
    if examples is None and job.data.is_dir():
        folder = read_task_folder(
            job.data, ("train", "dev", "test"), text_column=job.text_column, label_column=job.label_column
        )
        task, given = folder.task, dict(folder.splits)
        if "train" not in given:
            raise InputError(f"{job.data} has no split 'train'; it has {', '.join(sorted(folder.there))}.")
        say(f"{job.data}: task '{task.name}', {task.kind}, {len(task.labels):,} labels.")
    else:
        name = job.data.name.split(".")[0]
        if examples is None:
            given["train"] = _read(job, job.data, name)
        else:
            given = {
                split: [dataclasses.replace(one, task=name) for one in of_split] for split, of_split in examples.items()
            }
        if task is None:
            with _naming(job.data):
                task, said = infer_task(name, given["train"])
            say(said)
        for of_split in given.values():
            check_labels(task, of_split)
    for split, file in (("dev", job.dev), ("test", job.test)):
        if file is not None:
            given[split] = _read(job, file, task.name)
            check_labels(task, given[split])

    with _naming(job.data):
        _check_trainable(task, given["train"])
    for split in ("dev", "test"):
        _check_learnt(given["train"], given.get(split, []))
    train = _draw(given["train"], job.texts, job.recipe.seed, "training")
    if "dev" in given:
        dev = given["dev"]
    else:
        with _naming(job.data):
            train, dev = stratified_split(train, job.recipe.dev_fraction, job.recipe.seed)
        say(f"Set {len(dev):,} of {len(train) + len(dev):,} training examples aside for development.")
    dev = _draw(dev, job.held_out_texts, job.recipe.seed, "development")
    test = _draw(given.get("test", []), job.held_out_texts, job.recipe.seed, "test")
    say(f"Examples: {len(train):,} to train on, {len(dev):,} for development, {len(test):,} to test.")
    for name, split in (("dev", dev), ("test", test)):
        if sentence := describe_duplicates(find_duplicates(train, split), "train", name):
            say(f"Warning: {sentence}")
    drawn = {id(example) for split in (train, dev, test) for example in split}
    undrawn = [example for split in given.values() for example in split if id(example) not in drawn]
    return task, {"train": train, "dev": dev, "test": test, "undrawn": undrawn}


def _draw(examples: list[Example], most: int, seed: int, name: str) -> list[Example]:
    if not most or most >= len(examples):
        return examples
    say(f"Drew {most:,} of {len(examples):,} {name} examples.")
    rows = np.random.default_rng(seed).permutation(len(examples))[:most]
    return [examples[row] for row in sorted(rows)]


def add_soft_labels(dataset: Dataset, path: Path) -> Dataset:
    """Gives training examples a teacher's answers, by task and text; texts of their own become examples without labels.

    Texts that stand in dev or test too are left out: the model would be measured on what it has seen. So are those of
    examples that were not drawn.

    Raises:
      InputError: as `read_soft_labels`.
    """
    answers = read_soft_labels(path, dataset.taxonomy)
    train = {task: list(examples) for task, examples in dataset.train.items()}
    matched = held_out = undrawn = added = 0
    for task in dataset.taxonomy.tasks:
        of_task = {text: soft for (name, text), soft in answers.items() if name == task.name}
        for i, example in enumerate(train[task.name]):
            if (soft := of_task.get(example.text)) is not None:
                train[task.name][i] = dataclasses.replace(example, soft=soft)
                matched += 1
        for example in train[task.name]:
            of_task.pop(example.text, None)
        extra = [Example(text, (), task.name, source=str(path), soft=soft) for text, soft in of_task.items()]
        measured = [*dataset.dev[task.name], *dataset.test.get(task.name, [])]
        seen = {id(example) for _, example in find_duplicates(measured, extra)}
        left = {id(example) for _, example in find_duplicates(dataset.undrawn.get(task.name, []), extra)} - seen
        held_out, undrawn = held_out + len(seen), undrawn + len(left)
        new = [example for example in extra if id(example) not in seen | left]
        train[task.name] += new
        added += len(new)
    left_out = f"; {held_out:,} left out, which are to be measured on" if held_out else ""
    left_out += f"; {undrawn:,} left out, whose examples were not drawn" if undrawn else ""
    say(
        f"{path}: soft labels for {matched:,} of {sum(map(len, dataset.train.values())):,} training examples, and "
        f"{added:,} texts without other labels{left_out}."
    )
    return dataclasses.replace(dataset, train=train)


def add_vectors(dataset: Dataset, path: Path) -> Dataset:
    """Gives training examples the teachers' vectors of their texts.

    Args:
      dataset: whose training examples have their soft labels.
      path: these; the vectors stand beside them.

    Raises:
      InputError: as `read_vectors`; of no training example's text there is one.
    """
    vectors = read_vectors(path)
    train = {
        task: [dataclasses.replace(example, vector=vectors.get(example.text)) for example in examples]
        for task, examples in dataset.train.items()
    }
    given = [example.vector is not None for examples in train.values() for example in examples]
    if not any(given):
        raise InputError(f"{vectors_file(path)} has the vector of no training text; it belongs to other data.")
    say(f"{vectors_file(path)}: teachers' vectors of {sum(given):,} of {len(given):,} training examples.")
    return dataclasses.replace(dataset, train=train)


def _read(job: TrainJob, file: Path, task: str) -> list[Example]:
    return read_examples(file, text_column=job.text_column, label_column=job.label_column, task=task)


@contextlib.contextmanager
def _naming(data: Path) -> Iterator[None]:
    """Prefixes InputErrors with the file or folder."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{data}: {e}") from None


def _check_trainable(task: Task, train: Sequence[Example]) -> None:
    """A task folder may name labels that no example has; a file cannot."""
    seen = {label for example in train for label in example.labels}
    if not seen:
        raise InputError(f"None of the {len(train)} training examples of '{task.name}' has a label.")
    if task.kind.exclusive and len(seen) < 2:
        raise InputError(
            f"All {len(train)} training examples of '{task.name}' have the same label; "
            f"a classifier needs at least two to tell apart."
        )


def _check_learnt(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """A label that the task names but nothing is trained on could never be answered right."""
    seen = {label for example in train for label in example.labels}
    for example in held_out:
        for label in example.labels:
            if label not in seen:
                raise InputError(f"{example.source}: no training example has the label '{label}'.")
