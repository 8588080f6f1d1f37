"""From a source of tokenised examples and a plan to training batches, resumable to the batch. On Grain.

A `Source` has rows (`TrainExamples` in memory, `shards.Shards` on disk); a `Plan` says which of them come at which step
(`plans.ShufflePlan`, `curriculum.CurriculumPlan`). `Batches` joins the two. A batch is a function of its step alone, so
that a position in the data is one number, the next step, for any number of processes and workers.

Axes: `B` rows of this process's batch, `S` sequence (a bucket's length), `L` all labels of the taxonomy, `N` examples,
`V` elements of teachers' vectors, `T` tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import grain
import numpy as np
from absl import flags
from scipy.sparse import csr_array

from .buckets import BUCKETS, pad_batch
from .curriculum import CurriculumPlan
from .errors import InputError
from .plans import Plan, ShufflePlan

PlanT = TypeVar("PlanT", bound=Plan)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One training batch of a static shape.

    Attributes:
      tokens_BS: int32, padded with the tokenizer's pad id.
      lengths_B: int32, real tokens of each row; 0 for a filler.
      targets_BL: float32 over all labels of the taxonomy: 1 for an example's labels, 0 for others and for a filler.
      weights_B: float32, 1 for an example, 0 for a filler.
      tasks_B: int32, the position of each example's task in the taxonomy.
      soft_BL: float32, a teacher's answers over all labels; None where no example has any.
      soft_share_B: float32, the weight of a teacher's answers; the labels have the rest. 0 for an example without any.
      vectors_BV: float16, teachers' pooled vectors; zeros for an example without one, None where no example has any.
    """

    tokens_BS: np.ndarray
    lengths_B: np.ndarray
    targets_BL: np.ndarray
    weights_B: np.ndarray
    tasks_B: np.ndarray
    soft_BL: np.ndarray | None = None
    soft_share_B: np.ndarray | None = None
    vectors_BV: np.ndarray | None = None


class Source(Protocol):
    """Where a batch's rows come from: `TrainExamples` in memory, or `shards.Shards` on disk.

    Attributes:
      name: of the data, for error messages.
      lengths_N: tokens of each of the N rows.
      fingerprint: a hash of the rows.
      window: rows that an epoch's plan shuffles and cuts at a time; None is all of them.
      workers: processes that make batches; 0 makes them in a thread.
    """

    @property
    def name(self) -> str: ...

    @property
    def lengths_N(self) -> np.ndarray: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def window(self) -> int | None: ...

    @property
    def workers(self) -> int: ...

    def task_rows(self, num_tasks: int) -> Sequence[np.ndarray]:
        """The rows of each of the taxonomy's tasks, ascending."""
        ...

    def batch(self, rows: np.ndarray, batch_size: int, length: int, pad_id: int) -> Batch:
        """The examples of these rows, padded to `length` tokens, and with fillers to `batch_size` rows."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainExamples:
    """A `Source` in memory: tokenised examples of all tasks, task after task in the order of the taxonomy.

    Attributes:
      ids: N arrays of token ids, each (S_i,).
      targets: sparse float32 (N, all labels), 1 for an example's labels.
      tasks_N: int32, ascending, the position of each example's task.
      soft: sparse float32, a teacher's answers; None where no example has any.
      soft_share_N: float32, the weight of a teacher's answers; the labels have the rest.
      vectors_NV: float16, teachers' pooled vectors; zeros for an example without one, None where no example has any.
      name, window, workers: see `Source`.
    """

    ids: Sequence[np.ndarray]
    targets: csr_array
    tasks_N: np.ndarray
    soft: csr_array | None = None
    soft_share_N: np.ndarray | None = None
    vectors_NV: np.ndarray | None = None
    name: str = "The training data"
    window: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        targets = _shape(self.targets)[0]
        if not self.ids or not len(self.ids) == targets == len(self.tasks_N):
            raise ValueError(
                f"{len(self.ids)} examples, {targets} targets and {len(self.tasks_N)} tasks; as many of "
                f"all are needed, and some."
            )

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each example."""
        return np.array([len(row) for row in self.ids])

    def task_rows(self, num_tasks: int) -> Sequence[np.ndarray]:
        """The rows of each of the taxonomy's tasks, ascending; none of those without examples."""
        firsts = np.searchsorted(self.tasks_N, np.arange(num_tasks + 1))
        return [np.arange(first, last) for first, last in itertools.pairwise(firsts)]

    @property
    def fingerprint(self) -> str:
        """A hash of the examples."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(repr(self.targets.shape).encode())
        arrays = [np.array([len(row) for row in self.ids]), self.tasks_N, *_parts(self.targets), *self.ids]
        if self.soft is not None:
            arrays += [*_parts(self.soft), np.asarray(self.soft_share_N)]
        if self.vectors_NV is not None:
            arrays.append(self.vectors_NV)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def batch(self, rows: np.ndarray, batch_size: int, length: int, pad_id: int) -> Batch:
        """See `Source.batch`."""
        tokens_BS, lengths_B = pad_batch([self.ids[row] for row in rows], batch_size, length, pad_id)
        count = len(rows)
        tasks_B = np.zeros(batch_size, np.int32)
        tasks_B[:count] = self.tasks_N[rows]
        weights_B = (np.arange(batch_size) < count).astype(np.float32)
        soft_BL = soft_share_B = None
        if self.soft is not None and self.soft_share_N is not None:
            soft_BL = _dense(self.soft, rows, batch_size)
            soft_share_B = np.zeros(batch_size, np.float32)
            soft_share_B[:count] = self.soft_share_N[rows]
        vectors_BV = None
        if self.vectors_NV is not None:
            vectors_BV = np.zeros((batch_size, self.vectors_NV.shape[1]), np.float16)
            vectors_BV[:count] = self.vectors_NV[rows]
        targets_BL = _dense(self.targets, rows, batch_size)
        return Batch(tokens_BS, lengths_B, targets_BL, weights_B, tasks_B, soft_BL, soft_share_B, vectors_BV)


def _dense(targets: csr_array, rows: np.ndarray, batch_size: int) -> np.ndarray:
    targets_BL = np.zeros((batch_size, _shape(targets)[1]), np.float32)
    targets_BL[: len(rows)] = targets[rows].toarray()
    return targets_BL


def _shape(targets: csr_array) -> tuple[int, int]:
    return cast(tuple[int, int], targets.shape)


def _parts(targets: csr_array) -> tuple[np.ndarray, ...]:
    return targets.indptr.astype(np.int64), targets.indices.astype(np.int64), targets.data.astype(np.float32)


class Batches(Generic[PlanT]):
    """The batches of a plan over a source: one for every step, the same on any number of processes and workers.

    Attributes:
      source: where the rows come from.
      plan: which rows come at which step.
    """

    def __init__(
        self, source: Source, plan: PlanT, *, pad_id: int, rows: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Joins a source and a plan.

        Args:
          source: where the rows come from.
          plan: which rows come at which step; made from the source's lengths.
          pad_id: fills rows up to their bucket.
          rows: which rows of each batch are this process's, ascending (`Layout.rows`); None is all.
        """
        self.source, self.plan = source, plan
        self._pad_id = pad_id
        self._rows = np.arange(plan.batch_size) if rows is None else np.asarray(rows)

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which batches come. The processes and the number of steps do not."""
        facts = (self.source.fingerprint, self.plan.facts, self._pad_id)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step, counted from 0."""
        planned = self.plan.planned(step)
        rows = planned.rows[self._rows[self._rows < len(planned.rows)]]
        return self.source.batch(rows, len(self._rows), planned.length, self._pad_id)

    def __iter__(self) -> BatchIterator:
        return self.iterate(num_workers=self.source.workers)

    def iterate(self, *, num_workers: int = 0, ahead: int = 8) -> BatchIterator:
        """An iterator over this process's batches.

        Args:
          num_workers: processes that make batches; 0 makes them in a thread of this one.
          ahead: how many batches are made ahead, by each worker or in all.
        """
        return BatchIterator(self, num_workers, ahead)


