"""Rows of a CSV, TSV, JSON Lines, Parquet or Arrow file, each with its place in it. Knows no texts or labels."""

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
# The name that a command takes for standard input and standard output.
PIPE = Path("-")
BATCH_ROWS = 4096

# Called with the error of a row that cannot be read; the rows after it are read all the same.
OnBad = Callable[[InputError], object]
OnHeader = Callable[[list[str], str], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One data row.

    Attributes:
      fields: its values by column name.
      source: where it is, for error messages: "tickets.csv, row 17 (line 18)".
      raw: of CSV, TSV and JSON Lines, its characters in the file, the line's end included.
    """

    fields: dict[str, Any]
    source: str
    raw: str = ""


def suffix_of(path: Path) -> str | None:
    """Which of `SUFFIXES` the file's name ends in."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def kind_of(path: Path, kind: str | None = None) -> str:
    """The format of a file by its suffix: one of `TEXT_KINDS`, "parquet" or "arrow".

    Args:
      path: the file, or `PIPE`.
      kind: the format of a pipe, one of `TEXT_KINDS`; None is "jsonl".

    Raises:
      InputError: an unknown suffix.
    """
    if path == PIPE:
        return kind or "jsonl"
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path} has none of the known suffixes ({', '.join(SUFFIXES)}); save it as one of them.")
    return suffix.split(".")[1]


def check_file(path: Path) -> None:
    """Raises InputError where no such file can be read, before the work on it."""
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
    """The rows of a file, by its suffix. Rows of a CSV count from 1 below the header; those of JSON Lines are lines.

    Args:
      path: the file; `PIPE` for standard input.
      on_bad: called with the error of a row that cannot be read, which is then left out; None raises it instead.
      kind: the format of standard input; None is JSON Lines.
      on_header: of CSV and TSV, called with the columns' names and the header's own characters, before the first row.

    Raises:
      InputError: no such file, an unknown suffix, or content that is not of the format that the suffix names.
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
    """The bytes of a file, decompressed; of standard input as they come."""
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
    """Numbered from 1, decoded lines with their ends ("\n" or "\r\n"); a byte order mark is dropped."""
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
    """Lines for `csv.reader`, and the characters of those that it took since the last `take`."""

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
    # Strict, because otherwise a quote that is never closed silently swallows the rest of the file.
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
    """The package pyarrow, with its modules for Parquet.

    Raises:
      InputError: it is not installed; `purpose` begins the sentence.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_packages(purpose, "pyarrow", "local") from None
    return pyarrow


@contextlib.contextmanager
def open_batches(path: Path) -> Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch], int | None]]:
    """The schema of a Parquet file, or of one in Arrow's stream format, in which Hugging Face's datasets are saved.

    With it the rows, at most `BATCH_ROWS` a batch, and their number, which Arrow's stream format does not tell.

    Raises:
      InputError: the file cannot be read, also while the batches are.
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
