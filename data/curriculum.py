"""Which tasks a stage of the curriculum trains on, and in which batches: a pure function of seed, stage and step.

Axes: T tasks, N examples.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from .buckets import BUCKETS, bucket_for
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


class CurriculumBatches:
    """The batches of one stage, which draws from its tasks in fixed shares.

    Of the first k rows of a stage, task t has share · k to within one: no draw of luck decides it. A task's rows go
    through its examples in a shuffled order, and again in another when they are used up. The rows of `WINDOW` batches
    are shuffled, and cut into batches of like length as `TrainBatches` cuts an epoch; all batches are full.

    Attributes:
      num_steps: of the stage.
      shares_T: float64, how often each task is drawn.
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
          shares_T: from `sampling_shares`; above 0 only for tasks with examples.
          num_steps: of the stage.
          batch_size: rows of every batch.
          buckets: sequence lengths to use, ascending; the largest holds the longest example.
          seed: of the run; not negative.
          stage: the stage's number; each is shuffled differently.
          pad_id: fills rows up to their bucket.
        """
        self._examples = examples
        self._bucket_N = np.array([bucket_for(len(row), buckets) for row in examples.ids])
        self.shares_T = np.asarray(shares_T, np.float64)
        self._first_T = np.searchsorted(examples.tasks_N, np.arange(len(self.shares_T) + 1))
        if (self.shares_T[np.diff(self._first_T) == 0] > 0).any():
            raise ValueError("A task without examples is drawn.")
        self.num_steps = num_steps
        self._batch_size = batch_size
        self._key = (seed, stage)
        self._pad_id = pad_id
        # Two windows, since prefetching reaches over the boundary.
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self._order = functools.lru_cache(maxsize=2 * len(self.shares_T))(self._make_order)

    def __iter__(self) -> TrainIterator:
        return iterate(self)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 in the stage."""
        window, position = divmod(step, WINDOW)
        planned = self._plan(window)[position]
        return self._examples.batch(planned.rows, self._batch_size, planned.length, self._pad_id)

    def drawn(self, steps: int) -> np.ndarray:
        """int64 (T,): how many rows of each task whole windows up to `steps` hold, and the share of the last one."""
        # Largest remainders of cumulative shares, so that the counts sum to the rows.
        exact_T = np.cumsum(self.shares_T) * (steps * self._batch_size)
        ends_T = np.floor(exact_T + 1e-9).astype(np.int64)
        ends_T[-1] = steps * self._batch_size
        return np.diff(ends_T, prepend=0)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches come (the number of steps does not)."""
        facts = repr((self._key, self._batch_size, self._pad_id, self._examples.digest, self.shares_T.tolist()))
        return hashlib.sha256(facts.encode() + self._bucket_N.tobytes()).hexdigest()[:16]

    def _make_plan(self, window: int) -> list[PlannedBatch]:
        begin, end = self.drawn(window * WINDOW), self.drawn((window + 1) * WINDOW)
        rows = np.concatenate(
            [self._rows(task, int(begin[task]), int(end[task])) for task in range(len(self.shares_T))]
        )
        rng = np.random.default_rng((*self._key, window))
        return plan_batches(rng.permutation(rows), self._bucket_N, self._batch_size, rng)

    def _rows(self, task: int, begin: int, end: int) -> np.ndarray:
        """The examples that a task's draws from `begin` to `end` are."""
        size = int(self._first_T[task + 1] - self._first_T[task])
        draws = np.arange(begin, end)
        passes = np.unique(draws // size) if size else []
        orders = [self._order(task, int(number))[draws[draws // size == number] % size] for number in passes]
        return np.concatenate([np.zeros(0, np.int64), *orders]) + self._first_T[task]

    def _make_order(self, task: int, number: int) -> np.ndarray:
        """A task's examples in the order of its pass of that number."""
        size = int(self._first_T[task + 1] - self._first_T[task])
        return np.random.default_rng((*self._key, task, number, 1)).permutation(size)
