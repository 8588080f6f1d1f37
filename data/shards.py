"""Prepared shards as a source of training examples, read from disk by row.

A shard is an ArrayRecord file of tokenised texts, with the records' lengths and tasks in files beside it. Records of
all shards of a split are numbered in order; a plan needs their lengths alone, and each process reads its own rows.

Axes: `B` rows of this process, `S` sequence (a bucket's length), `L` labels of the taxonomy, `N` records, `T` tasks.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .buckets import pad_batch
from .errors import InputError
from .pipeline import Batch
from .plans import Recent
from .prepare.plan import read_manifest
from .records import Record, decode_record
from .taxonomy import Task, Taxonomy

# Records that an epoch's plan shuffles at a time: enough for full batches in every bucket, few enough to plan fast.
WINDOW_ROWS = 65_536


class Shards:
    """A source (`pipeline.Source`) on disk: the records of one split of a prepared folder, read by number.

    A curriculum's plan holds twelve bytes a record in memory: its number, and its place in two passes over its task.

    Attributes:
      folder: the prepared folder.
      name: of the folder.
      taxonomy: its tasks.
      lengths_N: tokens of each record.
      label_counts_L, rows_T: how many rows of the whole folder have each label, and are of each task.
      fingerprint: a hash of the records.
      window: records that an epoch's plan shuffles at a time.
      workers: processes that make batches; 0 makes them in a thread.
    """

    def __init__(self, folder: Path, split: str = "train", *, workers: int = 0, window: int = WINDOW_ROWS) -> None:
        """Reads the manifest and the records' lengths.

        Raises:
          InputError: the folder is not prepared or is too old, has no such split, or lacks one of its files.
        """
        self.folder, self.name, self.workers, self.window = Path(folder), str(folder), workers, window
        manifest = read_manifest(self.folder)
        if not manifest["splits"].get(split, {}).get("shards"):
            raise InputError(f"{folder} has no texts in the split '{split}'.")
        shards = manifest["splits"][split]["shards"]
        self._paths = [self.folder / shard["file"] for shard in shards]
        for path in self._paths:
            if not path.is_file():
                raise InputError(f"{path} is missing, which the manifest names; prepare the data anew.")
        if not all("tasks" in shard for shard in shards):
            raise InputError(f"{folder} was prepared by an older Classer; remove it and prepare the data anew.")
        self._tasks = [self.folder / shard["tasks"] for shard in shards]
        self._firsts = np.cumsum([0] + [shard["records"] for shard in shards]).tolist()
        self._vocab_size = manifest["vocab_size"]
        self._reader = Recent(self._open_reader, None)
        self.lengths_N = np.concatenate([np.load(self.folder / shard["lengths"]) for shard in shards])
        tasks = [Task.from_json(task, source=f"{folder}/manifest.json") for task in manifest["tasks"]]
        self.taxonomy = Taxonomy(tuple(tasks))
        self.label_counts_L = np.concatenate([task["label_counts"] for task in manifest["tasks"]])
        self.rows_T = np.array([task["rows"] for task in manifest["tasks"]])
        self._label_starts = [self.taxonomy.slice_of(task.name).start for task in tasks]
        sums = [entry["sha256"] for entry in manifest["files"] if entry["file"].startswith(f"{split}-")]
        self.fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lengths_N)

    @functools.cached_property
    def numbers_T(self) -> tuple[np.ndarray, ...]:
        """The numbers of each task's records, uint32."""
        tasks_N = np.concatenate([np.load(path) for path in self._tasks])
        order = np.argsort(tasks_N, kind="stable").astype(np.uint32)
        counts_T = np.bincount(tasks_N, minlength=len(self.taxonomy.tasks))
        return tuple(np.split(order, np.cumsum(counts_T)[:-1]))

    def task_rows(self, num_tasks: int) -> Sequence[np.ndarray]:
        """The numbers of each task's records, ascending."""
        assert num_tasks == len(self.numbers_T)
        return self.numbers_T

    def batch(self, rows: np.ndarray, batch_size: int, length: int, pad_id: int) -> Batch:
        """See `pipeline.Source.batch`."""
        records = self.read(rows)
        tokens_BS, lengths_B = pad_batch([record.ids for record in records], batch_size, length, pad_id)
        targets_BL = np.zeros((batch_size, self.taxonomy.num_labels), np.float32)
        tasks_B = np.zeros(batch_size, np.int32)
        for row, record in enumerate(records):
            targets_BL[row, self._label_starts[record.task] + record.labels] = 1.0
            tasks_B[row] = record.task
        weights_B = (np.arange(batch_size) < len(records)).astype(np.float32)
        return Batch(tokens_BS, lengths_B, targets_BL, weights_B, tasks_B)

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[Record]:
        """The records of these numbers, in their order."""
        by_shard: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            by_shard.setdefault(bisect.bisect_right(self._firsts, int(number)) - 1, []).append(place)
        records: list[Record | None] = [None] * len(numbers)
        for shard, places in by_shard.items():
            reader = self._reader(shard)
            data = reader.read([int(numbers[place]) - self._firsts[shard] for place in places])
            for place, record in zip(places, data, strict=True):
                records[place] = decode_record(record, self._vocab_size)
        return [record for record in records if record is not None]

    def _open_reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        # For random access: read what is asked for and no more.
        options = "readahead_buffer_size:0,max_parallelism:0"
        return ArrayRecordReader(str(self._paths[shard]), options, file_reader_buffer_size=32_768)
