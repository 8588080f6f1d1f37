"""The preparation of `local` as an Apache Beam pipeline, for inputs that are too large for one machine.

The steps call the same functions as `local`, and the shards, rejects and manifest are identical byte for byte. Beam
moves rows between workers. The workers write shards and small JSON files to the output folder, and the driver collects
them at the end. So the inputs and that folder must have the same paths on all workers and on the driver.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..extras import missing_packages
from ..files import atomic_write
from ..splits import comparable
from ..tokenizer import WordPieceTokenizer
from .contamination import EvaluationIndex
from .local import CHUNK, ProgressCallback, begin, evaluation_index
from .minhash import bucket_links, sketch
from .output import Shard, finish, write_shard
from .plan import PreparePlan, read_manifest
from .sources import Reject, read_source
from .steps import (
    Dropped,
    LabelCounts,
    SourceRow,
    TokenizedRow,
    exact_key,
    num_shards_for,
    place_of,
    shard_number,
    split_of,
    task_from_counts,
    tokenize_rows,
)

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.pvalue import AsSingleton, TaggedOutput
except ImportError:
    raise missing_packages(
        "--runner", "apache-beam (without --runner the same runs in this process)", "prepare"
    ) from None

# Beam's default, DirectRunner, would download another runner.
IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner"


def beam_options(runner: str) -> PipelineOptions:
    """Parses a runner's name and options, such as "FlinkRunner --parallelism=8", into Beam's pipeline options.

    "DirectRunner" is Beam's runner in this process.
    """
    name, *options = runner.split()
    return PipelineOptions([f"--runner={IN_PROCESS if name == 'DirectRunner' else name}", *options])


def prepare(plan: PreparePlan, *, runner: str, progress: ProgressCallback) -> tuple[dict[str, Any], bool]:
    """Like `local.prepare`, as a Beam pipeline.

    Args:
      plan: inputs, config and output folder.
      runner: see `beam_options`.
      progress: called for the stages before and after the pipeline; the runner itself reports those inside it.

    Raises:
      InputError: as `local.prepare`.
    """
    inputs, made = begin(plan, progress)
    if made:
        return read_manifest(plan.out), False
    evaluation_index(plan).save(plan.work / "evaluation.npz")
    (plan.work / "parts").mkdir()
    with progress("the pipeline", "runs", 1) as bar:
        with beam.Pipeline(options=beam_options(runner)) as pipeline:
            build(pipeline, plan)
        bar.update(1)
    return _gather(plan, inputs), True


def build(pipeline: beam.Pipeline, plan: PreparePlan) -> None:
    """Adds all steps to a pipeline, which writes its results to `plan.out`."""
    config = plan.config
    read = (
        pipeline
        | "files" >> beam.Create(list(range(len(plan.sources))))
        | "spread" >> beam.Reshuffle()
        | "read" >> beam.ParDo(_Read(plan)).with_outputs("rejects", main="rows")
    )
    equal = (
        read.rows
        | "by text" >> beam.Map(lambda row: (exact_key(row), row)).with_output_types(tuple[bytes, Any])
        | "meet" >> beam.GroupByKey()
        | "first of equals" >> beam.ParDo(_first_of_equals).with_outputs("dropped", main="rows")
    )
    compared = (
        equal.rows
        | "chunk" >> beam.BatchElements(min_batch_size=64, max_batch_size=CHUNK)
        | "compare" >> beam.ParDo(_Compare(plan)).with_outputs("dropped", "bands", main="rows")
    )
    links = (
        compared.bands
        | "by band" >> beam.GroupByKey()
        | "link" >> beam.FlatMap(_links, config.near_duplicates)
        | "first link" >> beam.CombinePerKey(min)
    )
    near = (
        {
            "row": compared.rows
            | "by rank" >> beam.Map(lambda row: (row.rank, row)).with_output_types(tuple[int, Any]),
            "link": links,
        }
        | "join" >> beam.CoGroupByKey()
        | "near-duplicates" >> beam.ParDo(_drop_linked).with_outputs("dropped", main="rows")
    )
    labels = (
        near.rows
        | "labels" >> beam.Map(lambda row: ((row.task, split_of(row.text_hash, config.dev_fraction)), row.labels))
        | "count labels" >> beam.CombinePerKey(_CountLabels())
    )
    summary = labels | "summary" >> beam.combiners.ToDict()
    _ = summary | "write summary" >> beam.Map(_write_summary, plan)
    _ = (
        near.rows
        | "chunk rows" >> beam.BatchElements(min_batch_size=64, max_batch_size=CHUNK)
        | "tokenise" >> beam.ParDo(_Tokenize(plan), AsSingleton(summary))
        | "by shard" >> beam.GroupByKey()
        | "write shards" >> beam.Map(_write_shard, plan)
    )
    _ = (
        (read.rejects, equal.dropped, compared.dropped, near.dropped)
        | "left out" >> beam.Flatten()
        | "by file" >> beam.Map(_by_file).with_output_types(tuple[int, Any])
        | "of a file" >> beam.GroupByKey()
        | "write left out" >> beam.Map(_write_left_out, plan)
    )


class _Read(beam.DoFn):
    def __init__(self, plan: PreparePlan) -> None:
        self._plan = plan

    def process(self, file: int) -> Iterator[Any]:
        source = self._plan.sources[file]
        task = self._plan.task_names.index(source.task)
        for row in read_source(file, source, task, self._plan.columns):
            yield TaggedOutput("rejects", row) if isinstance(row, Reject) else row


def _first_of_equals(keyed: tuple[bytes, Iterable[SourceRow]]) -> Iterator[Any]:
    first, *others = sorted(keyed[1], key=lambda row: row.rank)
    yield first
    for row in others:
        yield TaggedOutput("dropped", Dropped(row.rank, "duplicate", first.rank, 1.0))


class _Compare(beam.DoFn):
    def __init__(self, plan: PreparePlan) -> None:
        self._plan = plan

    def setup(self) -> None:
        self._index = EvaluationIndex.load(self._plan.work / "evaluation.npz")

    def process(self, rows: list[SourceRow]) -> Iterator[Any]:
        plain = [comparable(row.text) for row in rows]
        sketches = sketch(plain, self._plan.band_rows)
        found = self._index.find(rows, plain, sketches)
        for i, (row, drop) in enumerate(zip(rows, found, strict=True)):
            if drop is not None:
                yield TaggedOutput("dropped", drop)
                continue
            yield row
            if self._plan.config.near_duplicates:
                task = row.task.to_bytes(2, "big")
                for band in sketches.bands_NB[i]:
                    member = (row.rank, sketches.bytes_NP[i].tobytes())
                    yield TaggedOutput("bands", (task + band.tobytes(), member))


def _links(bucket: tuple[bytes, Iterable[tuple[int, bytes]]], threshold: float) -> Iterator[Any]:
    members = sorted(bucket[1])
    if len(members) > 1:
        ranks = np.array([rank for rank, _ in members])
        sketches = np.frombuffer(b"".join(data for _, data in members), np.uint8).reshape(len(members), -1)
        for rank, of, alike in bucket_links(ranks, sketches, threshold):
            yield rank, (of, -alike)


def _drop_linked(joined: tuple[int, dict[str, Iterable[Any]]]) -> Iterator[Any]:
    rank, sides = joined
    (row,), link = list(sides["row"]), list(sides["link"])
    if link:
        of, alike = link[0]
        yield TaggedOutput("dropped", Dropped(rank, "near-duplicate", of, -alike))
    else:
        yield row


class _CountLabels(beam.CombineFn):
    def create_accumulator(self) -> LabelCounts:
        return LabelCounts()

    def add_input(self, counts: LabelCounts, labels: Sequence[str]) -> LabelCounts:
        counts.add(labels)
        return counts

    def merge_accumulators(self, accumulators: Iterable[LabelCounts]) -> LabelCounts:
        merged = LabelCounts()
        for counts in accumulators:
            merged.merge(counts)
        return merged

    def extract_output(self, counts: LabelCounts) -> LabelCounts:
        return counts


_Summary = dict[tuple[int, str], LabelCounts]


def _tasks(plan: PreparePlan, summary: _Summary) -> tuple[list[Any], list[LabelCounts]]:
    known = {source.task: source.known for source in plan.sources}
    counts = [LabelCounts() for _ in plan.task_names]
    for (task, _), found in sorted(summary.items()):
        counts[task].merge(found)
    return [task_from_counts(n, known[n], c) for n, c in zip(plan.task_names, counts, strict=True)], counts


class _Tokenize(beam.DoFn):
    def __init__(self, plan: PreparePlan) -> None:
        self._plan = plan

    def setup(self) -> None:
        self._tokenizer = WordPieceTokenizer.from_folder(self._plan.tokenizer)
        self._tasks: list[Any] | None = None

    def process(self, rows: list[SourceRow], summary: _Summary) -> Iterator[Any]:
        config = self._plan.config
        if self._tasks is None:
            self._tasks, _ = _tasks(self._plan, summary)
            self._num_shards = {
                split: num_shards_for(
                    sum(found.rows for (_, of), found in summary.items() if of == split), config.records_per_shard
                )
                for split in ("train", "dev")
            }
        for row in tokenize_rows(rows, self._tasks, self._tokenizer, config.max_length, config.dev_fraction):
            count = self._num_shards[row.split]
            yield f"{row.split} {shard_number(row.key, count)} {count}", row


def _write_shard(keyed: tuple[str, Iterable[TokenizedRow]], plan: PreparePlan) -> None:
    split, index, count = keyed[0].split()
    shard = write_shard(plan.out, split, int(index), int(count), list(keyed[1]))
    _write_part(plan, f"shard-{split}-{index}", vars(shard))


def _write_summary(summary: _Summary, plan: PreparePlan) -> None:
    _, counts = _tasks(plan, summary) if summary else (None, [])
    _write_part(plan, "labels", [{**vars(c), "counts": dict(sorted(c.counts.items()))} for c in counts])


def _by_file(out: Reject | Dropped) -> tuple[int, Any]:
    return (place_of(out.rank)[0] if isinstance(out, Dropped) else out.file), out


def _write_left_out(keyed: tuple[int, Iterable[Reject | Dropped]], plan: PreparePlan) -> None:
    outs = list(keyed[1])
    rejects = sorted(dataclasses.astuple(out) for out in outs if isinstance(out, Reject))
    dropped = sorted(tuple(out) for out in outs if isinstance(out, Dropped))
    _write_part(plan, f"out-{keyed[0]:06d}", {"rejects": rejects, "dropped": dropped})


def _write_part(plan: PreparePlan, name: str, value: Any) -> None:
    # Shared, because Beam may process bundles in several workers.
    with atomic_write(plan.work / "parts" / f"{name}.json", shared=True) as part:
        part.write_text(json.dumps(value), encoding="utf-8")


def _gather(plan: PreparePlan, inputs: dict[str, Any]) -> dict[str, Any]:
    parts = plan.work / "parts"
    shards = [Shard(**_read_json(path)) for path in parts.glob("shard-*.json")]
    out = [_read_json(path) for path in sorted(parts.glob("out-*.json"))]
    rejects = [Reject(*fields) for part in out for fields in part["rejects"]]
    dropped = [Dropped(*fields) for part in out for fields in part["dropped"]]
    label_counts = [LabelCounts() for _ in plan.task_names]
    for counts, found in zip(label_counts, _read_json(parts / "labels.json"), strict=False):
        counts.rows, counts.least, counts.most = found["rows"], found["least"], found["most"]
        counts.counts.update(found["counts"])
    if not shards:
        raise InputError(f"No row can be used: {rejects[0].reason if rejects else 'the files are empty'}")
    known = {source.task: source.known for source in plan.sources}
    tasks = [task_from_counts(n, known[n], c) for n, c in zip(plan.task_names, label_counts, strict=True)]
    reasons = [drop.reason for drop in dropped]
    counts = {
        "read": sum(shard.records for shard in shards) + len(rejects) + len(dropped),
        "rejected": len(rejects),
        "duplicates": reasons.count("duplicate"),
        "contaminated": reasons.count("contaminated"),
        "near_duplicates": reasons.count("near-duplicate"),
    }
    return finish(plan, inputs, tasks, label_counts, counts, shards, rejects, dropped)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
