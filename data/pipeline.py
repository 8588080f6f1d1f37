"""From token ids to batches: shuffled, in length buckets, resumable to the batch. On Grain.

Axes: `B` batch, `S` sequence (a bucket's length), `L` labels of the task, `N` examples.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from .buckets import BUCKETS, bucket_for, pad_batch
from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Batch:
    """One training batch of a static shape.

    Attributes:
      tokens_BS: int32, padded with the tokenizer's pad id.
      lengths_B: int32, real tokens of each row; 0 for a filler.
      targets_BL: float32, one-hot or multi-hot; zeros for a filler.
      weights_B: float32, 1 for an example, 0 for a filler.
    """

    tokens_BS: np.ndarray
    lengths_B: np.ndarray
    targets_BL: np.ndarray
    weights_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class _PlannedBatch:
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
      lengths: the sequence lengths S that occur, ascending.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray],
        targets_NL: np.ndarray,
        *,
        batch_size: int,
        buckets: Sequence[int] = BUCKETS,
        seed: int,
        pad_id: int,
        num_epochs: int,
    ) -> None:
        """Takes the tokenised examples.

        Args:
          ids: N arrays of token ids, each (S_i,).
          targets_NL: one row an example: 1 where a label holds, else 0.
          batch_size: rows of every batch.
          buckets: sequence lengths to use, ascending; the largest holds the longest example.
          seed: of the shuffles; not negative.
          pad_id: fills rows up to their bucket.
          num_epochs: how often to go through the examples.
        """
        if not ids or len(ids) != len(targets_NL):
            raise ValueError(
                f"{len(ids)} examples and {len(targets_NL)} targets; as many of both are needed, and some."
            )
        self._ids = ids
        self._targets_NL = np.asarray(targets_NL, dtype=np.float32)
        self._bucket_N = np.array([bucket_for(len(row), buckets) for row in ids])
        self._batch_size = batch_size
        self._seed = seed
        self._pad_id = pad_id
        self.steps_per_epoch = -(-len(ids) // batch_size)
        self.num_steps = num_epochs * self.steps_per_epoch
        # Two epochs, since prefetching reaches over the boundary.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self.lengths = tuple(sorted({planned.length for planned in self._plan(0)}))

    def __iter__(self) -> TrainIterator:
        source = grain.MapDataset.source(_BatchSource(self))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return TrainIterator(iter(source.to_iter_dataset(options)), self.fingerprint, self.num_steps)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        planned = self._plan(epoch)[position]
        rows = planned.rows
        tokens_BS, lengths_B = pad_batch(
            [self._ids[row] for row in rows], self._batch_size, planned.length, self._pad_id
        )
        targets_BL = np.zeros((self._batch_size, self._targets_NL.shape[1]), dtype=np.float32)
        targets_BL[: len(rows)] = self._targets_NL[rows]
        weights_B = (np.arange(self._batch_size) < len(rows)).astype(np.float32)
        return Batch(tokens_BS, lengths_B, targets_BL, weights_B)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches come (the number of epochs does not)."""
        digest = hashlib.sha256(repr((self._seed, self._batch_size, self._pad_id, self._targets_NL.shape)).encode())
        lengths_N = np.array([len(row) for row in self._ids])
        for array in (self._bucket_N, lengths_N, self._targets_NL, *self._ids):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def _make_plan(self, epoch: int) -> list[_PlannedBatch]:
        rng = np.random.default_rng((self._seed, epoch))
        shuffled = rng.permutation(len(self._ids))
        buckets = np.unique(self._bucket_N)
        plan: list[_PlannedBatch] = []
        left_over = shuffled[:0]
        for bucket in buckets:
            rows = np.concatenate([left_over, shuffled[self._bucket_N[shuffled] == bucket]])
            full = len(rows) // self._batch_size * self._batch_size
            for first in range(0, full, self._batch_size):
                plan.append(_PlannedBatch(int(bucket), rows[first : first + self._batch_size]))
            left_over = rows[full:]
        if len(left_over):
            plan.append(_PlannedBatch(int(buckets[-1]), left_over))
        return [plan[i] for i in rng.permutation(len(plan))]


class _BatchSource:
    """`TrainBatches` as Grain's random-access source: element i is the batch of step i."""

    def __init__(self, batches: TrainBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return self._batches.num_steps

    def __getitem__(self, index: int) -> Batch:
        return self._batches.batch(int(index))


class TrainIterator(Iterator[Batch]):
    """Iterates over `TrainBatches`, a few batches ahead in a thread; its position can be saved and set."""

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
