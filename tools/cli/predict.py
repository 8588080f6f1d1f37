"""The command `classer predict`: a file of texts in, the same file with predictions out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from classer.data.errors import InputError
from classer.data.files import disk_error
from classer.data.readers import data_file
from classer.data.tables import CODECS, PIPE, kind_of, name_of, suffix_of

from .arguments import TextsArguments, parse
from .connection import ConnectionArguments

if TYPE_CHECKING:
    from classer.tools.bulk.models import BulkModel, PrecisionOf
    from classer.tools.bulk.run import BulkJob

TextKind = Literal["csv", "tsv", "jsonl"]


@dataclasses.dataclass(frozen=True)
class PredictArguments(TextsArguments, ConnectionArguments):
    """
    Attributes:
      bundle: the bundle that classifies in this process; none with --server.
      out: a new file: CSV, TSV or JSONL (also with .gz or .zst) or Parquet; - for standard output. It has all columns
        of the input, and `label` and `score` (of a multilabel task `labels`) and `truncated`.
      server: a running `classer serve` that classifies, HOST:PORT.
      input_format: the format of standard input.
      output_format: the format of standard output; by default the input's.
      rejects: a new file for the rows that cannot be classified, with the reason; by default OUT.rejects.jsonl.
      task: name of the task; needed only if the model has several.
      threshold: the score from which a label is chosen, 0 to 1, instead of the model's own thresholds.
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all.
      precision: what the bundle is computed in; auto measures which is fastest for each length of text.
      all_scores: also append `scores`, an object with the score of every label.
      prefix: the start of the appended columns' names, such as predicted_.
      runner: run on Apache Beam: the name of a runner and its options, such as "FlinkRunner --parallelism=8", or
        DirectRunner for this machine. Every worker must reach all files under the same paths.
    """

    bundle: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="BUNDLE")] = None
    out: Path = dataclasses.field(default=tyro.MISSING, kw_only=True)
    server: str | None = None
    input_format: TextKind | None = None
    output_format: TextKind | None = None
    rejects: Path | None = None
    task: str | None = None
    threshold: float | None = None
    focus: str | None = None
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    all_scores: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    prefix: str = ""
    runner: str | None = None

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.server is None):
            raise InputError("classer predict needs a bundle, or --server HOST:PORT, and not both.")
        if self.server is not None and ":" not in self.server:
            raise InputError(f"--server is '{self.server}'; an address is HOST:PORT, such as localhost:50051.")
        if self.server is not None and self.precision != "auto":
            raise InputError("--precision is a bundle's; a server was started with its own.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold:g}; a score lies between 0 and 1.")
        for option, kind, path in (
            ("--input-format", self.input_format, self.data),
            ("--output-format", self.output_format, self.out),
        ):
            if kind is not None and path != PIPE:
                raise InputError(f"{option} is of a pipe (-); the suffix of {path} says its format.")
        if self.out != PIPE and (suffix_of(self.out) is None or kind_of(self.out) == "arrow"):
            known = [f".{kind}{codec and '.'}{codec}" for codec in CODECS for kind in ("csv", "tsv", "jsonl")]
            raise InputError(f"--out is {self.out}; its name must end in one of {', '.join([*known, '.parquet'])}.")
        if self.runner is not None and PIPE in (self.data, self.out):
            raise InputError("--runner needs files; a pipe is read and written by one process.")


def predict(argv: Sequence[str]) -> None:
    """Classify a file of texts: every column is kept, predictions are appended.

    The same command continues a run that was killed.
    """
    a: PredictArguments = parse(PredictArguments, argv, "classer predict", predict.__doc__)
    job = _job(a)
    started = time.monotonic()
    try:
        counts = _predict(a, job)
    except BrokenPipeError:
        print("classer: the reader of standard output stopped; the rest was not classified.", file=sys.stderr)
        raise
    except (OSError, InputError) as e:
        reason = disk_error(e) or disk_error(e.__cause__ or e)
        if reason is None:
            raise
        kept = "" if job.out == PIPE else f" Finished rows stay in {job.out}.part, and the same command goes on."
        raise InputError(f"{_shown(job.out)} could not be written: {reason[0].lower()}{reason[1:]}.{kept}") from None
    seconds = time.monotonic() - started
    print(f"{counts.rows:,} rows classified in {seconds:,.1f} s: {_shown(job.out)}", file=sys.stderr)
    if counts.rejected:
        where = f"; {job.rejects} says why" if job.rejects is not None else "; --rejects FILE takes them"
        print(f"{counts.rejected:,} row{'s' * (counts.rejected != 1)} could not be classified{where}", file=sys.stderr)


def _predict(a: PredictArguments, job: BulkJob) -> Any:
    from classer.tools.bulk.run import predict_to_file, predict_to_pipe

    make_model = functools.partial(_model, a)
    if a.runner is not None:
        from classer.tools.bulk.on_beam import predict_on_beam

        return predict_on_beam(job, make_model, a.precision, a.runner)
    if job.out == PIPE:
        return predict_to_pipe(job, make_model, _progress)
    return predict_to_file(job, make_model, a.precision, _progress)


def _job(a: PredictArguments) -> BulkJob:
    from classer.tools.bulk.models import BulkOptions
    from classer.tools.bulk.run import BulkJob

    rejects = a.rejects
    if rejects is None and a.out != PIPE:
        rejects = a.out.with_name(a.out.name + ".rejects.jsonl")
    return BulkJob(
        data=data_file(a.data, a.split),
        out=a.out,
        rejects=rejects,
        input_kind=a.input_format,
        output_kind=a.output_format,
        text_column=a.text_column,
        prefix=a.prefix,
        options=BulkOptions(a.task, a.threshold, a.focus, a.all_scores),
    )


def _model(a: PredictArguments, precision_of: PrecisionOf) -> BulkModel:
    from classer.tools.bulk.models import BundleModel, ServerModel

    options = _job(a).options
    if a.server is None:
        assert a.bundle is not None
        return BundleModel(a.bundle, options, a.precision, precision_of)
    from classer.serve.client.client import Client

    tls, key = a.connect_with()
    return ServerModel(Client(a.server, tls=tls, key=key), options)


@contextlib.contextmanager
def _progress(num_rows: int | None) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=num_rows, unit=" rows", mininterval=1, file=sys.stderr) as bar:
        yield bar


def _shown(path: Path) -> str:
    return "standard output" if path == PIPE else shlex.quote(name_of(path))
