"""Preparation in this process: passes over files on disk, so that memory does not grow with the number of rows.

Rows that must be compared or grouped (equal texts, texts with a common band, the records of a shard) are first written
to partitions by hash. Then one partition at a time is loaded into memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from ..splits import comparable
from ..tokenizer import WordPieceTokenizer
from .contamination import EvaluationIndex
from .minhash import NUM_PERMUTATIONS, Sketches, bucket_links, sketch
from .output import SPLITS, Shard, already_made, clear, finish, write_shard
from .plan import PreparePlan, read_manifest
from .sources import Reject, read_evaluation, read_source
from .steps import (
    Dropped,
    LabelCounts,
    SourceRow,
    TokenizedRow,
    exact_key,
    num_shards_for,
    shard_number,
    split_of,
    task_from_counts,
    tokenize_rows,
)

CHUNK = 2048
_PARTITIONS = 128
_SPILL_BYTES = 32 << 20
_REASONS = ("", "duplicate", "contaminated", "near-duplicate")
_FATE = np.dtype([("reason", "u1"), ("similarity", "<f4"), ("of", "<u8")])
_KEYED = np.dtype([("key", "V18"), ("row", "<u8")])
_BANDED = np.dtype([("band", "<u8"), ("row", "<u8")])


class ProgressCallback(Protocol):
    """Starts a stage's progress bar from its name, its unit and its total (None if unknown); see `prepare`."""

    def __call__(self, stage: str, unit: str, total: int | None) -> contextlib.AbstractContextManager[Any]: ...


def prepare(plan: PreparePlan, *, workers: int = 1, progress: ProgressCallback) -> tuple[dict[str, Any], bool]:
    """Carries out a preparation: writes shards and manifest to `plan.out`.

    Args:
      plan: inputs, config and output folder.
      workers: processes that compare and tokenise texts; 1 for this process alone.
      progress: called at the start of each stage; the context manager it returns gives a bar with `update(n)`, as
        tqdm's have.

    Returns:
      The manifest, and whether it is new (False if `plan.out` already held the result of the same inputs).

    Raises:
      InputError: as `output.already_made` and `sources.read_source`; or no usable row is left.
    """
    inputs, made = begin(plan, progress)
    if made:
        return read_manifest(plan.out), False
    with _Passes(plan, workers, progress) as passes:
        passes.read()
        passes.drop_duplicates()
        passes.compare()
        passes.drop_near_duplicates()
        shards, tasks, label_counts = passes.write()
        return finish(
            plan, inputs, tasks, label_counts, passes.counts(), shards, passes.rejects(), passes.dropped()
        ), True


def begin(plan: PreparePlan, progress: ProgressCallback) -> tuple[dict[str, Any], bool]:
    """Checks for an earlier result, and removes the files of an interrupted run.

    Returns:
      `PreparePlan.inputs_json`, and whether `plan.out` already holds the complete result.
    """
    total = sum(path.stat().st_size for path in (*(s.path for s in plan.sources), *plan.evaluation))
    with progress("checksums", "B", total) as bar:
        inputs = plan.inputs_json(bar.update)
    inputs = json.loads(json.dumps(inputs))
    with progress("checking what is there", "B", None) as bar:
        if already_made(plan, inputs, bar.update):
            return inputs, True
    clear(plan)
    return inputs, False


def evaluation_index(plan: PreparePlan) -> EvaluationIndex:
    texts = read_evaluation(plan.evaluation, plan.columns)
    return EvaluationIndex.build(texts, plan.band_rows, plan.config.near_duplicates)


@dataclasses.dataclass
class _Spill:
    """Buffered appends to many files, which are opened only to flush."""

    folder: Path
    buffers: dict[str, bytearray] = dataclasses.field(default_factory=lambda: collections.defaultdict(bytearray))
    size: int = 0

    def add(self, name: str, data: bytes) -> None:
        self.buffers[name] += data
        self.size += len(data)
        if self.size > _SPILL_BYTES:
            self.flush()

    def flush(self) -> None:
        for name, data in self.buffers.items():
            with (self.folder / name).open("ab") as file:
                file.write(data)
        self.buffers.clear()
        self.size = 0

    def take(self, name: str) -> bytes:
        """Returns all flushed bytes of a name and removes its file."""
        path = self.folder / name
        data = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        return data


