"""The plan of a curriculum's stage: which tasks' rows come in which batch, as a pure function of seed, stage and step.

Axes: `T` tasks, `N` rows of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .buckets import BUCKETS
from .plans import PlannedBatch, Recent, plan_batches

# Batches that are planned together: enough rows to fill batches of every length, and few enough to plan fast.
WINDOW = 256


def sampling_shares(sizes_T: Sequence[int], weights_T: Sequence[float], temperature: float) -> np.ndarray:
    """How often each task is drawn: wₜ · nₜ^(1/temperature), scaled to sum to 1.

    Temperature 1 draws tasks in proportion to their examples. Higher temperatures draw smaller tasks more often, and an
    infinite one draws all tasks equally often (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2).

    Args:
      sizes_T: examples of each task; 0 for one that is not drawn.
      weights_T: a factor for each task.
      temperature: above 0.
    """
    examples_T = np.asarray(sizes_T, np.float64)
    shares_T = np.asarray(weights_T, np.float64) * np.where(examples_T > 0, examples_T ** (1 / temperature), 0.0)
    return shares_T / shares_T.sum()


class CurriculumPlan:
    """The rows of one stage's batches, drawn from its tasks in fixed shares.

    Of the k rows of a stage's first windows, task t has share · k to within one, without chance. A task's rows are
    taken in a shuffled order, and in another when all have been taken. The rows of a window, `WINDOW` batches, are
    shuffled and cut into batches as in `plans.ShufflePlan`; all batches are full.

    Attributes:
      batch_size: rows of every batch over all processes.
      num_steps: of the stage.
      shares_T: float64, how often each task is drawn.
    """

    def __init__(
        self,
        task_rows: Sequence[np.ndarray],
        lengths_N: np.ndarray,
        shares_T: np.ndarray,
        num_steps: int,
        *,
        batch_size: int,
        seed: int,
        stage: int,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Plans batches.

        Args:
          task_rows: the rows of each of the T tasks, ascending.
          lengths_N: tokens of every row.
          shares_T: from `sampling_shares`; above 0 only for tasks with rows.
          num_steps: of the stage.
          batch_size: rows of every batch over all processes.
          seed: of the run; not negative.
          stage: the stage's number; each is shuffled differently.
          buckets: sequence lengths to use, ascending; the largest holds the longest row.

        Raises:
          ValueError: a task without rows has a share.
        """
        self.shares_T = np.asarray(shares_T, np.float64)
        if any(share > 0 and not len(rows) for share, rows in zip(self.shares_T, task_rows, strict=True)):
            raise ValueError("A task without examples is drawn.")
        self._task_rows, self._lengths_N, self._buckets = task_rows, lengths_N, np.asarray(buckets)
        self.batch_size, self.num_steps = batch_size, num_steps
        self._key = (seed, stage)
        # Two windows, since prefetching reaches over the boundary; for each task the order of two passes.
        self._window = Recent(self._plan_window, 2)
        self._order = Recent(self._make_order, 2 * len(self.shares_T))

    def planned(self, step: int) -> PlannedBatch:
        """The batch of a step, counted from 0 in the stage."""
        window, position = divmod(step, WINDOW)
        return self._window(window)[position]

    def due(self, steps: int) -> np.ndarray:
        """int64 (T,): each task's share of the rows of `steps` batches, in whole rows that sum to all of them."""
        # The ends of the shares are rounded, and not the shares, so that the counts sum to the rows.
        rows = steps * self.batch_size
        # The factor corrects for a sum of shares that rounding made less than 1.
        ends_T = np.floor(np.cumsum(self.shares_T) * rows * (1 + 1e-12)).astype(np.int64)
        return np.diff(np.minimum(ends_T, rows), prepend=0)

    def drawn(self, steps: int) -> np.ndarray:
        """int64 (T,): how many rows of each task the first `steps` batches hold, counted in the batches."""
        counts_T = np.zeros(len(self._task_rows), np.int64)
        for first in range(0, steps, WINDOW):
            planned = [self.planned(step) for step in range(first, min(first + WINDOW, steps))]
            rows = np.concatenate([batch.rows for batch in planned])
            counts_T += [_count_among(rows, of_task) for of_task in self._task_rows]
        return counts_T

    @property
    def facts(self) -> tuple[Any, ...]:
        return ("curriculum", *self._key, self.batch_size, self._buckets.tolist(), self.shares_T.tolist())

    def _plan_window(self, window: int) -> list[PlannedBatch]:
        begin_T, end_T = self.due(window * WINDOW), self.due((window + 1) * WINDOW)
        rows = np.concatenate(
            [self._rows(task, begin, end) for task, (begin, end) in enumerate(zip(begin_T, end_T, strict=True))]
        )
        rng = np.random.default_rng((*self._key, window))
        shuffled = rng.permutation(rows)
        bucket_N = self._buckets[np.searchsorted(self._buckets, self._lengths_N[shuffled])]
        return plan_batches(shuffled, bucket_N, self.batch_size, rng)

    def _rows(self, task: int, begin: int, end: int) -> np.ndarray:
        """The rows of a task's draws number `begin` to `end`, counted over the stage."""
        size = len(self._task_rows[task])
        draws = np.arange(begin, end)
        passes = np.unique(draws // size) if size else []
        places = [self._order(task, int(number))[draws[draws // size == number] % size] for number in passes]
        return self._task_rows[task][np.concatenate([np.zeros(0, np.uint32), *places])].astype(np.int64)

    def _make_order(self, task: int, number: int) -> np.ndarray:
        """The order of a task's rows in one pass over them; uint32, since there may be 500 million."""
        rng = np.random.default_rng((*self._key, task, number, 1))
        return rng.permutation(np.arange(len(self._task_rows[task]), dtype=np.uint32))


def _count_among(rows: np.ndarray, of_task: np.ndarray) -> int:
    """How many of the rows are a task's. `of_task` is ascending."""
    rows = rows.astype(of_task.dtype)
    places = np.searchsorted(of_task, rows)
    there = places < len(of_task)
    return int((of_task[places[there]] == rows[there]).sum())