def epoch_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int,
    pad_id: int,
    rows: Sequence[int] | np.ndarray | None = None,
    buckets: Sequence[int] = BUCKETS,
) -> Batches[ShufflePlan]:
    """Every row of the source once an epoch; the arguments are those of `ShufflePlan` and `Batches`.

    Raises:
      InputError: a row fits no bucket.
    """
    lengths_N = _checked_lengths(source, buckets)
    plan = ShufflePlan(
        lengths_N, batch_size=batch_size, seed=seed, num_epochs=num_epochs, buckets=buckets, window=source.window
    )
    return Batches(source, plan, pad_id=pad_id, rows=rows)


def stage_batches(
    source: Source,
    shares_T: np.ndarray,
    num_steps: int,
    *,
    batch_size: int,
    seed: int,
    stage: int,
    pad_id: int,
    rows: Sequence[int] | np.ndarray | None = None,
    buckets: Sequence[int] = BUCKETS,
) -> Batches[CurriculumPlan]:
    """The batches of one stage of a curriculum; the arguments are those of `CurriculumPlan` and `Batches`.

    Raises:
      InputError: a row fits no bucket.
      ValueError: a task without rows has a share.
    """
    lengths_N, task_rows = _checked_lengths(source, buckets), source.task_rows(len(shares_T))
    plan = CurriculumPlan(
        task_rows, lengths_N, shares_T, num_steps, batch_size=batch_size, seed=seed, stage=stage, buckets=buckets
    )
    return Batches(source, plan, pad_id=pad_id, rows=rows)


def _checked_lengths(source: Source, buckets: Sequence[int]) -> np.ndarray:
    if (longest := int(source.lengths_N.max())) > buckets[-1]:
        raise InputError(f"{source.name} holds texts of {longest} tokens; the largest bucket holds {buckets[-1]}.")
    return source.lengths_N


class _StepSource:
    """Batches as Grain's random-access source: element i is the batch of step `first` + i.

    Workers make whole batches, each from its step's number. Nothing is batched after them, so that no example is lost
    or repeated when a run is resumed (grain #1129).
    """

    def __init__(self, batches: Batches[Any], first: int) -> None:
        self._batches, self._first = batches, first

    def __len__(self) -> int:
        return self._batches.num_steps - self._first

    def __getitem__(self, index: int) -> Batch:
        return self._batches.batch(self._first + int(index))


class BatchIterator(Iterator[Batch]):
    """Iterates over `Batches`, some ahead in a thread or in worker processes; its position can be saved and set."""

    def __init__(self, batches: Batches[Any], num_workers: int, ahead: int) -> None:
        self._batches, self._num_workers, self._ahead = batches, num_workers, ahead
        self._next_step = 0
        self._opened: Any = None

    def __next__(self) -> Batch:
        if self._next_step >= self._batches.num_steps:
            raise StopIteration
        if self._opened is None:
            self._opened = self._open()
        batch = next(self._opened)
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the batch last handed out (not after those made ahead), as JSON values."""
        return {"next_step": self._next_step, "fingerprint": self._batches.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that was saved by any process of any number of them, with any number of workers.

        Raises:
          InputError: it was saved with other data, another seed or another batch size, or lies beyond the last step.
        """
        if state["fingerprint"] != self._batches.fingerprint:
            raise InputError(
                "The saved position in the training data was taken with other examples, labels, tokens, seed or batch "
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
        if self._opened is not None:
            self._opened.close()
            self._opened = None

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