class _Passes:
    """The passes of a preparation, in the order of `prepare`. Rows are numbered by ascending rank."""

    def __init__(self, plan: PreparePlan, workers: int, progress: ProgressCallback) -> None:
        self._plan, self._progress = plan, progress
        self._spill = _Spill(plan.work)
        self._read = self._rejected = self._num_rows = 0
        self._tasks = {name: i for i, name in enumerate(plan.task_names)}
        self._workers = _Workers(plan, workers)

    def __enter__(self) -> _Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    def read(self) -> None:
        """Writes the usable rows to one file in order, and their exact keys to partitions."""
        with (
            (self._plan.work / "rows").open("wb") as rows,
            (self._plan.work / "ranks").open("wb") as ranks,
            (self._plan.work / "rejects").open("wb") as rejects,
            self._progress("reading", "rows", None) as bar,
        ):
            for file, source in enumerate(self._plan.sources):
                for row in read_source(file, source, self._tasks[source.task], self._plan.columns):
                    bar.update(1)
                    self._read += 1
                    if isinstance(row, Reject):
                        self._rejected += 1
                        rejects.write(json.dumps(dataclasses.astuple(row)).encode() + b"\n")
                        continue
                    rows.write(row.to_json())
                    ranks.write(row.rank.to_bytes(8, "little"))
                    keyed = exact_key(row) + self._num_rows.to_bytes(8, "little")
                    self._spill.add(f"keys-{row.text_hash[0] % _PARTITIONS}", keyed)
                    self._num_rows += 1
        self._spill.flush()
        if not self._num_rows:
            first = next((reject.reason for reject in self.rejects()), "the files are empty")
            raise InputError(f"None of the {self._read:,} rows can be used: {first}")
        (self._plan.work / "fates").touch()
        self._fates = np.memmap(self._plan.work / "fates", _FATE, "w+", shape=(self._num_rows,))
        self._ranks = np.memmap(self._plan.work / "ranks", "<u8", "r")

    def drop_duplicates(self) -> None:
        """Drops exact duplicates: of the rows with equal keys the first is kept."""
        with self._progress("equal texts", "rows", self._num_rows) as bar:
            for partition in range(_PARTITIONS):
                keyed = np.frombuffer(self._spill.take(f"keys-{partition}"), _KEYED)
                rows, keys = keyed["row"], keyed["key"]
                if len(rows):
                    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
                    again = first[inverse] != np.arange(len(rows))  # rows of a partition are ascending
                    self._drop(rows[again], "duplicate", self._ranks[rows[first[inverse[again]]]], 1.0)
                bar.update(len(rows))

    def compare(self) -> None:
        """Drops contaminated rows; writes the sketches of the others, and their bands to partitions."""
        index = evaluation_index(self._plan)
        index.save(self._plan.work / "evaluation.npz")
        with (
            (self._plan.work / "sketches").open("wb") as sketches,
            self._progress("comparing texts", "rows", self._num_rows) as bar,
        ):
            before = 0
            for numbers, (found, kept) in self._workers.map(_compare, self._chunks()):
                clean = np.array([drop is None for drop in found], bool)
                for number, drop in zip(numbers, found, strict=True):
                    if drop is not None:
                        self._drop(number, drop.reason, drop.of, drop.similarity)
                if self._plan.config.near_duplicates:
                    block = np.zeros((numbers[-1] + 1 - before, NUM_PERMUTATIONS), np.uint8)
                    block[np.asarray(numbers) - before] = kept.bytes_NP
                    sketches.write(block.tobytes())
                    self._spill_bands(np.asarray(numbers)[clean], kept.bands_NB[clean])
                bar.update(numbers[-1] + 1 - before)
                before = numbers[-1] + 1
        self._spill.flush()

    def _spill_bands(self, numbers: np.ndarray, bands_NB: np.ndarray) -> None:
        banded = np.empty(bands_NB.size, _BANDED)
        banded["band"], banded["row"] = bands_NB.ravel(), np.repeat(numbers, bands_NB.shape[1])
        partition = (banded["band"] >> np.uint64(57)).astype(np.int64)
        banded = banded[np.argsort(partition, kind="stable")]
        ends = np.cumsum(np.bincount(partition, minlength=_PARTITIONS))
        for i, (begin, end) in enumerate(zip(np.append(0, ends[:-1]), ends, strict=True)):
            if end > begin:
                self._spill.add(f"bands-{i}", banded[begin:end].tobytes())

    def drop_near_duplicates(self) -> None:
        """Drops each row that resembles an earlier row of the same band's bucket."""
        if not self._plan.config.near_duplicates:
            return
        tasks = np.fromiter((row.task for _, row in self._rows(all_rows=True)), np.uint16, self._num_rows)
        with (
            (self._plan.work / "sketches").open("rb") as file,
            self._progress("near-duplicates", "partitions", _PARTITIONS) as bar,
        ):
            for partition in range(_PARTITIONS):
                banded = np.frombuffer(self._spill.take(f"bands-{partition}"), _BANDED)
                task = tasks[banded["row"]]
                order = np.lexsort((banded["row"], task, banded["band"]))
                band, task, rows = banded["band"][order], task[order], banded["row"][order].astype(np.int64)
                new = np.ones(len(rows), bool)
                new[1:] = (band[1:] != band[:-1]) | (task[1:] != task[:-1])
                begins = np.flatnonzero(new)
                ends = np.append(begins[1:], len(rows))
                for begin, end in zip(begins[ends - begins > 1], ends[ends - begins > 1], strict=True):
                    bucket = rows[begin:end]
                    sketches = _read_sketches(file.fileno(), bucket)
                    for number, of, alike in bucket_links(bucket, sketches, self._plan.config.near_duplicates):
                        self._link(number, int(self._ranks[of]), alike)
                bar.update(1)

    def _link(self, number: int, of: int, alike: float) -> None:
        """Records a near-duplicate. Of several similar rows the first is recorded, in whatever order they are found."""
        fate = self._fates[number]
        new = (of, -np.float32(alike))
        if not fate["reason"] or new < (int(fate["of"]), -fate["similarity"]):
            self._drop(number, "near-duplicate", of, alike)

    def write(self) -> tuple[list[Shard], list[Any], list[LabelCounts]]:
        """Tokenises the remaining rows and writes the shards."""
        config = self._plan.config
        label_counts = [LabelCounts() for _ in self._tasks]
        kept = collections.Counter[str]()
        for _, row in self._rows():
            label_counts[row.task].add(row.labels)
            kept[split_of(row.text_hash, config.dev_fraction)] += 1
        known = {source.task: source.known for source in self._plan.sources}
        tasks = [task_from_counts(name, known[name], label_counts[i]) for name, i in self._tasks.items()]
        num_shards = {split: num_shards_for(kept[split], config.records_per_shard) for split in SPLITS if kept[split]}

        self._workers.tasks = tasks
        with self._progress("tokenising", "texts", kept.total()) as bar:
            for _, rows in self._workers.map(_tokenize, self._chunks()):
                for row in rows:
                    name = f"{row.split}-{shard_number(row.key, num_shards[row.split])}"
                    self._spill.add(name, _pack(row))
                bar.update(len(rows))
        self._spill.flush()
        shards = []
        with self._progress("writing", "shards", sum(num_shards.values())) as bar:
            for split, count in num_shards.items():
                for index in range(count):
                    rows = list(_unpack(split, self._spill.take(f"{split}-{index}")))
                    shards.append(write_shard(self._plan.out, split, index, count, rows))
                    bar.update(1)
        return shards, tasks, label_counts

    def counts(self) -> dict[str, int]:
        found = np.bincount(self._fates["reason"], minlength=len(_REASONS))
        return {
            "read": self._read,
            "rejected": self._rejected,
            "duplicates": int(found[1]),
            "contaminated": int(found[2]),
            "near_duplicates": int(found[3]),
        }

    def rejects(self) -> Iterator[Reject]:
        with (self._plan.work / "rejects").open("rb") as file:
            yield from (Reject(*json.loads(line)) for line in file)

    def dropped(self) -> Iterator[Dropped]:
        for number in np.flatnonzero(self._fates["reason"]):
            fate = self._fates[number]
            reason = _REASONS[fate["reason"]]
            yield Dropped(int(self._ranks[number]), reason, int(fate["of"]), float(fate["similarity"]))

    def _drop(self, rows: Any, reason: str, of: Any, similarity: float) -> None:
        self._fates["reason"][rows] = _REASONS.index(reason)
        self._fates["of"][rows] = of
        self._fates["similarity"][rows] = similarity

    def _rows(self, *, all_rows: bool = False) -> Iterator[tuple[int, SourceRow]]:
        with (self._plan.work / "rows").open("rb") as file:
            for number, line in enumerate(file):
                if all_rows or not self._fates["reason"][number]:
                    yield number, SourceRow.from_json(line)

    def _chunks(self) -> Iterator[tuple[list[int], list[SourceRow]]]:
        numbers: list[int] = []
        rows: list[SourceRow] = []
        for number, row in self._rows():
            numbers.append(number)
            rows.append(row)
            if len(rows) == CHUNK:
                yield numbers, rows
                numbers, rows = [], []
        if rows:
            yield numbers, rows


