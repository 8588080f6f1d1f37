"""The output of `classer predict`: a chunk and its predictions as bytes, in each format."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from classer.data.errors import InputError
from classer.data.tables import PIPE, Row, import_pyarrow, kind_of, read_rows, suffix_of

from .chunks import Chunk, Table
from .predictions import PredictedColumns, Predictions

if TYPE_CHECKING:
    import pyarrow

# Rows of one row group of a Parquet file, at least.
ROW_GROUP = 1 << 16
OUTPUT_KINDS = ("csv", "tsv", "jsonl", "parquet")
_DELIMITERS = {"csv": ",", "tsv": "\t"}


class OutputFormat(Protocol):
    """A format that is written chunk by chunk."""

    def encode(self, chunk: Chunk, predictions: Predictions) -> bytes:
        """The part of the file that holds a chunk.

        Raises:
          InputError: the format cannot hold a row.
        """
        ...

    def assemble(self, parts: Iterable[Path], file: BinaryIO) -> None:
        """Writes the whole file from all parts in order."""
        ...


def output_for(path: Path, kind: str | None, table: Table, columns: PredictedColumns) -> OutputFormat:
    """The format of an output file.

    Args:
      path: the file, or `PIPE`.
      kind: the format of a pipe; None is the input's, where that is a format of text, else JSON Lines.
      table: the input.
      columns: what is appended to its columns.

    Raises:
      InputError: the input has a column of an appended name; rows of JSON Lines have no common schema for Parquet.
    """
    columns.check_free(table.columns, str(table.path))
    if path == PIPE:
        kind, codec = kind or (table.kind if table.kind in ("csv", "tsv") else "jsonl"), ""
    else:
        kind, codec = kind_of(path), (suffix_of(path) or "").split(".")[2:]
        codec = codec[0] if codec else ""
    if kind == "parquet":
        return ParquetOutput(table, columns)
    return TextOutput(kind, codec, table, columns)


class TextOutput:
    """CSV, TSV and JSON Lines. From the same format, every row keeps its own characters.

    Args:
      kind: "csv", "tsv" or "jsonl".
      codec: "", "gz" or "zst": each part is a member or frame of its own, which these formats let follow one another.
      table: the input.
      columns: what is appended to its columns.
    """

    def __init__(self, kind: str, codec: str, table: Table, columns: PredictedColumns) -> None:
        self._kind, self._codec, self._table, self._columns = kind, codec, table, columns

    def encode(self, chunk: Chunk, predictions: Predictions) -> bytes:
        values = self._columns.values(predictions)
        same = self._kind == self._table.kind
        if self._kind == "jsonl":
            lines = self._json_lines(_rows(chunk), values, same)
        else:
            lines = self._csv_lines(_rows(chunk), values, same)
            if chunk.index == 0:
                names = _cells(self._columns.names, self._kind)
                own = [self._table.header] if same else [_cells(self._table.columns, self._kind)]
                lines = [_spliced(own[0], names, self._kind), *lines]
        return self._compress("".join(lines).encode())

    def assemble(self, parts: Iterable[Path], file: BinaryIO) -> None:
        for part in parts:
            with part.open("rb") as source:
                while data := source.read(1 << 20):
                    file.write(data)

    def _json_lines(self, rows: Iterable[Row], values: Sequence[tuple[Any, ...]], same: bool) -> list[str]:
        lines = []
        for row, appended in zip(rows, values, strict=True):
            self._columns.check_free(tuple(row.fields), row.source)
            predicted = _json(dict(zip(self._columns.names, appended, strict=True)))
            own = row.raw.strip() if same else _json(row.fields)
            comma = ", " if row.fields else ""
            lines.append(f"{own[:-1].rstrip()}{comma}{predicted[1:]}\n")
        return lines

    def _csv_lines(self, rows: Iterable[Row], values: Sequence[tuple[Any, ...]], same: bool) -> list[str]:
        lines = []
        for row, appended in zip(rows, values, strict=True):
            cells = _cells(map(_cell, appended), self._kind)
            if same:
                lines.append(_spliced(row.raw, cells, self._kind))
                continue
            if unknown := row.fields.keys() - set(self._table.columns):
                raise InputError(
                    f"{row.source}: the field '{min(unknown)}' is not in the first row, so that the header lacks it; "
                    "write JSON Lines."
                )
            own = _cells((_cell(row.fields.get(column)) for column in self._table.columns), self._kind)
            lines.append(_spliced(own, cells, self._kind))
        return lines

    def _compress(self, data: bytes) -> bytes:
        if self._codec == "gz":
            return gzip.compress(data, 6, mtime=0)
        if self._codec == "zst":
            return import_pyarrow("Writing zstd").compress(data, codec="zstd", asbytes=True)
        return data


class ParquetOutput:
    """Parquet. Columns of Parquet and Arrow keep their types, those of CSV are strings.

    Args:
      table: the input. JSON Lines in a file are read once more, to find types that hold all rows.
      columns: what is appended to its columns.

    Raises:
      InputError: JSON Lines have a field of two types.
    """

    def __init__(self, table: Table, columns: PredictedColumns) -> None:
        import_pyarrow("Writing Parquet")
        self._table, self._columns = table, columns
        own = table.schema
        if table.kind in _DELIMITERS:
            own = self._pa.schema([(column, self._pa.string()) for column in table.columns])
        elif own is None and table.path == PIPE:
            raise InputError("Parquet needs the types of all rows, which a pipe does not tell; write JSON Lines.")
        self._own: pyarrow.Schema = self._schema_of_json(table.path) if own is None else own

    @property
    def _pa(self) -> Any:
        return import_pyarrow("Writing Parquet")  # not kept, so that this can be pickled

    def encode(self, chunk: Chunk, predictions: Predictions) -> bytes:
        table = self._own_columns(chunk)
        appended = list(zip(*self._columns.values(predictions), strict=True)) or [() for _ in self._columns.names]
        schema = self._columns.schema(table.schema)
        arrays = [
            self._pa.array(column, schema.field(name).type)
            for name, column in zip(self._columns.names, appended, strict=True)
        ]
        whole = self._pa.Table.from_arrays([*table.columns, *arrays], schema=schema)
        buffer = io.BytesIO()
        self._pa.parquet.write_table(whole, buffer)
        return buffer.getvalue()

    def assemble(self, parts: Iterable[Path], file: BinaryIO) -> None:
        writer, waiting = None, []
        for part in parts:
            waiting.append(self._pa.parquet.read_table(part, partitioning=None))
            writer = writer or self._pa.parquet.ParquetWriter(file, waiting[0].schema)
            if sum(map(len, waiting)) >= ROW_GROUP:
                writer.write_table(self._pa.concat_tables(waiting), row_group_size=ROW_GROUP)
                waiting = []
        if writer is not None:
            if waiting:
                writer.write_table(self._pa.concat_tables(waiting), row_group_size=ROW_GROUP)
            writer.close()

    def _own_columns(self, chunk: Chunk) -> pyarrow.Table:
        if not isinstance(chunk.rows, list):
            return self._pa.Table.from_batches([chunk.rows], self._own)
        rows = [row.fields for row in chunk.rows]
        return self._pa.Table.from_pylist(rows, schema=self._own)

    def _schema_of_json(self, path: Path) -> pyarrow.Schema:
        schema = self._pa.schema([])
        rows: list[Row] = []
        for row in read_rows(path, lambda _: None):
            rows.append(row)
            if len(rows) == ROW_GROUP // 8:
                schema, rows = self._schema_of(rows, schema), []
        return self._schema_of(rows, schema)

    def _schema_of(self, rows: Sequence[Row], before: pyarrow.Schema) -> pyarrow.Schema:
        """The types that hold these rows and those before."""
        names = dict.fromkeys(name for row in rows for name in row.fields)
        self._columns.check_free(tuple(names), str(self._table.path))
        fields = []
        for name in names:
            try:
                found = self._pa.array([row.fields.get(name) for row in rows]).type
            except (self._pa.ArrowException, OverflowError) as e:
                raise self._mixed(name, str(e)) from None
            fields.append((name, found))
        found = self._pa.schema(fields)
        try:
            return self._pa.unify_schemas([before, found], promote_options="permissive")
        except self._pa.ArrowException as e:
            raise self._mixed("", str(e)) from None

    def _mixed(self, name: str, error: str) -> InputError:
        field = f"the field '{name}' holds values" if name else "a field holds values"
        first_line = error.splitlines()[0].rstrip(".")
        return InputError(f"{self._table.path}: {field} of several types ({first_line}); write JSON Lines.")


def _rows(chunk: Chunk) -> Iterable[Row]:
    if isinstance(chunk.rows, list):
        return chunk.rows
    return [Row(fields, "") for fields in chunk.rows.to_pylist()]


def _spliced(own: str, appended: str, kind: str) -> str:
    """A CSV record with cells appended; it keeps its line's end."""
    bare = own.rstrip("\r\n")
    return f"{bare}{_DELIMITERS[kind]}{appended}{own[len(bare) :] or chr(10)}"


def _cells(values: Iterable[str], kind: str) -> str:
    line = io.StringIO()
    # The module quotes cells with characters of the line's end, so that it must be named and taken off again.
    csv.writer(line, delimiter=_DELIMITERS[kind], lineterminator="\r\n").writerow(values)
    return line.getvalue()[:-2]


def _cell(value: Any) -> str:
    """A value as a cell of CSV: names of labels with '|' between them, as `read_examples` takes them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "|".join(value)
    return _json(value) if isinstance(value, bool | int | float | list | dict) else str(_plain(value))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """What JSON can hold of a value of Parquet: NaN as null, bytes in Base64, dates and decimals as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
