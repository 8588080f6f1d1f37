"""A clock that stands still and a device that is a plain function, for the scheduler's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from classer.serve.core.work import Output, Priority, Scored, Work

BUCKETS = (4, 8, 16)
MAX_BATCH = 3
POISON = 666
RUN_SECONDS = 1.0


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeDevice:
    """Answers each text with its first id, which the tests make unique; fails on texts that hold POISON.

    A batch takes `run_seconds`, once it is waited for.
    """

    buckets = BUCKETS

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.run_seconds = RUN_SECONDS
        self.batches: list[tuple[int, list[int], float]] = []  # bucket, first ids, when
        self.lost = False

    def batch_for(self, bucket: int, waiting: int) -> int:
        return min(waiting, MAX_BATCH)

    def rows(self, bucket: int, count: int) -> int:
        return MAX_BATCH

    def seconds(self, bucket: int, count: int) -> float:
        return RUN_SECONDS

    def launch(self, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], Sequence[Output]]:
        # First, because the scheduler takes what this raises for the texts' failure, and tries them one by one.
        self.batches.append((bucket, [int(one[0]) for one in ids], self.clock()))
        assert 1 <= len(ids) <= MAX_BATCH
        assert all(len(one) <= bucket for one in ids)
        return lambda: self.collect(ids)

    def collect(self, ids: Sequence[np.ndarray]) -> Sequence[Output]:
        self.clock.now += self.run_seconds
        if self.lost or any(POISON in one[1:2] for one in ids):
            raise RuntimeError("the device cannot run this")
        return [Output(np.full(2, one[0], np.float32)) for one in ids]

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("the device is lost")

    def work(
        self,
        name: int,
        length: int = 2,
        *,
        poison: bool = False,
        deadline: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Work:
        """A text of that first id and so many tokens."""
        ids = np.zeros(length, np.int32)
        ids[0] = name
        if poison:
            ids[1] = POISON
        return Work(self, ids, deadline, priority)

    @property
    def ran(self) -> list[list[int]]:
        """The first ids of each batch."""
        return [batch for _, batch, _ in self.batches]


def names(futures: Sequence[Future[Scored]]) -> list[float]:
    """What the device answered to each text."""
    return [future.result(0).output.logits_L[0] for future in futures]
