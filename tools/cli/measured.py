"""Arguments of `evaluate`, `focus-report` and `focus-plan`: a bundle, one of its tasks, and labelled texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from classer.data.errors import InputError

from .arguments import BundleArgument, ExamplesArguments, check_can_make

if TYPE_CHECKING:
    from classer.data.taxonomy import Task
    from classer.model.bundle import Bundle
    from classer.train.tokenized import TokenizedSplit


@dataclasses.dataclass(frozen=True)
class MeasureArguments(ExamplesArguments):
    """
    Attributes:
      bundle: the bundle to measure.
      task: name of the bundle's task; needed only if it has several.
      out: a new folder for the report and its pictures.
      max_length: tokens that a text is cut to; by default what the bundle was trained with.
    """

    bundle: BundleArgument
    task: str | None = None
    out: Path | None = None
    max_length: int | None = None


def load_measured(a: MeasureArguments) -> tuple[Bundle, Task, TokenizedSplit]:
    """The bundle, its task, and the tokenised examples. Raises InputError."""
    from classer.data.readers import check_labels, data_file, read_examples
    from classer.model.bundle import load_bundle
    from classer.train.tokenized import tokenize

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
    file = data_file(a.data, a.split)
    examples = read_examples(file, text_column=a.text_column, label_column=a.label_column, task=task.name)
    check_labels(task, examples)
    return bundle, task, tokenize(task, examples, bundle.tokenizer, max_length)
