"""Strict reading of labelled examples from a user's files: invalid data is an error before training starts."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, listed
from .examples import Example
from .limits import MAX_TEXT_CHARS
from .tables import SUFFIXES, Row, check_file, kind_of, read_rows, suffix_of
from .taxonomy import Label, Task, TaskKind

TASK_FILES = ("task.json", "task.yaml", "task.yml")

_MISSING = ("nan", "null")  # how data frames write a missing label

# Synonymous column names in common data sets, the most usual first.
_SAME_MEANING = (
    ("text", "texts", "body", "content", "message", "review", "sentence", "comment", "utterance", "query", "document"),
    ("label", "labels", "target", "category", "class", "intent", "topic", "sentiment", "tag", "tags", "y"),
)


def read_examples(
    path: Path, *, text_column: str = "text", label_column: str | None = None, task: str
) -> list[Example]:
    """Reads a CSV, TSV, JSON Lines (each also with .gz or .zst) or Parquet file of labelled texts.

    Several labels per row are a list in JSON and Parquet. In CSV and TSV they are names separated by '|', except in a
    column called `label`, where '|' is part of the name. Whole numbers and booleans are read as names. A column `id`,
    if there is one, gives the examples' ids.

    Args:
      path: the file; UTF-8.
      text_column: the column of the texts.
      label_column: the column of the labels; None for `label` or `labels`, whichever exists.
      task: the name of the task that the labels belong to.

    Raises:
      InputError: with file and row or field: the file or a column is missing, there are no rows, the content is
        malformed or not UTF-8, a label is missing, a text is blank, not a string or longer than `MAX_TEXT_CHARS`, or
        an id is repeated.
    """
    path = Path(path)
    check_file(path)
    in_cell = kind_of(path) in ("csv", "tsv")
    examples: list[Example] = []
    source_of_id: dict[str, str] = {}
    for row in read_rows(path):
        if label_column is None:
            label_column = find_label_column(path, row)
        example = example_of(row, text_column=text_column, label_column=label_column, task=task, in_cell=in_cell)
        if example.id is not None:
            earlier = source_of_id.setdefault(example.id, row.source)
            if earlier != row.source:
                raise InputError(f"{row.source}: the id '{example.id}' stood at {earlier} already; ids must differ.")
        examples.append(example)
    if not examples:
        raise InputError(f"{path} is empty; at least one row of text and label was expected.")
    return examples


def example_of(row: Row, *, text_column: str, label_column: str, task: str, in_cell: bool) -> Example:
    """Converts a row to an example.

    Args:
      row, text_column, label_column, task: see `read_examples`.
      in_cell: whether one cell holds all labels, as in CSV and TSV.

    Raises:
      InputError: as `read_examples`, for this row.
    """
    check_column(row, text_column, "--text-column")
    check_column(row, label_column, "--label-column")
    labels = _labels(row, label_column, in_cell=in_cell)
    return Example(text_of(row, text_column), labels, task, id=_id(row), source=row.source)


def read_texts(path: Path, *, text_column: str = "text") -> list[str]:
    """Reads the texts of a file as `read_examples` does; other columns are ignored.

    Raises:
      InputError: as `read_examples`, except for labels and ids.
    """
    texts = []
    for row in read_rows(Path(path)):
        texts.append(text_of(row, text_column))
    if not texts:
        raise InputError(f"{path} is empty; at least one row of text was expected.")
    return texts


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task and its examples by split.

    Attributes:
      task: the task.
      splits: split name ("train", "dev", "test", …) → examples, for the splits that were read.
      there: the names of all splits in the folder.
    """

    task: Task
    splits: dict[str, list[Example]]
    there: tuple[str, ...]


def read_mapping(path: Path) -> Any:
    """Decodes a JSON file, or a YAML file if its suffix is .yaml or .yml.

    Raises:
      InputError: the file cannot be read or is malformed.
    """
    import yaml  # imported here, so that serving does not need PyYAML

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}).") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        return json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise InputError(f"{path} is not valid {kind}: {e}.") from None


def find_task_file(folder: Path) -> Path | None:
    """The task.json (or .yaml, .yml) of a task's folder; None if there is none.

    Raises:
      InputError: the folder has more than one.
    """
    found = [folder / name for name in TASK_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} has both {found[0].name} and {found[1].name}; keep one.")
    return found[0] if found else None


