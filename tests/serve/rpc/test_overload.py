"""Three times the device's capacity, on a fake device and a fake clock: accepted texts meet their deadlines."""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from classer.serve.core import deadlines
from classer.serve.core.scheduler import Scheduler
from classer.serve.core.work import Output
from classer.serve.wire.errors import DeadlineExceeded
from classer.tests.serve.core.fakes import MAX_BATCH, RUN_SECONDS, FakeClock, FakeDevice

DEADLINE = 6.0
SECONDS = 600.0


class Busy(FakeDevice):
    """A device whose batches take 0.7 to 1.3 times as long as predicted, and to which texts come while it runs."""

    def __init__(self, clock: FakeClock, rate: float) -> None:
        super().__init__(clock)
        self.rng = random.Random(0)
        self.rate = rate
        self.scheduler: Scheduler | None = None
        self.next_arrival = clock.now
        self.asked: list[tuple[float, Future[Any]]] = []
        self.done: dict[int, float] = {}
        self.refused_at: dict[int, float] = {}

    def arrive(self, until: float) -> None:
        """All texts that come until then, each at its time."""
        assert self.scheduler is not None
        while self.next_arrival <= until:
            self.clock.now = max(self.clock.now, self.next_arrival)
            number = len(self.asked)
            future = self.scheduler.submit(self.work(number, deadline=self.clock.now + DEADLINE))
            future.add_done_callback(lambda one, number=number: self.done.setdefault(number, self.clock.now))
            self.asked.append((self.next_arrival, future))
            self.next_arrival += self.rng.expovariate(self.rate)

    def collect(self, ids: Sequence[np.ndarray]) -> Sequence[Output]:
        end = self.clock.now + RUN_SECONDS * self.rng.uniform(0.7, 1.3)
        self.arrive(end)
        self.clock.now = end
        return [Output(np.full(2, one[0], np.float32)) for one in ids]


def overload() -> collections.Counter[str]:
    """What becomes of ten minutes' texts: answered in time, late, expired after waiting, or refused at once."""
    clock = FakeClock()
    device = Busy(clock, rate=3 * MAX_BATCH / RUN_SECONDS)
    device.scheduler = scheduler = Scheduler(max_waiting_tokens=1_000_000, clock=clock)
    end = clock.now + SECONDS
    while clock.now < end:
        device.arrive(clock.now)
        if not scheduler.step():
            clock.now = device.next_arrival
    counts: collections.Counter[str] = collections.Counter()
    for number, (arrived, future) in enumerate(device.asked):
        if not future.done():
            continue  # still waiting at the end
        took = device.done[number] - arrived
        if isinstance(future.exception(0), DeadlineExceeded):
            counts["refused" if took < 1e-9 else "expired"] += 1
        else:
            counts["in time" if took <= DEADLINE else "late"] += 1
    return counts


def test_what_is_taken_on_is_answered_in_time_at_full_throughput() -> None:
    counts = overload()
    taken = counts["in time"] + counts["late"] + counts["expired"]
    assert counts["in time"] >= 0.98 * taken
    assert counts["in time"] >= 0.9 * SECONDS * MAX_BATCH / RUN_SECONDS
    assert counts["refused"] > counts["in time"]


def test_without_a_margin_much_of_it_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: predictions that are taken at their word stand at the deadline's edge."""
    monkeypatch.setattr(deadlines, "MARGIN", 0.8)
    counts = overload()
    assert counts["late"] + counts["expired"] > 0.1 * counts["in time"]
