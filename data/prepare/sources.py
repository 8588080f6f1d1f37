"""Input files and their rows: files, folders, task folders, and Hugging Face datasets saved to disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError
from ..readers import example_of, find_label_column, read_texts
from ..tables import SUFFIXES, kind_of, read_rows, suffix_of
from ..taxonomy import Task
from .steps import SourceRow, clean_row, rank_of


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A training file.

    Attributes:
      path: the file.
      task: the name of the task that its labels belong to.
      known: the task, if a task.json describes it.
    """

    path: Path
    task: str
    known: Task | None = None


@dataclasses.dataclass(frozen=True)
class Reject:
    """An invalid row.

    Attributes:
      file: the position of its file among the inputs.
      row: its number in the file, from 1; all rows count, as in `rank_of`.
      reason: the error message, which names the place.
    """

    file: int
    row: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of texts and labels; a label column of None means `label` or `labels`, whichever exists."""

    text: str = "text"
    label: str | None = None


def find_sources(inputs: Sequence[Path], task: str | None) -> tuple[list[SourceFile], list[Path]]:
    """Finds the training files of all inputs, and the evaluation files among them.

    A file is a task with the file's name. A folder is tried, in this order, as a task folder (task.json and a file per
    split), as a Hugging Face dataset saved to disk (with or without splits), and as a plain folder, all of whose files
    are taken. If there are splits, `train` is for training and all others are evaluation sets.

    Args:
      inputs: files and folders.
      task: the task name for inputs without a task.json; None for the name of the file or folder.

    Returns:
      (training files, evaluation files).

    Raises:
      InputError: an input does not exist, or has no training file of a known format.
    """
    sources: list[SourceFile] = []
    evaluation: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise InputError(f"There is no file or folder {path}.")
        if path.is_file():
            sources.append(SourceFile(path, task or path.name.split(".")[0]))
            continue
        name, known, splits = task or path.resolve().name, None, {}
        if (path / "task.json").is_file():
            known = _read_task(path / "task.json")
            name = known.name
            splits = {file.name[: -len(suffix_of(file) or "")]: [file] for file in _files(path, deep=False)}
        elif (path / "dataset_dict.json").is_file():
            splits = {folder.parent.name: _saved_files(folder.parent) for folder in sorted(path.glob("*/state.json"))}
        elif (path / "state.json").is_file():
            splits = {"train": _saved_files(path)}
        else:
            splits = {"train": _files(path, deep=True)}
        if not splits.get("train"):
            known_suffixes = ", ".join(SUFFIXES)
            raise InputError(f"{path} has nothing to train on: no split 'train', or no file of {known_suffixes}.")
        sources += [SourceFile(file, name, known) for file in splits.pop("train")]
        evaluation += [file for _, files in sorted(splits.items()) for file in files]
    return sources, evaluation


def find_evaluation(paths: Sequence[Path]) -> list[Path]:
    """Finds the files of the evaluation sets that the user names.

    Raises:
      InputError: a path does not exist or has no file of a known format.
    """
    files: list[Path] = []
    for path in paths:
        found = _files(path, deep=True) if path.is_dir() else [path]
        if not found or not path.exists():
            raise InputError(f"{path} is no evaluation set: no such file, or no file of {', '.join(SUFFIXES)} in it.")
        files += found
    return files


def read_evaluation(files: Sequence[Path], columns: Columns) -> list[str]:
    """Reads the texts of all evaluation files.

    Raises:
      InputError: any row is invalid; a skipped row would be contamination that goes unnoticed.
    """
    return [text for file in files for text in read_texts(file, text_column=columns.text)]


def read_source(file: int, source: SourceFile, task: int, columns: Columns) -> Iterator[SourceRow | Reject]:
    """Iterates over the cleaned rows and the rejects of a file, in order.

    Args:
      file: the position of the file among the inputs.
      source: the file.
      task: the position of its task among the inputs' tasks.
      columns: the columns of texts and labels.

    Raises:
      InputError: the file as a whole cannot be read.
    """
    in_cell = kind_of(source.path) in ("csv", "tsv")
    bad: list[InputError] = []
    number = 0
    for row in read_rows(source.path, on_bad=bad.append):
        yield from (Reject(file, number + i, str(error)) for i, error in enumerate(bad, start=1))
        number += len(bad) + 1
        bad.clear()
        try:
            label_column = columns.label or find_label_column(row.source, row)
            example = example_of(
                row, text_column=columns.text, label_column=label_column, task=source.task, in_cell=in_cell
            )
            yield clean_row(example, rank_of(file, number), task, source.known)
        except InputError as error:
            yield Reject(file, number, str(error))
    yield from (Reject(file, number + i, str(error)) for i, error in enumerate(bad, start=1))


def _files(folder: Path, *, deep: bool) -> list[Path]:
    return sorted(path for path in folder.glob("**/*" if deep else "*") if path.is_file() and suffix_of(path))


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset, in the order of its state.json."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder / 'state.json'} does not name the dataset's files; save the dataset anew.") from None


def _read_task(file: Path) -> Task:
    try:
        return Task.from_json(json.loads(file.read_text(encoding="utf-8-sig")), source=str(file))
    except ValueError as e:
        raise InputError(f"{file} is not valid JSON: {e}.") from None