def read_task_folder(
    path: Path, splits: Sequence[str] | None = None, *, text_column: str = "text", label_column: str | None = None
) -> TaskData:
    """Reads a folder with `task.json` (or `task.yaml`) and one file of examples per split, such as `train.jsonl.gz`.

    Args:
      path: the folder.
      splits: the splits to read, those that the folder lacks being skipped; None for all.
      text_column, label_column: see `read_examples`.

    Raises:
      InputError: as `read_examples` and `Task.from_json`; or the folder has no task.json, no split, two files for one
        split, or lacks a split that task.json names; or a label is not in the task.
    """
    path = Path(path)
    task_file = find_task_file(path)
    if task_file is None:
        raise InputError(f"{path / TASK_FILES[0]} does not exist; a task's folder holds it (or .yaml) and its splits.")
    description = read_mapping(task_file)
    if not isinstance(description, dict):
        raise InputError(f'{task_file} is no JSON object with the fields "name", "kind" and "labels".')
    task = Task.from_json(description, source=str(task_file))

    files = split_files(path)
    named = description.get("splits", {})
    if not isinstance(named, (dict, list)):
        raise InputError(f"{task_file}: 'splits' must name splits: a list, or an object with the size of each.")
    for split in named:
        if split not in files:
            raise InputError(f"{path} has no file {split}.jsonl (or {', '.join(SUFFIXES)}), which task.json names.")
    if not files:
        raise InputError(f"{path} has no split beside {task_file.name}; expected a file such as train.jsonl.")
    wanted = files if splits is None else [split for split in splits if split in files]
    read = {
        split: read_examples(files[split], text_column=text_column, label_column=label_column, task=task.name)
        for split in wanted
    }
    for examples in read.values():
        check_labels(task, examples)
    return TaskData(task, read, tuple(files))


def split_files(folder: Path) -> dict[str, Path]:
    """Split name → file, for a task's folder.

    Raises:
      InputError: a split has two files.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        suffix = suffix_of(file)
        if suffix is None:
            continue
        split = file.name[: -len(suffix)]
        if split in files:
            raise InputError(f"{folder} has two files for the split '{split}': {files[split].name} and {file.name}.")
        files[split] = file
    return files


def data_file(path: Path, split: str) -> Path:
    """Resolves a command's `--data` and `--split` to a file of rows.

    Args:
      path: a file, `PIPE`, or a folder with task.json.
      split: the split to take from a folder.

    Raises:
      InputError: the file does not exist, or the folder lacks task.json or the split.
    """
    if not path.is_dir():
        check_file(path)
        return path
    if find_task_file(path) is None:
        if folders := task_folders(path):
            raise InputError(f"{path} holds several tasks; name the folder of one, such as {folders[0]}.")
        raise InputError(f"{path} has no {TASK_FILES[0]} (or .yaml); give a file, or a task's folder with its splits.")
    files = split_files(path)
    if split not in files:
        raise InputError(f"{path} has no split '{split}'; it has {', '.join(files) or 'none'}.")
    return files[split]


def task_folders(path: Path) -> list[Path]:
    """The task folders directly inside a folder, sorted by name; empty if `path` itself is a task's folder."""
    if find_task_file(path) is not None:
        return []
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and find_task_file(folder) is not None)


def infer_task(name: str, examples: Sequence[Example]) -> tuple[Task, str]:
    """Infers a task from its examples' labels.

    With exactly one label on every row the task is binary for two distinct labels and multiclass for more; otherwise
    it is multilabel. Labels are sorted by name.

    Returns:
      The task, and a sentence for the user about the kind that was inferred.

    Raises:
      InputError: no row has a label, or all rows have the same single label.
    """
    labels = sorted({label for example in examples for label in example.labels})
    counts = [len(example.labels) for example in examples]
    if not labels:
        raise InputError(f"None of the {len(counts)} rows has a label; a classifier needs some to learn from.")
    if set(counts) != {1}:
        kind = TaskKind.MULTILABEL
        found = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
        said = f"The label column holds {found} labels a row, {len(labels)} distinct: a multilabel task."
    elif len(labels) == 1:
        raise InputError(
            f"All {len(counts)} rows have the label '{labels[0]}'; a classifier needs at least two to tell apart."
        )
    else:
        kind = TaskKind.BINARY if len(labels) == 2 else TaskKind.MULTICLASS
        said = f"The label column holds one label a row, {len(labels)} distinct: a {kind} task."
    return Task(name, kind, tuple(Label(label) for label in labels)), said


