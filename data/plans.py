"""Plans: which rows each training step's batch holds, as a pure function of seed and step.

`ShufflePlan` goes through all rows once an epoch; `curriculum.CurriculumPlan` draws from tasks in fixed shares. Plans
know the rows' lengths alone, so that every process of a job works out the same plan for itself.

Axes: `N` rows of the source, `T` tasks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grain
import numpy as np

from .buckets import BUCKETS

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Rows of one batch over all processes, and the length that they are padded to, in tokens."""

    length: int
    rows: np.ndarray


class Plan(Protocol):
    """Which rows come in which batch."""

    @property
    def batch_size(self) -> int:
        """Rows of every batch over all processes."""
        ...

    @property
    def num_steps(self) -> int: ...

    @property
    def facts(self) -> tuple[Any, ...]:
        """Everything that decides which rows come where, except the source and the number of steps."""
        ...

    def planned(self, step: int) -> PlannedBatch:
        """The batch of a step, counted from 0."""
        ...


class Recent(Generic[Value]):
    """Calls a method, and keeps the results of the last `size` different calls; all of them for None.

    The results belong to one process: a pickled copy begins without any. This is the one rule for pickling sources
    and plans, which Grain's worker processes receive.
    """

    def __init__(self, method: Callable[..., Value], size: int | None) -> None:
        self._method, self._size = method, size
        self._cached = functools.lru_cache(maxsize=size)(method)

    def __call__(self, *arguments: Hashable) -> Value:
        return self._cached(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self._method, self._size)


class ShufflePlan:
    """Every row once an epoch, for `num_epochs` epochs, in an order that depends on (seed, epoch) alone.

    An epoch's rows are shuffled and put into the bucket of their length. The rows of a bucket that fill no batch move
    up to the next larger one, so that all batches but one are full. Then the order of the batches is shuffled.

    Without a window this is done with all rows of an epoch at once; the shapes of the batches are then the same in all
    epochs, so that no program is compiled after the first. With a window it is done with that many rows at a time, in
    the order of Grain's shuffle, which holds nothing in memory.

    Attributes:
      batch_size: rows of every batch over all processes.
      steps_per_epoch: batches an epoch.
      num_steps: batches of all epochs.
    """

    def __init__(
        self,
        lengths_N: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        num_epochs: int,
        buckets: Sequence[int] = BUCKETS,
        window: int | None = None,
    ) -> None:
        """Plans batches.

        Args:
          lengths_N: tokens of every row.
          batch_size: rows of every batch over all processes.
          seed: of the shuffles; not negative.
          num_epochs: how often each row comes.
          buckets: sequence lengths to use, ascending; the largest holds the longest row.
          window: rows that are planned together, rounded down to whole batches; None plans an epoch at once.
        """
        self._lengths_N, self._buckets, self._seed = lengths_N, np.asarray(buckets), seed
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(lengths_N) // batch_size)
        self.num_steps = num_epochs * self.steps_per_epoch
        self._window_steps = None if window is None else max(1, window // batch_size)
        # Two windows, since prefetching reaches over the boundary.
        self._window = Recent(self._plan_window, 2)
        self._order = Recent(self._make_order, 1)

    @property
    def facts(self) -> tuple[Any, ...]:
        return ("shuffle", self._seed, self.batch_size, self._buckets.tolist(), self._window_steps)

    def planned(self, step: int) -> PlannedBatch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        window, position = divmod(within, self._window_steps or self.steps_per_epoch)
        return self._window(epoch, window)[position]

    def _plan_window(self, epoch: int, window: int) -> list[PlannedBatch]:
        count = len(self._lengths_N)
        if self._window_steps is None:
            rng = np.random.default_rng((self._seed, epoch))
            rows = rng.permutation(count)
        else:
            rng = np.random.default_rng((self._seed, epoch, window))
            first = window * self._window_steps * self.batch_size
            last = min(first + self._window_steps * self.batch_size, count)
            order = self._order()
            rows = np.array([order[epoch * count + i] for i in range(first, last)])
        bucket_N = self._buckets[np.searchsorted(self._buckets, self._lengths_N[rows])]
        return plan_batches(rows, bucket_N, self.batch_size, rng)

    def _make_order(self) -> grain.MapDataset[int]:
        shuffled = grain.MapDataset.range(len(self._lengths_N)).shuffle(seed=self._seed)
        return shuffled.repeat()  # each repetition has an order of its own


def plan_batches(
    shuffled: np.ndarray, bucket_N: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[PlannedBatch]:
    """Cuts rows into batches of similar length; all but one are full.

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
