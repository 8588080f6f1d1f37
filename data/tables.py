"""Rows of CSV, TSV, JSON Lines, Parquet and Arrow files, each with its place in the file."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import InputError
from .extras import missing_packages

if TYPE_CHECKING:
    import pyarrow

TEXT_KINDS = ("csv", "tsv", "jsonl")
CODECS = ("", "gz", "zst")
SUFFIXES = (
    *(f".{kind}{'.' * bool(codec)}{codec}" for codec in CODECS for kind in TEXT_KINDS),
    ".parquet",
    ".arrow",
)
# The name of standard input and standard output on the command line.
PIPE = Path("-")
BATCH_ROWS = 4096

# Called with the error of each unreadable row; reading then continues with the next row.
OnBad = Callable[[InputError], object]
OnHeader = Callable[[list[str], str], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One data row.

    Attributes:
      fields: column name → value.
      source: the place, for error messages: "tickets.csv, row 17 (line 18)".
      raw: the row's characters in the file, line ending included, for CSV, TSV and JSON Lines; else empty.
    """

    fields: dict[str, Any]
    source: str
    raw: str = ""


def suffix_of(path: Path) -> str | None:
    """The one of `SUFFIXES` in which the file's name ends; None if it has another suffix."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def kind_of(path: Path, kind: str | None = None) -> str:
    """The format of a file by its suffix: one of `TEXT_KINDS`, "parquet" or "arrow".

    Args:
      path: the file, or `PIPE`.
      kind: the format of a pipe, one of `TEXT_KINDS`; None means "jsonl".

    Raises:
      InputError: the suffix is unknown.
    """
    if path == PIPE:
        return kind or "jsonl"
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path} has none of the known suffixes ({', '.join(SUFFIXES)}); save it as one of them.")
    return suffix.split(".")[1]


def check_file(path: Path) -> None:
    """Checks, before any work, that a file of rows exists.

    Raises:
      InputError: the path is a folder or does not exist, or its suffix is unknown.
    """
    if path == PIPE:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file of examples was expected.")
    if not path.exists():
        raise InputError(f"There is no file {path}.")
    kind_of(path)


def read_rows(
    path: Path, on_bad: OnBad | None = None, *, kind: str | None = None, on_header: OnHeader | None = None
) -> Iterator[Row]:
    """Iterates over the rows of a file, whose suffix gives the format.

    Messages count the rows of CSV, TSV, Parquet and Arrow from 1, without the header, and name lines of JSON Lines.

    Args:
      path: the file; `PIPE` for standard input.
      on_bad: called with the error of each unreadable row, which is then skipped; None raises the error instead.
      kind: the format of standard input; None means JSON Lines.
      on_header: for CSV and TSV, called before the first row with the column names and the header's raw characters.

    Raises:
      InputError: the file does not exist, its suffix is unknown, or its content does not have that format.
    """
    check_file(path)
    kind = kind_of(path, kind)
    if kind in ("parquet", "arrow"):
        return _columnar_rows(path)
    on_bad = on_bad or _raise
    name = name_of(path)
    if kind == "jsonl":
        return _json_rows(name, _lines(path, on_bad), on_bad)
    return _csv_rows(name, _lines(path, on_bad), "\t" if kind == "tsv" else ",", on_bad, on_header)


def name_of(path: Path) -> str:
    """The file's name in messages."""
    return "standard input" if path == PIPE else str(path)


def _raise(error: InputError) -> None:
    raise error from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | io.BufferedReader]:
    """Opens a file as a stream of decompressed bytes; standard input is taken as it is."""
    suffix = path.suffix.lower()
    if path == PIPE:
        yield sys.stdin.buffer
    elif suffix == ".zst":
        with import_pyarrow(f"{path}: reading zstd").input_stream(str(path), compression="zstd") as file:
            yield io.BufferedReader(file, 1 << 20)
    else:
        with gzip.open(path, "rb") if suffix == ".gz" else path.open("rb") as file:
            yield file  # pyright: ignore[reportReturnType]


def _lines(path: Path, on_bad: OnBad) -> Iterator[tuple[int, str]]:
    """(number from 1, decoded line with its line ending) of a file; a byte order mark is dropped."""
    offset = number = 0
    name = name_of(path)
    compressed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as e:
                    place = f"{name}, line {number}: byte 0x{line[e.start]:02x} at offset {offset + e.start}"
                    on_bad(InputError(f"{place} is not UTF-8; save the file as UTF-8."))
                else:
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as e:
        if compressed and (not isinstance(e, OSError) or e.errno is None):
            raise InputError(f"{name} is no complete {compressed} file; after line {number:,}: {e}.") from None
        if isinstance(e, OSError):
            raise InputError(f"{name} cannot be read: {e.strerror}.") from None
        raise


