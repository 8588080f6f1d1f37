"""Arguments that several commands share."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from classer.data.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextsArguments:
    """
    Attributes:
      data: texts: a CSV, TSV or JSONL file (also with .gz or .zst), a Parquet file, a folder with task.json, or - for
        JSON Lines from standard input.
      split: which split of a folder.
      text_column: the column or field that holds the text.
    """

    data: Path
    split: str = "test"
    text_column: str = "text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamplesArguments(TextsArguments):
    """
    Attributes:
      label_column: the column or field that holds the label or labels; by default `label` or `labels`.
    """

    label_column: str | None = None


BundleArgument = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BUNDLE")]


def parse(kind: type, argv: Sequence[str], prog: str, doc: str | None) -> Any:
    """Parses a command line into a `kind`; `doc` is the command's description in its help."""
    return tyro.cli(kind, prog=prog, args=list(argv), description=doc)


def check_can_make(folder: Path, *, new: bool = False) -> None:
    """Raises InputError if the folder cannot be made. Called before the work whose results go into it."""
    if new and folder.exists():
        raise InputError(f"{folder} exists already and was not touched; name a new folder with --out.")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"--out is {folder}, but {nearest} is a file; name a folder that can be made.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as e:
        reason = (e.strerror or str(e)).lower()
        raise InputError(f"--out is {folder}, but nothing can be written in {nearest}: {reason}.") from None