def _read_sketches(file: int, rows: np.ndarray) -> np.ndarray:
    """Reads the sketches of rows. Not memory-mapped: the mapped pages would count as this process's memory."""
    data = b"".join(os.pread(file, NUM_PERMUTATIONS, int(row) * NUM_PERMUTATIONS) for row in rows)
    return np.frombuffer(data, np.uint8).reshape(len(rows), NUM_PERMUTATIONS)


@dataclasses.dataclass
class _Tools:
    """A worker's evaluation index and tokenizer, created on first use."""

    plan: PreparePlan
    index: EvaluationIndex | None = None
    tokenizer: WordPieceTokenizer | None = None


def _compare(tools: _Tools, tasks: list[Any], rows: list[SourceRow]) -> tuple[list[Dropped | None], Sketches]:
    if tools.index is None:
        tools.index = EvaluationIndex.load(tools.plan.work / "evaluation.npz")
    plain = [comparable(row.text) for row in rows]
    sketches = sketch(plain, tools.plan.band_rows)
    return tools.index.find(rows, plain, sketches), sketches


def _tokenize(tools: _Tools, tasks: list[Any], rows: list[SourceRow]) -> list[TokenizedRow]:
    if tools.tokenizer is None:
        tools.tokenizer = WordPieceTokenizer.from_folder(tools.plan.tokenizer)
    config = tools.plan.config
    return tokenize_rows(rows, tasks, tools.tokenizer, config.max_length, config.dev_fraction)


