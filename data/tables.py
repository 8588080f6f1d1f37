"""Rows of a CSV, TSV, JSON Lines, Parquet or Arrow file, each with its place in it. Knows no texts or labels."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .extras import missing_packages

SUFFIXES = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".parquet", ".arrow")

# Told of a row that cannot be read; the rows after it are read all the same.
OnBad = Callable[[InputError], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One data row: its fields by column name, and where it stands: "tickets.csv, row 17 (line 18)"."""

    fields: dict[str, Any]
    source: str


def suffix_of(path: Path) -> str | None:
    """Which of `SUFFIXES` the file's name ends in."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_rows(path: Path, on_bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a file, by its suffix. Rows of a CSV count from 1 below the header; those of JSON Lines are lines.

    Args:
      path: the file.
      on_bad: called with the error of a row that cannot be read, which is then left out; None raises it instead.

    Raises:
      InputError: no such file, an unknown suffix, or content that is not of the format that the suffix names.
    """
    suffix = suffix_of(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file of examples was expected.")
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    if suffix is None:
        raise InputError(f"{path} has none of the known suffixes ({', '.join(SUFFIXES)}); save it as one of them.")
    if suffix in (".parquet", ".arrow"):
        return _columnar_rows(path, suffix)
    on_bad = on_bad or _raise
    if suffix.startswith(".jsonl"):
        return _json_rows(path, on_bad)
    return _csv_rows(path, "\t" if suffix.startswith(".tsv") else ",", on_bad)


def _raise(error: InputError) -> None:
    raise error from None


def _lines(path: Path, on_bad: OnBad) -> Iterator[tuple[int, str]]:
    """Numbered from 1, decoded lines with their ends ("\\n" or "\\r\\n"); a byte order mark is dropped."""
    offset = number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as e:
                    place = f"{path}, line {number}: byte 0x{line[e.start]:02x} at offset {offset + e.start}"
                    on_bad(InputError(f"{place} is not UTF-8; save the file as UTF-8."))
                else:
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path} is no complete gzip file; after line {number:,}: {e}.") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None


def _csv_rows(path: Path, delimiter: str, on_bad: OnBad) -> Iterator[Row]:
    # Strict, because otherwise a quote that is never closed silently swallows the rest of the file.
    reader = csv.reader((line for _, line in _lines(path, on_bad)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    first_line = 1
    try:
        with _long_fields():
            for cells in reader:
                line, first_line = first_line, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _check_header(path, cells)
                    continue
                number += 1
                source = f"{path}, row {number} (line {line})"
                if len(cells) != len(header):
                    said = f"{len(cells)} fields, where the header has {len(header)} ({', '.join(header)})"
                    quote = "a field that holds a delimiter, a quote or a line break must stand in double quotes"
                    on_bad(InputError(f"{source}: {said}; {quote}."))
                    continue
                yield Row(dict(zip(header, cells, strict=True)), source)
    except csv.Error as e:
        # The rest of the file cannot be told apart into rows, so that it is no matter of one row.
        raise InputError(
            f"{path}, row {number + 1} (line {first_line}): not valid CSV, {e}; a quoted field must end with a quote, "
            f"and a quote inside it is written twice."
        ) from None


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 131,072 characters a field, which is of the whole process, for a while."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(path: Path, header: list[str]) -> list[str]:
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{path}: the header names the column '{name}' twice; column names must differ.")
    return header


def _json_rows(path: Path, on_bad: OnBad) -> Iterator[Row]:
    for number, line in _lines(path, on_bad):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            fields = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as e:
            on_bad(InputError(f"{source}: not valid JSON, {e.msg} at column {e.colno}."))
        except (ValueError, RecursionError):
            on_bad(InputError(f"{source}: not valid JSON; a number is too long or the nesting too deep."))
        else:
            if isinstance(fields, dict):
                yield Row(fields, source)
            else:
                on_bad(InputError(f'{source}: not a JSON object such as {{"text": "…", "label": "…"}}.'))


def _columnar_rows(path: Path, suffix: str) -> Iterator[Row]:
    """Of Parquet, or of Arrow's stream format, in which Hugging Face's datasets are saved."""
    kind = {".parquet": "Parquet", ".arrow": "Arrow"}[suffix]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_packages(f"{path}: reading {kind}", "pyarrow", "local") from None
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            if suffix == ".parquet":
                file = stack.enter_context(pyarrow.parquet.ParquetFile(path))
                schema, batches = file.schema_arrow, file.iter_batches()
            else:
                file = stack.enter_context(pyarrow.ipc.open_stream(stack.enter_context(path.open("rb"))))
                schema, batches = file.schema, iter(file)
            class_names = _class_names(schema.metadata)
            for batch in batches:
                for fields in batch.to_pylist():
                    number += 1
                    for column in class_names.keys() & fields.keys():
                        fields[column] = _named(fields[column], class_names[column])
                    yield Row(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as e:
        place = f"; after row {number:,}" if number else ""
        raise InputError(f"{path} is no readable {kind} file{place}: {str(e).splitlines()[0]}") from None


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column → names of its classes, where Hugging Face's datasets has stored numbers for names."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        elements = {column: feature.get("feature", feature) for column, feature in features.items()}
        return {column: list(e["names"]) for column, e in elements.items() if e.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(value: Any, names: list[str]) -> Any:
    """The class's name; of a list, each one's. −1 is how datasets marks a missing label."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value
