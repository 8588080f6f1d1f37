"""Bulk prediction as an Apache Beam pipeline, for inputs that take too long on one machine.

One worker reads the file; all workers classify chunks and write them into `OUT.part`. The driver assembles the output,
which has the same bytes as that of one process.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

from classer.data.prepare.on_beam import beam, beam_options

from .chunks import Chunk, open_chunks
from .models import BulkModel
from .output import OutputFormat, output_for
from .parts import Parts
from .run import BulkJob, Counts, MakeModel, predict_chunk


def predict_on_beam(job: BulkJob, make_model: MakeModel, precision: str, runner: str) -> Counts:
    """As `run.predict_to_file`.

    Args:
      job, make_model, precision: see there; both must be picklable.
      runner: the name of Beam's runner, and its options.

    Raises:
      InputError: as `run.predict_to_file`; or Beam is not installed.
    """
    assert job.rejects is not None
    parts = Parts(job.out, job.rejects)
    parts.check()
    with (
        open_chunks(job.data, kind=job.input_kind, text_column=job.text_column) as (table, _),
        contextlib.closing(make_model(parts.precision_of)) as model,
    ):
        output = output_for(job.out, job.output_kind, table, job.columns(model))
        fingerprint = job.fingerprint(model, precision)
    with parts.opened(fingerprint):
        with beam.Pipeline(options=beam_options(runner)) as pipeline:
            _ = (
                pipeline
                | "input" >> beam.Create([job])
                | "read" >> beam.ParDo(_Read(parts))
                | "spread" >> beam.Reshuffle()
                | "classify" >> beam.ParDo(_Classify(job, parts, make_model, output))
            )
        return Counts(*parts.finish(output))


class _Read(beam.DoFn):
    """The chunks that no earlier run has finished."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def process(self, job: BulkJob) -> Iterator[bytes]:
        with open_chunks(job.data, kind=job.input_kind, text_column=job.text_column) as (_, chunks):
            for chunk in chunks:
                if self._parts.find(chunk.index, chunk.digest) is None:
                    yield pickle.dumps(chunk)


class _Classify(beam.DoFn):
    """Predicts a chunk and writes its part."""

    def __init__(self, job: BulkJob, parts: Parts, make_model: MakeModel, output: OutputFormat) -> None:
        self._job, self._parts, self._make_model, self._output = job, parts, make_model, output
        self._model: BulkModel | None = None

    def setup(self) -> None:
        self._model = self._make_model(self._parts.precision_of)

    def process(self, pickled: bytes) -> None:
        chunk: Chunk = pickle.loads(pickled)
        assert self._model is not None
        done, predictions = predict_chunk(chunk, self._model)
        self._parts.put(done, self._output.encode(done, predictions))

    def teardown(self) -> None:
        if self._model is not None:
            self._model.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}
