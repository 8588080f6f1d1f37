"""The scheduler on a fake device and a fake clock: nothing here waits for time to pass."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from classer.serve.errors import (
    ClasserError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from classer.serve.scheduler import Output, Scheduler, Scored

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
    """Answers each text with its first id, which the tests make unique; fails on texts that begin with POISON."""

    buckets = BUCKETS

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.batches: list[tuple[int, list[int], float]] = []  # bucket, first ids, when
        self.lost = False

    def batch_for(self, bucket: int, waiting: int) -> int:
        return min(waiting, MAX_BATCH)

    def run(self, ids: Sequence[np.ndarray], bucket: int) -> Sequence[Output]:
        self.batches.append((bucket, [int(one[0]) for one in ids], self.clock()))
        self.clock.now += RUN_SECONDS
        if self.lost or any(len(one) > 1 and one[1] == POISON for one in ids):
            raise RuntimeError("the device cannot run this")
        return [Output(np.full(2, one[0], np.float32)) for one in ids]

    def check(self) -> None:
        if self.lost:
            raise RuntimeError("the device is lost")


def text(name: int, length: int = 2, *, poison: bool = False) -> np.ndarray:
    ids = np.zeros(length, np.int32)
    ids[0] = name
    if poison:
        ids[1] = POISON
    return ids


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def device(clock: FakeClock) -> FakeDevice:
    return FakeDevice(clock)


@pytest.fixture
def scheduler(device: FakeDevice, clock: FakeClock) -> Scheduler:
    return Scheduler(device, max_waiting_tokens=64, clock=clock)


def names(futures: Sequence[Future[Scored]]) -> list[float]:
    return [future.result(0).output.logits_L[0] for future in futures]


def test_what_waits_runs_together_and_each_gets_its_own_answer(scheduler: Scheduler, device: FakeDevice) -> None:
    futures = scheduler.submit_all([text(name) for name in range(5)])
    assert scheduler.step() == 3
    assert scheduler.step() == 2
    assert scheduler.step() == 0
    assert names(futures) == [0, 1, 2, 3, 4]
    assert [batch for _, batch, _ in device.batches] == [[0, 1, 2], [3, 4]]


def test_the_oldest_text_decides_which_bucket_runs(scheduler: Scheduler, device: FakeDevice) -> None:
    for name, length in enumerate((16, 2, 2, 6, 16, 2)):
        scheduler.submit(text(name, length))
    while scheduler.step():
        pass
    assert [batch for _, batch, _ in device.batches] == [[0, 4], [1, 2, 5], [3]]
    assert [bucket for bucket, _, _ in device.batches] == [16, 4, 8]


def test_times_are_those_of_the_clock(scheduler: Scheduler, clock: FakeClock) -> None:
    future = scheduler.submit(text(1))
    clock.now += 5
    scheduler.step()
    assert (future.result(0).queue_seconds, future.result(0).compute_seconds) == (5.0, RUN_SECONDS)


def test_a_passed_deadline_is_never_run(scheduler: Scheduler, device: FakeDevice, clock: FakeClock) -> None:
    late = scheduler.submit(text(1), deadline=clock.now + 1)
    good = scheduler.submit(text(2), deadline=clock.now + 2)
    clock.now += 1
    scheduler.step()
    assert isinstance(late.exception(0), DeadlineExceeded)
    assert names([good]) == [2]
    assert [batch for _, batch, _ in device.batches] == [[2]]
    at_the_door = scheduler.submit(text(3), deadline=clock.now)
    assert isinstance(at_the_door.exception(0), DeadlineExceeded)
    assert scheduler.waiting_tokens == 0


def test_a_cancelled_text_leaves_its_queue_at_once(scheduler: Scheduler, device: FakeDevice) -> None:
    first, second = scheduler.submit_all([text(1, 16), text(2, 16)])
    assert scheduler.waiting_tokens == 32
    assert first.cancel()
    assert scheduler.waiting_tokens == 16
    scheduler.step()
    assert names([second]) == [2]
    assert [batch for _, batch, _ in device.batches] == [[2]]


def test_cancelling_while_it_runs_changes_nothing(scheduler: Scheduler, device: FakeDevice, monkeypatch) -> None:
    futures = scheduler.submit_all([text(1), text(2)])
    cancelled = []

    def run(ids: Sequence[np.ndarray], bucket: int) -> Sequence[Output]:
        cancelled.extend(future.cancel() for future in futures)
        return [Output(np.full(2, one[0], np.float32)) for one in ids]

    monkeypatch.setattr(device, "run", run)
    scheduler.step()
    assert cancelled == [False, False]
    assert names(futures) == [1, 2]


def test_more_than_the_bound_is_refused_and_nothing_else_is(scheduler: Scheduler) -> None:
    futures = scheduler.submit_all([text(name, 16) for name in range(5)])  # 64 tokens fit four
    assert isinstance(futures[4].exception(0), Overloaded)
    assert "64" in str(futures[4].exception(0))
    assert isinstance(scheduler.submit(text(9)).exception(0), Overloaded)
    scheduler.step()
    again = scheduler.submit(text(10, 16))
    while scheduler.step():
        pass
    assert names([*futures[:4], again]) == [0, 1, 2, 3, 10]


def test_a_text_longer_than_every_bucket_is_refused_at_the_door(scheduler: Scheduler) -> None:
    long, short = scheduler.submit_all([text(1, 17), text(2, 16)])
    assert isinstance(long.exception(0), InvalidRequest)
    scheduler.step()
    assert names([short]) == [2]


def test_one_failure_does_not_fail_its_batch_mates(scheduler: Scheduler) -> None:
    before, poison, after = scheduler.submit_all([text(1), text(2, poison=True), text(3)])
    scheduler.step()
    assert isinstance(poison.exception(0), InternalError)
    assert names([before, after]) == [1, 3]
    assert scheduler.alive


def test_a_deadline_that_passes_during_the_second_try_is_not_run(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    poison, late = scheduler.submit_all([text(1, poison=True), text(2)], deadline=clock.now + 1.5)
    scheduler.step()
    assert isinstance(poison.exception(0), InternalError)
    assert isinstance(late.exception(0), DeadlineExceeded)
    assert [batch for _, batch, _ in device.batches] == [[1, 2], [1]]


def test_closing_finishes_what_waits_and_refuses_the_rest(device: FakeDevice, monkeypatch) -> None:
    scheduler = Scheduler(device)
    running, go_on = threading.Event(), threading.Event()
    real = device.run

    def run(ids: Sequence[np.ndarray], bucket: int) -> Sequence[Output]:
        running.set()
        assert go_on.wait(30)
        return real(ids, bucket)

    monkeypatch.setattr(device, "run", run)
    waiting = scheduler.submit_all([text(name) for name in range(7)])
    scheduler.start()
    assert running.wait(30)
    scheduler.close(timeout=0)  # while one batch runs and two wait
    assert isinstance(scheduler.submit(text(9)).exception(0), Unavailable)
    go_on.set()
    scheduler.close(timeout=30)
    assert names(waiting) == list(range(7))
    assert scheduler.alive


def test_a_scheduler_that_never_started_closes(scheduler: Scheduler) -> None:
    scheduler.close(timeout=1)


def test_a_lost_device_fails_all_who_wait_and_is_told(device: FakeDevice) -> None:
    died = threading.Event()
    scheduler = Scheduler(device, on_death=died.set)
    device.lost = True
    futures = scheduler.submit_all([text(name, 2 + 6 * (name % 2)) for name in range(10)])
    scheduler.start()
    assert died.wait(30)
    assert not scheduler.alive
    assert all(isinstance(future.exception(30), Unavailable) for future in futures)
    assert isinstance(scheduler.submit(text(11)).exception(0), Unavailable)
    assert scheduler.waiting_tokens == 0
    scheduler.close(timeout=30)


def test_the_loop_survives_cancellations_from_other_threads(device: FakeDevice) -> None:
    """Futures are cancelled while the loop takes, runs and answers them; every other one is answered."""
    scheduler = Scheduler(device, max_waiting_tokens=1 << 30)
    scheduler.start()
    kept, cancelled = [], []
    for name in range(300):
        keep, drop = scheduler.submit_all([text(name), text(name)])
        drop.cancel()
        kept.append(keep)
        cancelled.append(drop)
    assert [future.result(30).output.logits_L[0] for future in kept] == list(range(300))
    assert all(future.done() for future in cancelled)
    assert scheduler.alive
    scheduler.close(timeout=30)
    assert scheduler.waiting_tokens == 0


@dataclasses.dataclass
class Sent:
    future: Future[Scored]
    length: int
    bucket: int
    deadline: float | None
    poison: bool
    calls: int = 0


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submitting, cancelling, waiting and running; see the invariants for what must hold."""

    @initialize(bound=st.sampled_from([16, 40, 200]))
    def begin(self, bound: int) -> None:
        self.clock = FakeClock()
        self.device = FakeDevice(self.clock)
        self.bound = bound
        self.scheduler = Scheduler(self.device, max_waiting_tokens=bound, clock=self.clock)
        self.sent: list[Sent] = []

    @rule(
        lengths=st.lists(st.integers(2, 18), max_size=6),
        patience=st.none() | st.integers(-1, 6),
        poison=st.sets(st.integers(0, 5), max_size=1),
    )
    def submit(self, lengths: list[int], patience: int | None, poison: set[int]) -> None:
        deadline = None if patience is None else self.clock.now + patience
        ids = [text(len(self.sent) + i, length, poison=i in poison) for i, length in enumerate(lengths)]
        futures = self.scheduler.submit_all(ids, deadline=deadline)
        for i, (future, length) in enumerate(zip(futures, lengths, strict=True)):
            bucket = next((bucket for bucket in BUCKETS if bucket >= length), 0)
            sent = Sent(future, length, bucket, deadline, i in poison)
            future.add_done_callback(lambda _, sent=sent: self.count(sent))
            self.sent.append(sent)

    @staticmethod
    def count(sent: Sent) -> None:
        sent.calls += 1

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.sent)).future.cancel()

    @rule(seconds=st.integers(0, 4))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def run_one_batch(self) -> None:
        waiting = [i for i, sent in enumerate(self.sent) if not sent.future.done()]
        before = len(self.device.batches)
        now = self.clock.now
        self.scheduler.step()
        # The oldest that waited is the first to be run, or was too late.
        if waiting:
            oldest = self.sent[waiting[0]]
            assert oldest.future.done()
            if oldest.deadline is None or oldest.deadline > now:
                assert self.device.batches[before][1][0] == waiting[0]

    @invariant()
    def waiting_tokens_are_counted_and_bounded(self) -> None:
        waiting = sum(sent.bucket for sent in self.sent if not sent.future.done())
        assert self.scheduler.waiting_tokens == waiting <= self.bound

    @invariant()
    def batches_are_within_their_size_and_bucket(self) -> None:
        for bucket, batch, now in self.device.batches:
            assert 1 <= len(batch) <= MAX_BATCH
            assert {self.sent[name].bucket for name in batch} == {bucket}
            for name in batch:
                deadline = self.sent[name].deadline
                assert deadline is None or deadline > now

    @invariant()
    def each_is_answered_once_and_rightly(self) -> None:
        for name, sent in enumerate(self.sent):
            assert sent.calls == int(sent.future.done())
            if not sent.future.done() or sent.future.cancelled():
                continue
            error = sent.future.exception(0)
            if error is None:
                assert sent.future.result(0).output.logits_L.tolist() == [name, name]
                assert not sent.poison
            else:
                assert isinstance(error, ClasserError)
                assert isinstance(error, InternalError) <= sent.poison
                assert isinstance(error, InvalidRequest) == (sent.length > BUCKETS[-1])
                assert not isinstance(error, DeadlineExceeded) or sent.deadline is not None

    def teardown(self) -> None:
        while self.scheduler.step():
            pass
        assert all(sent.future.done() for sent in self.sent)
        self.each_is_answered_once_and_rightly()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(lengths=st.lists(st.integers(2, 16), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_no_length_starves(lengths: list[int]) -> None:
    """Whatever the mix, every batch begins with the oldest text, so none waits for later ones again and again."""
    clock = FakeClock()
    device = FakeDevice(clock)
    scheduler = Scheduler(device, clock=clock)
    scheduler.submit_all([text(name, length) for name, length in enumerate(lengths)])
    while scheduler.step():
        pass
    done: list[int] = []
    for _, batch, _ in device.batches:
        head = batch[0]
        assert head == min(set(range(len(lengths))) - set(done))
        done += batch
    assert sorted(done) == list(range(len(lengths)))
