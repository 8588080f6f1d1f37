"""Training batches from prepared shards: shuffled, in length buckets, the same for any number of processes. On Grain.

An epoch is a random order of all records, cut into windows of whole batches. Within a window, records go into their
length bucket and are cut into batches as `pipeline.TrainBatches` does it with a whole epoch. So the batch of a step is
a function of (seed, step) alone; every process works the plan out for itself, from the records' lengths, and reads its
own rows of each batch. All processes have the same bucket at the same step, which they must, since they run one
program. A stage of a curriculum is planned likewise, by `curriculum.StagePlan`. The position in the data is one number,
the next step, whatever the number of processes or workers.

Workers make whole batches, each from its step's number: nothing is batched after them, so that nothing that they have
made ahead can be lost or doubled when a run goes on (grain #1129).

Axes: `B` rows of this process, `S` sequence (a bucket's length), `L` labels of the taxonomy.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from .buckets import BUCKETS, pad_batch
from .curriculum import StagePlan
from .errors import InputError
from .pipeline import Batch, Batches, PlannedBatch, plan_batches
from .prepare.plan import read_manifest
from .records import Record, decode_record
from .taxonomy import Task, Taxonomy

# Records a window, about: enough for full batches in every bucket, and few enough to plan in a moment.
WINDOW = 65_536


class Shards:
    """The records of one split of a prepared folder, by number: reads only what is asked for.

    Attributes:
      folder: the prepared folder.
      taxonomy: its tasks.
      lengths_N: each record's tokens.
      label_counts_L, rows_T: how many rows of the whole folder have each label, and are of each task.
      fingerprint: a hash of the records.
      workers: processes that make batches of them; 0 makes them in threads.
    """

    def __init__(self, folder: Path, split: str = "train", *, workers: int = 0) -> None:
        """Reads the manifest and the records' lengths.

        Raises:
          InputError: the folder is not prepared or is too old, has no such split, or lacks one of its files.
        """
        self.folder, self.workers = Path(folder), workers
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
        self._readers: dict[int, Any] = {}
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

    def batch(self, planned: PlannedBatch, rows: np.ndarray, batch_size: int, pad_id: int) -> Batch:
        """One process's rows of a batch.

        Args:
          planned: the batch's records, over all processes.
          rows: which of the batch's rows are wanted, ascending.
          batch_size: rows of the batch over all processes; those beyond its records are fillers.
          pad_id: fills rows up to the batch's length.
        """
        records = self.read(planned.rows[rows[rows < len(planned.rows)]])
        tokens_BS, lengths_B = pad_batch([record.ids for record in records], len(rows), planned.length, pad_id)
        targets_BL = np.zeros((len(rows), self.taxonomy.num_labels), np.float32)
        tasks_B = np.zeros(len(rows), np.int32)
        for row, record in enumerate(records):
            targets_BL[row, self._label_starts[record.task] + record.labels] = 1.0
            tasks_B[row] = record.task
        weights_B = (np.arange(len(rows)) < len(records)).astype(np.float32)
        return Batch(tokens_BS, lengths_B, targets_BL, weights_B, tasks_B)

    def check_buckets(self, buckets: Sequence[int]) -> None:
        """Raises InputError where a record fits no bucket."""
        longest = int(self.lengths_N.max())
        if longest > buckets[-1]:
            raise InputError(f"{self.folder} holds texts of {longest} tokens; the largest bucket holds {buckets[-1]}.")

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

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if shard not in self._readers:
            # For random access: read what is asked for and no more.
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._readers[shard] = ArrayRecordReader(str(self._paths[shard]), options, file_reader_buffer_size=32_768)
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Readers belong to the process that opened them.
        return self.__dict__ | {"_readers": {}}


class ShardBatches:
    """Every record once an epoch, for `num_epochs` epochs.

    Attributes:
      steps_per_epoch: batches an epoch.
      num_steps: batches in all.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        num_epochs: int,
        rows: Sequence[int] | np.ndarray | None = None,
        buckets: Sequence[int] = BUCKETS,
        window: int = WINDOW,
    ) -> None:
        """Takes the shards.

        Args:
          shards: what to read.
          batch_size: rows of a batch over all processes.
          seed: of the shuffles; not negative.
          pad_id: the tokenizer's.
          num_epochs: how often each record comes.
          rows: which rows of each batch are this process's, ascending (`Layout.rows`); by default all.
          buckets: sequence lengths to use, ascending.
          window: records that are put into buckets together, rounded to whole batches.

        Raises:
          InputError: a record fits no bucket.
        """
        shards.check_buckets(buckets)
        self._shards, self._batch_size, self._seed, self._pad_id = shards, batch_size, seed, pad_id
        self._buckets = np.asarray(buckets)
        self._window_steps = max(1, window // batch_size)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self.steps_per_epoch = -(-len(shards) // batch_size)
        self.num_steps = num_epochs * self.steps_per_epoch
        self._make_caches()

    def _make_caches(self) -> None:
        order = grain.MapDataset.range(len(self._shards)).shuffle(seed=self._seed)
        self._order = order.repeat()  # each repetition has an order of its own
        self._window = functools.lru_cache(maxsize=2)(self._plan_window)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_order", "_window")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def __iter__(self) -> ShardIterator:
        return self.iterate(num_workers=self._shards.workers)

    def iterate(self, *, num_workers: int = 0, ahead: int = 8) -> ShardIterator:
        """An iterator over this process's batches.

        Args:
          num_workers: processes that make batches; 0 makes them in threads of this one.
          ahead: how many batches are made ahead, by each worker or in all.
        """
        return ShardIterator(self, num_workers, ahead)

    def planned(self, step: int) -> PlannedBatch:
        """The records of a step's batch, over all processes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        window, position = divmod(within, self._window_steps)
        return self._window(epoch, window)[position]

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step, counted from 0 over all epochs."""
        return self._shards.batch(self.planned(step), self._rows, self._batch_size, self._pad_id)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches come. Neither the processes nor the epochs do."""
        what = (self._shards.fingerprint, self._batch_size, self._seed, self._buckets.tolist(), self._window_steps)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]

    def _plan_window(self, epoch: int, window: int) -> list[PlannedBatch]:
        first = window * self._window_steps * self._batch_size
        last = min(first + self._window_steps * self._batch_size, len(self._shards))
        base = epoch * len(self._shards)
        records = np.array([self._order[base + i] for i in range(first, last)])
        bucket_N = self._buckets[np.searchsorted(self._buckets, self._shards.lengths_N[records])]
        return plan_batches(records, bucket_N, self._batch_size, np.random.default_rng((self._seed, epoch, window)))


class ShardCurriculum:
    """The batches of one stage of a curriculum; see `curriculum.StagePlan`.

    Holds twelve bytes a record in memory: its number, and its place in two passes over its task.

    Attributes:
      num_steps: of the stage.
    """

    def __init__(
        self,
        shards: Shards,
        shares_T: np.ndarray,
        num_steps: int,
        *,
        batch_size: int,
        seed: int,
        stage: int,
        pad_id: int,
        rows: Sequence[int] | np.ndarray | None = None,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Takes the shards.

        Args:
          shards, pad_id, rows: see `ShardBatches`.
          shares_T, batch_size, buckets, seed, stage: see `StagePlan`.
          num_steps: of the stage.

        Raises:
          InputError: a record fits no bucket.
        """
        shards.check_buckets(buckets)
        self._shards, self._batch_size, self._pad_id = shards, batch_size, pad_id
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self.num_steps = num_steps
        self._plan = StagePlan(
            shards.numbers_T,
            shards.lengths_N,
            shares_T,
            batch_size=batch_size,
            buckets=buckets,
            seed=seed,
            stage=stage,
        )

    def __iter__(self) -> ShardIterator:
        return self.iterate(num_workers=self._shards.workers)

    def iterate(self, *, num_workers: int = 0, ahead: int = 8) -> ShardIterator:
        """As `ShardBatches.iterate`."""
        return ShardIterator(self, num_workers, ahead)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step, counted from 0 in the stage."""
        return self._shards.batch(self._plan.planned(step), self._rows, self._batch_size, self._pad_id)

    def drawn(self, steps: int) -> np.ndarray:
        """See `StagePlan.drawn`."""
        return self._plan.drawn(steps)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches come. Neither the processes nor the steps do."""
        facts = repr((self._shards.fingerprint, self._plan.facts))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


class _StepSource:
    """Batches as Grain's random-access source: element i is the batch of step `first` + i."""

    def __init__(self, batches: Batches, first: int) -> None:
        self._batches, self._first = batches, first

    def __len__(self) -> int:
        return self._batches.num_steps - self._first

    def __getitem__(self, index: int) -> Batch:
        return self._batches.batch(self._first + int(index))


class ShardIterator(Iterator[Batch]):
    """Iterates over batches from shards, some ahead; its position can be saved and set."""

    def __init__(self, batches: Batches, num_workers: int, ahead: int) -> None:
        self._batches, self._num_workers, self._ahead = batches, num_workers, ahead
        self._next_step = 0
        self._source: Any = None

    def __next__(self) -> Batch:
        if self._next_step >= self._batches.num_steps:
            raise StopIteration
        if self._source is None:
            self._source = self._open()
        batch = next(self._source)
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the batch last handed out (not after those made ahead), as JSON values."""
        return {"next_step": self._next_step, "fingerprint": self._batches.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that was saved by any process of any number of them, with any number of workers.

        Raises:
          InputError: it was saved with other data, another seed or another batch size, or lies beyond the last epoch.
        """
        if state["fingerprint"] != self._batches.fingerprint:
            raise InputError(
                "The saved position in the training data was taken with other shards, another seed or another batch "
                "size; resume with the ones the run began with, or begin a new run."
            )
        if state["next_step"] > self._batches.num_steps:
            raise InputError(
                f"The saved position is after step {state['next_step']}, but this run ends after "
                f"{self._batches.num_steps}; resume with at least as many epochs."
            )
        self.close()
        self._next_step = state["next_step"]

    def close(self) -> None:
        """Stops threads and workers; the next batch starts them again."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _open(self) -> Any:
        source = grain.MapDataset.source(_StepSource(self._batches, self._next_step))
        if not self._num_workers:
            return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead)))
        # Grain's workers read flags of absl, which only `absl.app.run` parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=self._ahead)
        return iter(dataset.mp_prefetch(options))
