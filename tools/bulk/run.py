"""`classer predict` in one process. Reading with tokenising, prediction and writing overlap, a thread each."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .chunks import Chunk, open_chunks
from .models import BulkModel, BulkOptions, PrecisionOf
from .output import output_for
from .parts import Parts
from .predictions import PredictedColumns, Predictions

MakeModel = Callable[[PrecisionOf], BulkModel]
# Rejects that are printed where there is no file for them.
SHOWN_REJECTS = 5


@dataclasses.dataclass(frozen=True)
class BulkJob:
    """A bulk prediction: input, output and options.

    Attributes:
      data: the input file, or `PIPE`.
      out: the output file, or `PIPE`.
      rejects: the file for rows that cannot be classified; None prints the first of them on stderr.
      input_kind, output_kind: the formats of pipes. By default the input is JSON Lines and the output has its format.
      text_column: the column of the texts.
      prefix: the start of the appended columns' names.
      options: options of the prediction.
    """

    data: Path
    out: Path
    rejects: Path | None
    input_kind: str | None = None
    output_kind: str | None = None
    text_column: str = "text"
    prefix: str = ""
    options: BulkOptions = dataclasses.field(default_factory=BulkOptions)

    def columns(self, model: BulkModel) -> PredictedColumns:
        """The columns that are appended for this model."""
        return PredictedColumns(model.multilabel, model.labels if self.options.all_scores else (), self.prefix)

    def fingerprint(self, model: BulkModel, precision: str) -> dict[str, Any]:
        """Everything that determines the output, except the rows of the input."""
        own = {"text_column": self.text_column, "prefix": self.prefix, "precision": precision, "model": model.version}
        return {**own, **dataclasses.asdict(self.options)}


class Counts(NamedTuple):
    """Rows that were classified, and rejected."""

    rows: int
    rejected: int


def predict_to_file(job: BulkJob, make_model: MakeModel, precision: str, progress: Any) -> Counts:
    """Writes the output, continuing after the chunks that an earlier run finished.

    Args:
      job: with a file as its `out`.
      make_model: loads the model.
      precision: the value of --precision, for the fingerprint.
      progress: makes a progress bar of the number of rows of the input, if that is known.

    Raises:
      InputError: the input, the output or the model cannot be used. Finished chunks stay in `OUT.part`.
    """
    assert job.rejects is not None
    parts = Parts(job.out, job.rejects)
    parts.check()

    def write(chunk: Chunk, predictions: Predictions) -> None:
        parts.put(chunk, output.encode(chunk, predictions))
        bar.update(len(chunk.texts) + len(chunk.rejects))

    with (
        open_chunks(job.data, kind=job.input_kind, text_column=job.text_column) as (table, chunks),
        contextlib.closing(make_model(parts.precision_of)) as model,
    ):
        output = output_for(job.out, job.output_kind, table, job.columns(model))
        with parts.opened(job.fingerprint(model, precision)):
            with progress(table.num_rows) as bar:
                _pipeline(_unfinished(chunks, parts, bar), model, write)
            return Counts(*parts.finish(output))


def predict_to_pipe(job: BulkJob, make_model: MakeModel, progress: Any) -> Counts:
    """Writes the predictions to standard output, chunk by chunk.

    Raises:
      InputError: the input or the model cannot be used.
      BrokenPipeError: the reader has stopped.
    """
    rows = rejected = 0

    def write(chunk: Chunk, predictions: Predictions) -> None:
        nonlocal rows, rejected
        sys.stdout.buffer.write(output.encode(chunk, predictions))
        sys.stdout.buffer.flush()
        for reject in chunk.rejects[: max(SHOWN_REJECTS - rejected, 0)]:
            print(f"Left out: {reject.reason}", file=sys.stderr)
        rows, rejected = rows + len(chunk.texts), rejected + len(chunk.rejects)
        bar.update(len(chunk.texts) + len(chunk.rejects))

    with (
        open_chunks(job.data, kind=job.input_kind, text_column=job.text_column) as (table, chunks),
        contextlib.closing(make_model(lambda bucket, chosen: chosen)) as model,
        progress(table.num_rows) as bar,
    ):
        output = output_for(job.out, job.output_kind, table, job.columns(model))
        _pipeline(chunks, model, write)
    return Counts(rows, rejected)


def _unfinished(chunks: Iterator[Chunk], parts: Parts, bar: Any) -> Iterator[Chunk]:
    """The chunks that no earlier run has finished."""
    for chunk in chunks:
        part = parts.find(chunk.index, chunk.digest)
        if part is None:
            yield chunk
        else:
            bar.initial += part.rows + part.rejected  # excluded from the rate of this run
            bar.n += part.rows + part.rejected


def _pipeline(chunks: Iterator[Chunk], model: BulkModel, write: Callable[[Chunk, Predictions], None]) -> None:
    """Predicts and writes all chunks, in order.

    One thread reads and tokenises the next chunk, another writes the previous one.
    """

    def read() -> tuple[Chunk, Any] | None:
        chunk = next(chunks, None)
        return None if chunk is None else (chunk, model.prepare(chunk.texts))

    def finish(chunk: Chunk, predictions: Predictions) -> None:
        write(chunk.without(predictions.failed), predictions.without_failed())

    with ThreadPoolExecutor(1, "classer-read") as reader, ThreadPoolExecutor(1, "classer-write") as writer:
        written: Future[None] | None = None
        ahead = reader.submit(read)
        while (prepared := ahead.result()) is not None:
            ahead = reader.submit(read)
            chunk, inputs = prepared
            predictions = model.predict(inputs)
            if written is not None:
                written.result()
            written = writer.submit(finish, chunk, predictions)
        if written is not None:
            written.result()


def predict_chunk(chunk: Chunk, model: BulkModel) -> tuple[Chunk, Predictions]:
    """A chunk without the texts that the model failed on, and the predictions of the others."""
    predictions = model.predict(model.prepare(chunk.texts))
    return chunk.without(predictions.failed), predictions.without_failed()
