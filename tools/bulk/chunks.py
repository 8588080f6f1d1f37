"""The input of `classer predict`, read as a stream of chunks of rows, so that memory does not grow with the file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from classer.data.errors import InputError
from classer.data.readers import check_column, text_of
from classer.data.tables import BATCH_ROWS, Row, kind_of, name_of, open_batches, read_rows

if TYPE_CHECKING:
    import pyarrow

# A chunk of long rows ends before `BATCH_ROWS`.
MAX_CHUNK_CHARS = 16_000_000


class RejectedRow(NamedTuple):
    """A row that cannot be classified: its number in the file, from 1, and why."""

    row: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Properties of the input that are known before its rows are read.

    Attributes:
      path: the file, or `PIPE`.
      kind: its format: "csv", "tsv", "jsonl", "parquet" or "arrow".
      columns: the names of its columns; JSON Lines: the fields of the first row.
      header: CSV and TSV: the header line as it stands in the file.
      schema: Parquet and Arrow: the types of the columns.
      num_rows: Parquet: the number of rows; None for the other formats.
    """

    path: Path
    kind: str
    columns: tuple[str, ...]
    header: str = ""
    schema: pyarrow.Schema | None = None
    num_rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the input.

    Attributes:
      index: the position of the chunk, from 0.
      texts: the texts of the rows that can be classified.
      rows: these rows, as a list of `Row` or an Arrow batch.
      numbers: the numbers of these rows in the file, from 1.
      rejects: the other rows.
      digest: a hash of all rows of the chunk.
    """

    index: int
    texts: list[str]
    rows: list[Row] | pyarrow.RecordBatch
    numbers: list[int]
    rejects: list[RejectedRow]
    digest: str

    def without(self, failed: dict[int, str]) -> Chunk:
        """The chunk with the texts at some positions moved to its rejects, for the reasons given."""
        if not failed:
            return self
        kept = [i for i in range(len(self.texts)) if i not in failed]
        rows = [self.rows[i] for i in kept] if isinstance(self.rows, list) else _take(self.rows, kept)
        rejects = sorted([*self.rejects, *(RejectedRow(self.numbers[i], reason) for i, reason in failed.items())])
        texts, numbers = [self.texts[i] for i in kept], [self.numbers[i] for i in kept]
        return dataclasses.replace(self, texts=texts, rows=rows, numbers=numbers, rejects=rejects)


@contextlib.contextmanager
def open_chunks(path: Path, *, kind: str | None, text_column: str) -> Iterator[tuple[Table, Iterator[Chunk]]]:
    """The input's columns, and its rows in chunks of at most `BATCH_ROWS`.

    Args:
      path: the file, or `PIPE`.
      kind: the format of a pipe; None is JSON Lines.
      text_column: the column of the texts.

    Raises:
      InputError: the file cannot be read, also while the chunks are; it has no rows, or no such column.
    """
    if kind_of(path, kind) in ("parquet", "arrow"):
        with open_batches(path) as (schema, batches, num_rows):
            columns = tuple(schema.names)
            check_column(Row(dict.fromkeys(columns), str(path)), text_column, "--text-column")
            table = Table(path, kind_of(path), columns, schema=schema, num_rows=num_rows)
            yield table, _columnar_chunks(path, batches, text_column)
        return
    header: list[str] = []
    bad: list[InputError] = []
    rows = read_rows(path, bad.append, kind=kind, on_header=lambda _, raw: header.append(raw))
    first = next(rows, None)
    if first is None:
        reason = f": {bad[0]}" if bad else "; at least one row of text was expected."
        raise InputError(f"{name_of(path)} has no row that can be read{reason}")
    check_column(first, text_column, "--text-column")
    table = Table(path, kind_of(path, kind), tuple(first.fields), header="".join(header))
    yield table, _text_chunks(itertools.chain([first], rows), bad, text_column)


def _text_chunks(rows: Iterator[Row], bad: list[InputError], text_column: str) -> Iterator[Chunk]:
    """Chunks of rows that were read from text; `bad` holds the errors of rows before the next one."""
    number, index = 0, itertools.count()
    kept: list[Row] = []
    texts: list[str] = []
    numbers: list[int] = []
    rejects: list[RejectedRow] = []
    digest, chars = hashlib.blake2b(digest_size=8), 0

    def chunk() -> Chunk:
        nonlocal kept, texts, numbers, rejects, digest, chars
        done = Chunk(next(index), texts, kept, numbers, rejects, digest.hexdigest())
        kept, texts, numbers, rejects, digest, chars = [], [], [], [], hashlib.blake2b(digest_size=8), 0
        return done

    def take_bad() -> None:
        nonlocal number
        for error in bad:
            number += 1
            rejects.append(RejectedRow(number, str(error)))
            digest.update(str(error).encode(errors="replace"))
        bad.clear()

    for row in rows:
        take_bad()
        number += 1
        digest.update(row.raw.encode(errors="replace"))
        chars += len(row.raw)
        try:
            texts.append(text_of(row, text_column))
            kept.append(row)
            numbers.append(number)
        except InputError as error:
            rejects.append(RejectedRow(number, str(error)))
        if len(kept) + len(rejects) >= BATCH_ROWS or chars >= MAX_CHUNK_CHARS:
            yield chunk()
    take_bad()
    if kept or rejects:
        yield chunk()


def _columnar_chunks(path: Path, batches: Iterator[pyarrow.RecordBatch], text_column: str) -> Iterator[Chunk]:
    number = 0
    for index, batch in enumerate(batches):
        texts, kept, numbers, rejects = [], [], [], []
        for i, value in enumerate(batch.column(text_column).to_pylist()):
            number += 1
            try:
                texts.append(text_of(Row({text_column: value}, f"{path}, row {number}"), text_column))
                kept.append(i)
                numbers.append(number)
            except InputError as error:
                rejects.append(RejectedRow(number, str(error)))
        digest = hashlib.blake2b(repr(batch.to_pydict()).encode(errors="replace"), digest_size=8).hexdigest()
        yield Chunk(index, texts, _take(batch, kept) if rejects else batch, numbers, rejects, digest)


def _take(batch: Any, positions: list[int]) -> pyarrow.RecordBatch:
    import pyarrow

    return batch.take(pyarrow.array(positions, pyarrow.int64()))
