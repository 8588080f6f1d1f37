"""Rows of a CSV, TSV, JSON Lines or Parquet file, each with its place in the file. Knows nothing of texts or labels."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".parquet")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One data row: its fields by column name, and where it stands: "tickets.csv, row 17 (line 18)"."""

    fields: dict[str, Any]
    source: str


def suffix_of(path: Path) -> str | None:
    """Which of `SUFFIXES` the file's name ends in."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, by its suffix. Rows of a CSV count from 1 below the header; those of JSON Lines are lines.

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
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix.startswith(".jsonl"):
        return _json_rows(path)
    return _csv_rows(path, "\t" if suffix.startswith(".tsv") else ",")


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their ends ("\\n" or "\\r\\n"); a byte order mark is dropped."""
    offset = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as e:
                    raise InputError(
                        f"{path}, line {number}: byte 0x{line[e.start]:02x} at offset {offset + e.start} is not UTF-8; "
                        f"save the file as UTF-8."
                    ) from None
                yield text.removeprefix("\ufeff") if number == 1 else text
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path} is no complete gzip file: {e}.") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.") from None


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    # Strict, because otherwise a quote that is never closed silently swallows the rest of the file.
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
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
                    raise InputError(
                        f"{source}: {len(cells)} fields, where the header has {len(header)} ({', '.join(header)}); "
                        f"a field that holds a delimiter, a quote or a line break must stand in double quotes."
                    )
                yield Row(dict(zip(header, cells, strict=True)), source)
    except csv.Error as e:
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


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            fields = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as e:
            raise InputError(f"{source}: not valid JSON, {e.msg} at column {e.colno}.") from None
        except (ValueError, RecursionError):
            raise InputError(f"{source}: not valid JSON; a number is too long or the nesting too deep.") from None
        if not isinstance(fields, dict):
            raise InputError(f'{source}: not a JSON object such as {{"text": "…", "label": "…"}}.')
        yield Row(fields, source)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs the package pyarrow (`pip install pyarrow`).") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as e:
        raise InputError(f"{path} is no readable Parquet file: {str(e).splitlines()[0]}") from None
