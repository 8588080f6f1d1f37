"""The loop of `classer predict` in one process: read and tokenise, predict, write, each while the others work."""

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
# How many rejects are shown where no file takes them.
SHOWN_REJECTS = 5


@dataclasses.dataclass(frozen=True)
class BulkJob:
    """What to predict, and where to.

    Attributes:
      data: the input file, or `PIPE`.
      out: the output file, or `PIPE`.
      rejects: the file of the rows that cannot be classified; None shows some of them on stderr.
      input_kind, output_kind: the formats of pipes; None is JSON Lines, and for the output the input's.
      text_column: the column of the texts.
      prefix: what the names of the appended columns begin with.
      options: what to ask of each text.
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
        """The columns that the model's predictions become."""
        return PredictedColumns(model.multilabel, model.labels if self.options.all_scores else (), self.prefix)

    def fingerprint(self, model: BulkModel, precision: str) -> dict[str, Any]:
        """All that the output depends on but the rows of the input."""
        own = {"text_column": self.text_column, "prefix": self.prefix, "precision": precision, "model": model.version}
        return {**own, **dataclasses.asdict(self.options)}


class Counts(NamedTuple):
    """Rows that were classified, and rejected."""

    rows: int
    rejected: int


def predict_to_file(job: BulkJob, make_model: MakeModel, precision: str, progress: Any) -> Counts:
    """Writes the whole output, going on with what an earlier run has finished.

    Args:
      job: what and where to; `out` is a file.
      make_model: loads the model.
      precision: as the model was asked to compute, for the fingerprint.
      progress: called with the number of rows of the input, if it is known; the bar has `update(rows)`.

    Raises:
      InputError: the input, the output or the model cannot be used. What is finished stays in `OUT.part`.
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
    """Writes predictions to standard output as they are made.

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
            bar.initial += part.rows + part.rejected  # not of this run's rate
            bar.n += part.rows + part.rejected


def _pipeline(chunks: Iterator[Chunk], model: BulkModel, write: Callable[[Chunk, Predictions], None]) -> None:
    """Predicts and writes all chunks, in order. One thread reads and tokenises the next, another writes the last."""

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