class _Recorded:
    """Passes lines to `csv.reader`; `take` returns the raw characters that it read since the previous `take`."""

    def __init__(self, lines: Iterable[tuple[int, str]]) -> None:
        self._lines = iter(lines)
        self._taken: list[str] = []

    def __iter__(self) -> _Recorded:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self._taken.append(line)
        return line

    def take(self) -> str:
        taken = "".join(self._taken)
        self._taken.clear()
        return taken


def _csv_rows(
    path: str, lines: Iterable[tuple[int, str]], delimiter: str, on_bad: OnBad, on_header: OnHeader | None
) -> Iterator[Row]:
    # Strict: otherwise an unclosed quote would silently make the rest of the file one field.
    recorded = _Recorded(lines)
    reader = csv.reader(recorded, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    first_line = 1
    try:
        with _long_fields():
            for cells in reader:
                raw = recorded.take()
                line, first_line = first_line, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _check_header(path, cells)
                    if on_header is not None:
                        on_header(header, raw)
                    continue
                number += 1
                source = f"{path}, row {number} (line {line})"
                if len(cells) != len(header):
                    said = f"{len(cells)} fields, where the header has {len(header)} ({', '.join(header)})"
                    quote = "a field that holds a delimiter, a quote or a line break must stand in double quotes"
                    on_bad(InputError(f"{source}: {said}; {quote}."))
                    continue
                yield Row(dict(zip(header, cells, strict=True)), source, raw)
    except csv.Error as e:
        # The rest of the file cannot be split into rows, so the error is always raised, never passed to `on_bad`.
        raise InputError(
            f"{path}, row {number + 1} (line {first_line}): not valid CSV, {e}; a quoted field must end with a quote, "
            f"and a quote inside it is written twice."
        ) from None


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Temporarily lifts the csv module's limit of 131,072 characters per field, which is global to the process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(path: str, header: list[str]) -> list[str]:
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{path}: the header names the column '{name}' twice; column names must differ.")
    return header


def _json_rows(path: str, lines: Iterable[tuple[int, str]], on_bad: OnBad) -> Iterator[Row]:
    for number, line in lines:
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
                yield Row(fields, source, line)
            else:
                on_bad(InputError(f'{source}: not a JSON object such as {{"text": "…", "label": "…"}}.'))


def import_pyarrow(purpose: str) -> Any:
    """Imports pyarrow, with its Parquet module.

    Raises:
      InputError: pyarrow is not installed; `purpose` begins the sentence.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_packages(purpose, "pyarrow", "local") from None
    return pyarrow


@contextlib.contextmanager
def open_batches(path: Path) -> Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch], int | None]]:
    """Opens a Parquet file, or one in Arrow's stream format, which Hugging Face's datasets are saved in.

    Yields:
      The schema, the batches of at most `BATCH_ROWS` rows, and the number of rows (None for Arrow's stream format,
      which does not store it).

    Raises:
      InputError: the file cannot be read; also raised during iteration over the batches.
    """
    kind = {"parquet": "Parquet", "arrow": "Arrow"}[kind_of(path)]
    pyarrow = import_pyarrow(f"{path}: reading {kind}")
    count = 0

    def unreadable(error: Exception) -> InputError:
        place = f"; after row {count:,}" if count else ""
        return InputError(f"{path} is no readable {kind} file{place}: {str(error).splitlines()[0]}")

    def counted(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        nonlocal count
        try:
            for whole in batches:
                for start in range(0, len(whole), BATCH_ROWS):
                    batch = whole.slice(start, BATCH_ROWS)
                    yield batch
                    count += len(batch)
        except (pyarrow.ArrowException, OSError) as e:
            raise unreadable(e) from None

    with contextlib.ExitStack() as stack:
        total = None
        try:
            if kind == "Parquet":
                file = stack.enter_context(pyarrow.parquet.ParquetFile(path))
                schema, batches, total = file.schema_arrow, file.iter_batches(BATCH_ROWS), file.metadata.num_rows
            else:
                file = stack.enter_context(pyarrow.ipc.open_stream(stack.enter_context(path.open("rb"))))
                schema, batches = file.schema, iter(file)
        except (pyarrow.ArrowException, OSError) as e:
            raise unreadable(e) from None
        yield schema, counted(batches), total


def _columnar_rows(path: Path) -> Iterator[Row]:
    number = 0
    with open_batches(path) as (schema, batches, _):
        class_names = _class_names(schema.metadata)
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                for column in class_names.keys() & fields.keys():
                    fields[column] = _named(fields[column], class_names[column])
                yield Row(fields, f"{path}, row {number}")


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Column → class names, for the columns that Hugging Face's datasets stores as class numbers."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        elements = {column: feature.get("feature", feature) for column, feature in features.items()}
        return {column: list(e["names"]) for column, e in elements.items() if e.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(value: Any, names: list[str]) -> Any:
    """The name of a class number, or the names of a list of them. None for -1, which marks a missing label."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value
