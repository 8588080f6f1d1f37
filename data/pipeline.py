"""From token ids to batches: shuffled, in length buckets, resumable to the batch. On Grain.

Axes: `B` batch, `S` sequence (a bucket's length), `L` all labels of the taxonomy, `N` examples, `V` teachers' vectors.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import grain
import numpy as np
from scipy.sparse import csr_array

from .buckets import BUCKETS, bucket_for, pad_batch
from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Batch:
    """One training batch of a static shape.

    Attributes:
      tokens_BS: int32, padded with the tokenizer's pad id.
      lengths_B: int32, real tokens of each row; 0 for a filler.
      targets_BL: float32 over all labels of the taxonomy: 1 for what the example is given; zeros for a filler.
      weights_B: float32, 1 for an example, 0 for a filler.
      tasks_B: int32, the position of each example's task in the taxonomy.
      soft_BL: float32, a teacher's answers over all labels; None where no example has any.
      soft_share_B: float32, what they weigh beside the labels; 0 for an example without them.
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


@dataclasses.dataclass(frozen=True)
class TrainExamples:
    """Tokenised training examples of all tasks, task after task in the order of the taxonomy.

    Attributes:
      ids: N arrays of token ids, each (S_i,).
      targets: sparse float32 (N, all labels), what each example is given.
      tasks_N: int32, ascending, the position of each example's task.
      soft: sparse float32, a teacher's answers; None where no example has any.
      soft_share_N: float32, what they weigh beside the labels.
      vectors_NV: float16, teachers' pooled vectors; zeros for an example without one, None where no example has any.
    """

    ids: Sequence[np.ndarray]
    targets: csr_array
    tasks_N: np.ndarray
    soft: csr_array | None = None
    soft_share_N: np.ndarray | None = None
    vectors_NV: np.ndarray | None = None

    def __post_init__(self) -> None:
        targets = _shape(self.targets)[0]
        if not self.ids or not len(self.ids) == targets == len(self.tasks_N):
            raise ValueError(
                f"{len(self.ids)} examples, {targets} targets and {len(self.tasks_N)} tasks; as many of "
                f"all are needed, and some."
            )

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the examples."""
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
        """The examples of these rows, padded to `length` tokens and with fillers to `batch_size` rows."""
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


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Rows of one batch and the length that they are padded to."""

    length: int
    rows: np.ndarray


class TrainBatches:
    """Every example once an epoch, for `num_epochs` epochs, in an order that is a function of (seed, epoch) alone.

    An epoch's examples are shuffled and put into the bucket of their length. What is left over in a bucket once full
    batches are cut moves up to the next larger one, so that all batches of an epoch but one are full; then the order
    of the batches is shuffled. The shapes of an epoch's batches are the same in all epochs (their order is not), and
    so is their number, so nothing new is compiled after the first.

    Attributes:
      steps_per_epoch: batches an epoch.
      num_steps: batches of all epochs.
      lengths: the sequence lengths S that occur, ascending.
    """

    def __init__(
        self,
        examples: TrainExamples,
        *,
        batch_size: int,
        buckets: Sequence[int] = BUCKETS,
        seed: int,
        pad_id: int,
        num_epochs: int,
    ) -> None:
        """Plans batches.

        Args:
          examples: what to learn from.
          batch_size: rows of every batch.
          buckets: sequence lengths to use, ascending; the largest holds the longest example.
          seed: of the shuffles; not negative.
          pad_id: fills rows up to their bucket.
          num_epochs: how often to go through the examples.
        """
        self._examples = examples
        self._bucket_N = np.array([bucket_for(len(row), buckets) for row in examples.ids])
        self._batch_size = batch_size
        self._seed = seed
        self._pad_id = pad_id
        self.steps_per_epoch = -(-len(examples.ids) // batch_size)
        self.num_steps = num_epochs * self.steps_per_epoch
        # Two epochs, since prefetching reaches over the boundary.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self.lengths = tuple(sorted({planned.length for planned in self._plan(0)}))

    def __iter__(self) -> TrainIterator:
        return iterate(self)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        planned = self._plan(epoch)[position]
        return self._examples.batch(planned.rows, self._batch_size, planned.length, self._pad_id)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches come (the number of epochs does not)."""
        facts = repr((self._seed, self._batch_size, self._pad_id, self._examples.digest)).encode()
        return hashlib.sha256(facts + self._bucket_N.tobytes()).hexdigest()[:16]

    def _make_plan(self, epoch: int) -> list[PlannedBatch]:
        rng = np.random.default_rng((self._seed, epoch))
        shuffled = rng.permutation(len(self._bucket_N))
        return plan_batches(shuffled, self._bucket_N[shuffled], self._batch_size, rng)


def plan_batches(
    shuffled: np.ndarray, bucket_N: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[PlannedBatch]:
    """Cuts rows into batches of like length; all but one are full.

    Args:
      shuffled: (N,) the rows, in the order in which they are taken.
      bucket_N: the bucket of each, in tokens.
      batch_size: rows a batch.
      rng: shuffles the batches.
    """
    buckets = np.unique(bucket_N)
    plan: list[PlannedBatch] = []
    left_over = shuffled[:0]
    for bucket in buckets:
        rows = np.concatenate([left_over, shuffled[bucket_N == bucket]])
        full = len(rows) // batch_size * batch_size
        for first in range(0, full, batch_size):
            plan.append(PlannedBatch(int(bucket), rows[first : first + batch_size]))
        left_over = rows[full:]
    if len(left_over):
        plan.append(PlannedBatch(int(buckets[-1]), left_over))
    return [plan[i] for i in rng.permutation(len(plan))]


class Batches(Protocol):
    """What `iterate` goes through: a batch for every step, a function of the step alone."""

    @property
    def num_steps(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def batch(self, step: int) -> Batch: ...


def iterate(batches: Batches) -> TrainIterator:
    """The batches one after the other, made a few ahead in a thread."""
    source = grain.MapDataset.source(_BatchSource(batches))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return TrainIterator(iter(source.to_iter_dataset(options)), batches.fingerprint, batches.num_steps)


class _BatchSource:
    """`Batches` as Grain's random-access source: element i is the batch of step i."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return self._batches.num_steps

    def __getitem__(self, index: int) -> Batch:
        return self._batches.batch(int(index))


class TrainIterator(Iterator[Batch]):
    """Iterates over `Batches`, a few ahead in a thread; its position can be saved and set."""

    def __init__(self, batches: grain.DatasetIterator[Batch], fingerprint: str, num_steps: int) -> None:
        self._batches = batches
        self._fingerprint = fingerprint
        self._num_steps = num_steps

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position after the batch last handed out (not after those made ahead), as JSON values."""
        return {"next_step": self._batches.get_state()["next_index"], "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position: the batch that comes next is the one that would have come next there.

        Raises:
          InputError: the position was saved with other data, another seed or another batch size, or lies beyond the
            last epoch.
        """
        if state["fingerprint"] != self._fingerprint:
            raise InputError(
                "The saved position in the training data was taken with other examples, labels, tokens, seed or batch "
                "size; resume with the ones the run began with, or begin a new run."
            )
        if state["next_step"] > self._num_steps:
            raise InputError(
                f"The saved position is after step {state['next_step']}, but this run ends after {self._num_steps}; "
                f"resume with at least as many epochs."
            )
        self._batches.set_state({"next_index": state["next_step"]})

    def close(self) -> None:
        """Stops the thread; no batch can be taken any more."""
        self._batches.close()
