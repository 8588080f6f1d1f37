"""A job's examples: read, split, and checked against one another."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..data.errors import InputError
from ..data.examples import Example
from ..data.readers import check_labels, infer_task, read_examples, read_task_folder
from ..data.splits import describe_duplicates, find_duplicates, stratified_split
from ..data.taxonomy import Task
from .config import TrainJob


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One task's examples; `test` is empty where none are given."""

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]

    @property
    def measured(self) -> str:
        """The split that the finished model is measured on: "test", or "dev" where there is none."""
        return "test" if self.test else "dev"


def load_dataset(job: TrainJob, say: Callable[[str], object]) -> Dataset:
    """Reads what a job names, and says what it found.

    A folder brings its task and its splits; a file's task is inferred from its labels. Examples for development are
    the folder's split `dev`, the file given, or a stratified share of the training examples.

    Raises:
      InputError: as `read_examples` and `read_task_folder`; a label in dev or test that no training example has.
    """
    given: dict[str, list[Example]] = {}
    if job.data.is_dir():
        folder = read_task_folder(job.data)
        task, given = folder.task, dict(folder.splits)
        if "train" not in given:
            raise InputError(f"{job.data} has no split 'train'; it has {', '.join(sorted(given))}.")
        say(f"{job.data}: task '{task.name}', {task.kind}, {len(task.labels)} labels.")
    else:
        name = job.data.name.split(".")[0]
        given["train"] = _read(job, job.data, name)
        with _naming(job.data):
            task, said = infer_task(name, given["train"])
        say(said)
    for split, file in (("dev", job.dev), ("test", job.test)):
        if file is not None:
            given[split] = _read(job, file, task.name)
            check_labels(task, given[split])

    train = given["train"]
    if job.texts and job.texts < len(train):
        say(f"Drew {job.texts:,} of {len(train):,} training examples.")
        rows = np.random.default_rng(job.recipe.seed).permutation(len(train))[: job.texts]
        train = [train[row] for row in sorted(rows)]
    with _naming(job.data):
        _check_trainable(task, train)
    for split in ("dev", "test"):
        _check_learnt(train, given.get(split, []))
    if "dev" in given:
        dev = given["dev"]
    else:
        with _naming(job.data):
            train, dev = stratified_split(train, job.recipe.dev_fraction, job.recipe.seed)
        say(f"Set {len(dev):,} of {len(train) + len(dev):,} training examples aside for development.")
    test = given.get("test", [])
    say(f"Examples: {len(train):,} to train on, {len(dev):,} for development, {len(test):,} to test.")
    for name, split in (("dev", dev), ("test", test)):
        if sentence := describe_duplicates(find_duplicates(train, split), "train", name):
            say(f"Warning: {sentence}")
    return Dataset(task, train, dev, test)


def _read(job: TrainJob, file: Path, task: str) -> list[Example]:
    return read_examples(file, text_column=job.text_column, label_column=job.label_column, task=task)


@contextlib.contextmanager
def _naming(data: Path) -> Iterator[None]:
    """Puts the file or folder before the errors of what sees its examples only."""
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
