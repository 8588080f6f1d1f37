"""Which tasks a stage of the curriculum trains on, and in which batches: a pure function of seed, stage and step.

Axes: T tasks, N examples.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .buckets import BUCKETS
from .pipeline import Batch, PlannedBatch, TrainExamples, TrainIterator, iterate, plan_batches

# Batches of like length are cut from so many batches' examples at a time: enough to fill them, few enough to plan fast.
WINDOW = 256


def sampling_shares(sizes_T: Sequence[int], weights_T: Sequence[float], temperature: float) -> np.ndarray:
    """How often each task is drawn: wₜ · nₜ^(1/temperature), scaled to sum to 1.

    Temperature 1 draws tasks in proportion to their examples; above it smaller tasks come more often than that, and at
    infinity all come equally often (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2).

    Args:
      sizes_T: examples of each task; 0 for one that is not drawn.
      weights_T: a factor for each.
      temperature: positive.
    """
    examples_T = np.asarray(sizes_T, np.float64)
    shares_T = np.asarray(weights_T, np.float64) * np.where(examples_T > 0, examples_T ** (1 / temperature), 0.0)
    return shares_T / shares_T.sum()


class StagePlan:
    """Which rows the batches of one stage consist of, drawn from its tasks in fixed shares.

    Of the k rows of a stage's first windows, task t has share · k to within one: no draw of luck decides it. A task's
    rows go through its examples in a shuffled order, and again in another when they are used up. The rows of a window,
    `WINDOW` batches, are shuffled, and cut into batches of like length as `TrainBatches` cuts an epoch; all batches are
    full.

    Attributes:
      shares_T: float64, how often each task is drawn.
    """

    def __init__(
        self,
        rows_T: Sequence[np.ndarray],
        lengths_N: np.ndarray,
        shares_T: np.ndarray,
        *,
        batch_size: int,
        buckets: Sequence[int],
        seed: int,
        stage: int,
    ) -> None:
        """Plans batches.

        Args:
          rows_T: the rows of each task, ascending.
          lengths_N: tokens of every row.
          shares_T: from `sampling_shares`; above 0 only for tasks with rows.
          batch_size: rows of every batch.
          buckets: sequence lengths to use, ascending; the largest holds the longest row.
          seed: of the run; not negative.
          stage: the stage's number; each is shuffled differently.
        """
        self.shares_T = np.asarray(shares_T, np.float64)
        if any(share > 0 and not len(rows) for share, rows in zip(self.shares_T, rows_T, strict=True)):
            raise ValueError("A task without examples is drawn.")
        self._rows_T, self._lengths_N = rows_T, lengths_N
        self._batch_size, self._buckets = batch_size, np.asarray(buckets)
        self._key = (seed, stage)
        self._make_caches()

    def _make_caches(self) -> None:
        # Two windows, since prefetching reaches over the boundary.
        self._window = functools.lru_cache(maxsize=2)(self._plan_window)
        self._order = functools.lru_cache(maxsize=2 * len(self.shares_T))(self._make_order)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_window", "_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def planned(self, step: int) -> PlannedBatch:
        """The rows of a step's batch, and the length they are padded to."""
        window, position = divmod(step, WINDOW)
        return self._window(window)[position]

    def due(self, steps: int) -> np.ndarray:
        """int64 (T,): how many rows of each task whole windows up to `steps` hold, and the share of the last one."""
        # Largest remainders of cumulative shares, so that the counts sum to the rows.
        rows = steps * self._batch_size
        # The shares sum to 1 but for rounding, which the factor makes up for.
        ends_T = np.floor(np.cumsum(self.shares_T) * rows * (1 + 1e-12)).astype(np.int64)
        return np.diff(np.minimum(ends_T, rows), prepend=0)

    def drawn(self, steps: int) -> np.ndarray:
        """int64 (T,): how many rows of each task the first `steps` batches hold, counted batch by batch."""
        counts_T = np.zeros(len(self._rows_T), np.int64)
        for first in range(0, steps, WINDOW):
            planned = [self.planned(step) for step in range(first, min(first + WINDOW, steps))]
            rows = np.concatenate([batch.rows for batch in planned])
            counts_T += [_count_among(rows, of_task) for of_task in self._rows_T]
        return counts_T

    @property
    def facts(self) -> str:
        """All that decides which rows come where, but for the data; the number of steps does not."""
        return repr((self._key, self._batch_size, self._buckets.tolist(), self.shares_T.tolist()))

    def _plan_window(self, window: int) -> list[PlannedBatch]:
        begin_T, end_T = self.due(window * WINDOW), self.due((window + 1) * WINDOW)
        rows = np.concatenate(
            [self._rows(task, begin, end) for task, (begin, end) in enumerate(zip(begin_T, end_T, strict=True))]
        )
        rng = np.random.default_rng((*self._key, window))
        shuffled = rng.permutation(rows)
        bucket_N = self._buckets[np.searchsorted(self._buckets, self._lengths_N[shuffled])]
        return plan_batches(shuffled, bucket_N, self._batch_size, rng)

    def _rows(self, task: int, begin: int, end: int) -> np.ndarray:
        """The rows that a task's draws from `begin` to `end` are."""
        size = len(self._rows_T[task])
        draws = np.arange(begin, end)
        passes = np.unique(draws // size) if size else []
        places = [self._order(task, int(number))[draws[draws // size == number] % size] for number in passes]
        return self._rows_T[task][np.concatenate([np.zeros(0, np.uint32), *places])].astype(np.int64)

    def _make_order(self, task: int, number: int) -> np.ndarray:
        """A task's rows in the order of its pass of that number: four bytes each, for there may be 500 million."""
        rng = np.random.default_rng((*self._key, task, number, 1))
        return rng.permutation(np.arange(len(self._rows_T[task]), dtype=np.uint32))


def _count_among(rows: np.ndarray, of_task: np.ndarray) -> int:
    """How many of the rows are among a task's, which ascend."""
    rows = rows.astype(of_task.dtype)
    places = np.searchsorted(of_task, rows)
    there = places < len(of_task)
    return int((of_task[places[there]] == rows[there]).sum())


class CurriculumBatches:
    """The batches of one stage, of examples in memory; see `StagePlan`.

    Attributes:
      num_steps: of the stage.
    """

    def __init__(
        self,
        examples: TrainExamples,
        shares_T: np.ndarray,
        num_steps: int,
        *,
        batch_size: int,
        buckets: Sequence[int] = BUCKETS,
        seed: int,
        stage: int,
        pad_id: int,
    ) -> None:
        """Plans batches.

        Args:
          examples: of all tasks.
          shares_T, batch_size, buckets, seed, stage: see `StagePlan`.
          num_steps: of the stage.
          pad_id: fills rows up to their bucket.
        """
        self._examples = examples
        self._batch_size = batch_size
        self._pad_id = pad_id
        self.num_steps = num_steps
        first_T = np.searchsorted(examples.tasks_N, np.arange(len(shares_T) + 1))
        rows_T = [np.arange(first_T[task], first_T[task + 1]) for task in range(len(shares_T))]
        lengths_N = np.array([len(row) for row in examples.ids])
        self._plan = StagePlan(
            rows_T, lengths_N, shares_T, batch_size=batch_size, buckets=buckets, seed=seed, stage=stage
        )

    def __iter__(self) -> TrainIterator:
        return iterate(self)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 in the stage."""
        planned = self._plan.planned(step)
        return self._examples.batch(planned.rows, self._batch_size, planned.length, self._pad_id)

    def drawn(self, steps: int) -> np.ndarray:
        """See `StagePlan.drawn`."""
        return self._plan.drawn(steps)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches come (the number of steps does not)."""
        facts = repr((self._plan.facts, self._pad_id, self._examples.digest))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]