class _Workers:
    """Maps a function over chunks of rows, in this or in other processes; results keep the order of the chunks."""

    def __init__(self, plan: PreparePlan, count: int) -> None:
        self._count = count
        self._tools = _Tools(plan)
        self._pool = multiprocessing.get_context("spawn").Pool(count, _set_tools, (plan,)) if count > 1 else None
        self.tasks: list[Any] = []

    def map(self, function: Callable, chunks: Iterable[tuple[list[int], list[SourceRow]]]) -> Iterator[Any]:
        if self._pool is None:
            for numbers, rows in chunks:
                yield numbers, function(self._tools, self.tasks, rows)
            return
        pending = collections.deque()
        for numbers, rows in chunks:
            pending.append((numbers, self._pool.apply_async(_run, (function, self.tasks, rows))))
            if len(pending) > 2 * self._count:
                numbers, result = pending.popleft()
                yield numbers, result.get()
        for numbers, result in pending:
            yield numbers, result.get()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


_TOOLS: _Tools | None = None


def _set_tools(plan: PreparePlan) -> None:
    global _TOOLS
    _TOOLS = _Tools(plan)


def _run(function: Callable, tasks: list[Any], rows: list[SourceRow]) -> Any:
    return function(_TOOLS, tasks, rows)


def _pack(row: TokenizedRow) -> bytes:
    head = len(row.record).to_bytes(4, "little") + row.length.to_bytes(2, "little") + bytes([row.truncated])
    return head + row.key + row.record


def _unpack(split: str, data: bytes) -> Iterator[TokenizedRow]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        length, truncated = int.from_bytes(data[at + 4 : at + 6], "little"), bool(data[at + 6])
        key, at = data[at + 7 : at + 25], at + 25
        yield TokenizedRow(split, key, data[at : at + size], length, truncated)
        at += size