def check_labels(task: Task, examples: Sequence[Example]) -> None:
    """Checks examples against a task, for instance a test file against the task of the training file.

    Raises:
      InputError: a label is not in the task, or a row of an exclusive task does not have exactly one label.
    """
    for example in examples:
        for label in example.labels:
            if label not in task.index:
                near = difflib.get_close_matches(label, task.label_names, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise InputError(
                    f"{example.source}: the task '{task.name}' has no label '{label}', only "
                    f"{listed(task.label_names)}.{hint}"
                )
        if task.kind.exclusive and len(example.labels) != 1:
            named = f" ({listed(example.labels)})" if example.labels else ""
            raise InputError(
                f"{example.source}: {len(example.labels)} labels{named}, but '{task.name}' is a {task.kind} task, "
                f"where every text has exactly one."
            )


def find_label_column(place: Path | str, row: Row) -> str:
    """`label` or `labels`, whichever column the row has.

    Raises:
      InputError: the row has neither or both; `place` begins the sentence.
    """
    there = [column for column in ("label", "labels") if column in row.fields]
    if len(there) == 1:
        return there[0]
    columns = listed(list(row.fields))
    if there:
        raise InputError(f"{place} has both columns 'label' and 'labels'; choose one with --label-column.")
    hint = _nearest_hint("label", row.fields)
    raise InputError(
        f"{place} has no column 'label' or 'labels', only {columns}; name another with --label-column{hint}."
    )


def check_column(row: Row, column: str, option: str) -> None:
    """Checks that the row has a column.

    Raises:
      InputError: it does not; the message refers to `option`, which chooses another column.
    """
    if column not in row.fields:
        hint = _nearest_hint(column, row.fields)
        raise InputError(f"{row.source}: no column '{column}', only {listed(list(row.fields))}; see {option}{hint}.")


def nearest_column(wanted: str, columns: Iterable[str]) -> str | None:
    """The most likely match for a missing column: in other case, a synonym, or similarly spelt; None if none is."""
    by_name = {column.strip().lower(): column for column in columns}
    wanted = wanted.strip().lower()
    same = next((names for names in _SAME_MEANING if wanted in names), ())
    similar = difflib.get_close_matches(wanted, list(by_name), n=1)
    return next((by_name[name] for name in (wanted, *same, *similar) if name in by_name), None)


def _nearest_hint(wanted: str, columns: Iterable[str]) -> str:
    near = nearest_column(wanted, columns)
    return "" if near is None else f" ('{near}' comes nearest)"


def text_of(row: Row, column: str) -> str:
    """The text of a row.

    Raises:
      InputError: the column is missing, or its value is not a string, is blank, is longer than `MAX_TEXT_CHARS`, or
        cannot be encoded as UTF-8.
    """
    check_column(row, column, "--text-column")
    text = row.fields[column]
    if not isinstance(text, str):
        raise InputError(f"{row.source}: '{column}' holds {_described(text)}, not a text.")
    if len(text) > MAX_TEXT_CHARS:
        raise InputError(
            f"{row.source}: '{column}' holds {len(text):,} characters; a text may have {MAX_TEXT_CHARS:,}. Cut it."
        )
    if not text or text.isspace():
        raise InputError(f"{row.source}: '{column}' is empty; remove the row or give it a text.")
    _check_encodable(row, column, text)
    return text


def _labels(row: Row, column: str, *, in_cell: bool) -> tuple[str, ...]:
    value = row.fields[column]
    if in_cell:
        values = [name.strip() for name in ([value] if column == "label" else value.split("|"))]
    else:
        values = value if isinstance(value, list) else [value]
    names = tuple(_label(row, column, value) for value in values)
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{row.source}: '{column}' names the label '{repeated[0]}' twice.")
    return names


def _label(row: Row, column: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{row.source}: '{column}' holds {_described(value)}; a label is a name or a whole number.")
    if not value or value.isspace():
        raise InputError(
            f"{row.source}: '{column}' has an empty label; name one, or, for a text to which none applies, write [] in "
            f"a JSON Lines file."
        )
    if value.casefold() in _MISSING:
        raise InputError(f"{row.source}: '{column}' holds '{value}', a missing value; name a label or remove the row.")
    _check_encodable(row, column, value)
    return value


def _id(row: Row) -> str | None:
    value = row.fields.get("id")
    return None if value is None or value == "" else str(value)


def _check_encodable(row: Row, column: str, value: str) -> None:
    # JSON can escape a lone surrogate, which cannot be encoded as UTF-8 later.
    try:
        value.encode()
    except UnicodeEncodeError as e:
        half = ord(value[e.start])
        raise InputError(
            f"{row.source}: '{column}' has \\u{half:04x} at character {e.start}, half of a surrogate pair."
        ) from None


def _described(value: Any) -> str:
    if value is None:
        return "null, a missing value"
    if isinstance(value, float) and value != value:
        return "NaN, a missing value"
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"{kinds.get(type(value), 'a ' + type(value).__name__)} ({str(value)[:40]})"
