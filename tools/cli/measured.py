"""What `evaluate`, `focus-report` and `focus-plan` share: a bundle, one of its tasks, and labelled texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from classer.data.errors import InputError

from .arguments import BundleArgument, check_can_make

if TYPE_CHECKING:
    from classer.data.taxonomy import Task
    from classer.model.bundle import Bundle
    from classer.train.evaluation import TokenizedSplit


@dataclasses.dataclass(frozen=True)
class MeasureArguments:
    """
    Attributes:
      bundle: the bundle to measure.
      data: a file of labelled texts, or a folder with task.json.
      split: which split of the folder.
      task: name of the bundle's task; needed only if it has several.
      out: a new folder for the report and its pictures.
      text_column: the column of the texts.
      label_column: the column of the labels; by default `label` or `labels`.
      max_length: tokens that a text is cut to; by default what the bundle was trained with.
    """

    bundle: BundleArgument
    data: Path
    split: str = "test"
    task: str | None = None
    out: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    max_length: int | None = None


def load_measured(a: MeasureArguments) -> tuple[Bundle, Task, TokenizedSplit]:
    """The bundle, its task, and the texts that are to be measured."""
    from classer.data.readers import check_labels, read_examples, read_task_folder
    from classer.model.bundle import load_bundle
    from classer.train.evaluation import tokenize

    if a.out is not None:
        check_can_make(a.out, new=True)
    bundle = load_bundle(a.bundle)
    names = [task.name for task in bundle.taxonomy.tasks]
    if a.task is None and len(names) > 1:
        raise InputError(f"The bundle has several tasks; name one with --task: {', '.join(names)}.")
    task = bundle.taxonomy.task(names[0] if a.task is None else a.task)
    max_length = bundle.max_length if a.max_length is None else a.max_length
    if not 2 <= max_length <= bundle.max_length:
        raise InputError(f"--max-length is {max_length}; this bundle reads 2 to {bundle.max_length} tokens.")
    if a.data.is_dir():
        folder = read_task_folder(a.data, (a.split,))
        if a.split not in folder.splits:
            raise InputError(f"{a.data} has no split '{a.split}'; it has {', '.join(sorted(folder.there))}.")
        examples = folder.splits[a.split]
    else:
        examples = read_examples(a.data, text_column=a.text_column, label_column=a.label_column, task=task.name)
    check_labels(task, examples)
    return bundle, task, tokenize(task, examples, bundle.tokenizer, max_length)
