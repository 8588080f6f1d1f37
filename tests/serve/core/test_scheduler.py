"""The scheduler on a fake device and a fake clock: nothing here waits for time to pass."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from classer.serve.core.pipeline import finished
from classer.serve.core.scheduler import BULK_PATIENCE, Scheduler
from classer.serve.core.work import BatchRun, Output, Priority
from classer.serve.wire.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded, Unavailable
from classer.tests.serve.core.fakes import BUCKETS, RUN_SECONDS, FakeClock, FakeDevice, names


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def device(clock: FakeClock) -> FakeDevice:
    return FakeDevice(clock)


@pytest.fixture
def scheduler(clock: FakeClock) -> Scheduler:
    return Scheduler(max_waiting_tokens=64, clock=clock)


def run_all(scheduler: Scheduler) -> None:
    while scheduler.step():
        pass


def test_what_waits_runs_together_and_each_gets_its_own_answer(scheduler: Scheduler, device: FakeDevice) -> None:
    futures = scheduler.submit_all(device.work(name) for name in range(5))
    run_all(scheduler)
    assert names(futures) == [0, 1, 2, 3, 4]
    assert device.ran == [[0, 1, 2], [3, 4]]


def test_answers_are_handed_out_when_the_next_batch_has_started(scheduler: Scheduler, device: FakeDevice) -> None:
    futures = scheduler.submit_all(device.work(name) for name in range(5))
    begun: list[int] = []
    futures[0].add_done_callback(lambda _: begun.append(len(device.ran)))
    assert scheduler.step()
    assert not any(future.done() for future in futures)
    assert scheduler.step()
    assert all(future.done() for future in futures)  # nothing waits: at once
    assert begun == [2]
    assert not scheduler.step()


def test_answers_are_handed_out_when_those_that_waited_are_gone(scheduler: Scheduler, device: FakeDevice) -> None:
    futures = scheduler.submit_all(device.work(name) for name in range(4))
    assert scheduler.step()
    assert futures[3].cancel()
    assert not scheduler.step()
    assert names(futures[:3]) == [0, 1, 2]


def test_a_lost_device_does_not_take_answers_with_it(scheduler: Scheduler, device: FakeDevice) -> None:
    futures = scheduler.submit_all(device.work(name) for name in range(4))
    assert scheduler.step()
    device.lost = True
    with pytest.raises(RuntimeError):
        scheduler.step()
    assert names(futures[:3]) == [0, 1, 2]
    assert isinstance(futures[3].exception(0), Unavailable)


def test_the_oldest_text_decides_which_bucket_runs(scheduler: Scheduler, device: FakeDevice) -> None:
    for name, length in enumerate((16, 4, 16, 8, 16, 4)):
        scheduler.submit(device.work(name, length))
    run_all(scheduler)
    assert device.ran == [[0, 2, 4], [1, 5], [3]]
    assert [bucket for bucket, _, _ in device.batches] == [16, 4, 8]


def test_rows_that_would_stand_empty_are_for_shorter_texts(scheduler: Scheduler, device: FakeDevice) -> None:
    for name, length in enumerate((8, 16, 2, 2, 8)):
        scheduler.submit(device.work(name, length))
    run_all(scheduler)
    assert device.ran == [[0, 4, 2], [1, 3]]
    assert [bucket for bucket, _, _ in device.batches] == [8, 16]


def test_models_do_not_share_batches_and_the_oldest_goes_first(scheduler: Scheduler, clock: FakeClock) -> None:
    one, other = FakeDevice(clock), FakeDevice(clock)
    futures = scheduler.submit_all([one.work(0), other.work(1), one.work(2), other.work(3)])
    run_all(scheduler)
    assert names(futures) == [0, 1, 2, 3]
    assert (one.ran, other.ran) == ([[0, 2]], [[1, 3]])
    assert one.batches[0][2] < other.batches[0][2]


def test_bulk_texts_wait_but_not_for_ever(scheduler: Scheduler, device: FakeDevice, clock: FakeClock) -> None:
    bulk = scheduler.submit(device.work(0, 16, priority=Priority.BULK))
    order: list[float] = []
    bulk.add_done_callback(lambda future: order.append(0))
    for name in range(1, 6):
        future = scheduler.submit(device.work(name))
        future.add_done_callback(lambda future, name=name: order.append(name))
        scheduler.step()
    run_all(scheduler)
    # A second a batch: the bulk text counts as having come after those of its first seconds.
    assert order.index(0) == BULK_PATIENCE / RUN_SECONDS
    assert order == [1, 2, 0, 3, 4, 5]


def test_interactive_and_bulk_texts_share_a_batch(scheduler: Scheduler, device: FakeDevice) -> None:
    scheduler.submit(device.work(0, priority=Priority.BULK))
    scheduler.submit(device.work(1))
    run_all(scheduler)
    assert device.ran == [[1, 0]]


def test_times_are_those_of_the_clock(scheduler: Scheduler, device: FakeDevice, clock: FakeClock) -> None:
    future = scheduler.submit(device.work(1))
    clock.now += 5
    scheduler.step()
    assert (future.result(0).queue_seconds, future.result(0).compute_seconds) == (5.0, RUN_SECONDS)


def test_batches_are_accounted_for(device: FakeDevice, clock: FakeClock) -> None:
    runs: list[BatchRun] = []
    scheduler = Scheduler(clock=clock, on_batch=runs.append)
    scheduler.submit_all([device.work(0, 3), device.work(1, 4)])
    run_all(scheduler)
    assert runs == [BatchRun(device, bucket=4, rows=3, texts=2, tokens=7, seconds=RUN_SECONDS, queue_seconds=[0, 0])]


def test_with_two_on_the_device_the_next_one_starts_before_the_first_ends(device: FakeDevice, clock: FakeClock) -> None:
    scheduler = Scheduler(depth=2, clock=clock)
    futures = scheduler.submit_all(device.work(name) for name in range(7))
    assert scheduler.step()  # starts the first
    assert scheduler.step()  # starts the second, waits for the first
    assert [when for _, _, when in device.batches] == [100.0, 100.0]
    assert not futures[0].done()
    assert scheduler.step()  # starts the third, hands out what the first gave
    assert (futures[0].done(), futures[6].done()) == (True, False)
    run_all(scheduler)
    assert names(futures) == list(range(7))
    assert [futures[i].result(0).compute_seconds for i in (0, 3, 6)] == [RUN_SECONDS] * 3


def test_a_passed_deadline_is_never_run(scheduler: Scheduler, device: FakeDevice, clock: FakeClock) -> None:
    late = scheduler.submit(device.work(1, deadline=clock.now + 1))
    good = scheduler.submit(device.work(2, deadline=clock.now + 4))
    clock.now += 1
    scheduler.step()
    assert isinstance(late.exception(0), DeadlineExceeded)
    assert names([good]) == [2]
    assert device.ran == [[2]]
    at_the_door = scheduler.submit(device.work(3, deadline=clock.now))
    assert isinstance(at_the_door.exception(0), DeadlineExceeded)
    assert scheduler.waiting_tokens == 0


def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    """Six texts are two batches, two seconds."""
    scheduler.submit_all(device.work(name) for name in range(6))
    refused = scheduler.submit(device.work(6, deadline=clock.now + 2)).exception(0)
    assert isinstance(refused, DeadlineExceeded)
    assert refused.retry_seconds == pytest.approx(2)
    assert scheduler.backlog_seconds == pytest.approx(2)
    met = scheduler.submit(device.work(7, deadline=clock.now + 4.5))
    run_all(scheduler)
    assert names([met]) == [7]


def test_a_text_is_refused_even_before_it_is_tokenised(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    """Where what waits would take too long."""
    scheduler.submit_all(device.work(name) for name in range(6))
    fit, refused = scheduler.reserve(1, clock.now + 2, Priority.INTERACTIVE)
    assert (fit, type(refused)) == (0, DeadlineExceeded)
    assert refused is not None
    assert refused.retry_seconds == pytest.approx(2)
    assert scheduler.reserve(1, clock.now + 4, Priority.INTERACTIVE) == (1, None)
    run_all(scheduler)
    assert scheduler.backlog_seconds == 0


def test_announced_texts_count_until_they_arrive(clock: FakeClock, device: FakeDevice) -> None:
    """Once the mean text is known: a third of a second, as three share a batch."""
    scheduler = Scheduler(clock=clock)
    scheduler.submit_all(device.work(name) for name in range(200))
    run_all(scheduler)
    fit, refused = scheduler.reserve(60, clock.now + 14.1, Priority.INTERACTIVE)
    assert fit == 31  # 30 of them take ten seconds, and MARGIN is kept
    assert isinstance(refused, DeadlineExceeded)
    assert scheduler.reserve(1, clock.now + 8, Priority.INTERACTIVE)[0] == 0
    assert scheduler.reserve(1, clock.now + 15, Priority.INTERACTIVE) == (1, None)
    assert scheduler.reserve(1, clock.now + 8, Priority.BULK)[0] == 0
    scheduler.release(32, Priority.INTERACTIVE)
    assert scheduler.reserve(1, clock.now + 0.1, Priority.BULK)[0] == 1
    assert scheduler.reserve(1, clock.now + 0.1, Priority.INTERACTIVE)[0] == 1  # bulk ones do not go before it
    assert scheduler.reserve(1, None, Priority.BULK) == (1, None)


def test_nothing_is_announced_to_a_full_or_closed_scheduler(scheduler: Scheduler, device: FakeDevice) -> None:
    scheduler.submit_all(device.work(name, 16) for name in range(4))
    fit, refused = scheduler.reserve(1, None, Priority.INTERACTIVE)
    assert (fit, type(refused)) == (0, Overloaded)
    scheduler.close()
    fit, refused = scheduler.reserve(1, None, Priority.INTERACTIVE)
    assert (fit, type(refused)) == (0, Unavailable)


def test_bulk_texts_ahead_do_not_count_for_an_interactive_deadline(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    scheduler.submit_all(device.work(name, priority=Priority.BULK) for name in range(6))
    assert not scheduler.submit(device.work(6, deadline=clock.now + 1.5)).done()
    assert scheduler.submit(device.work(7, deadline=clock.now + 1.5, priority=Priority.BULK)).exception(0)


def test_an_idle_device_tries_even_what_it_thinks_hopeless(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    """Else a warm-up on a busy machine would have all short deadlines refused for ever."""
    device.run_seconds = 0.01
    for name in range(30):
        future = scheduler.submit(device.work(name, deadline=clock.now + 0.1))
        run_all(scheduler)
        assert names([future]) == [name]
    # By now it knows better.
    scheduler.submit_all(device.work(name) for name in range(30, 33))
    assert not scheduler.submit(device.work(33, deadline=clock.now + 0.9)).done()


def test_what_passes_between_two_batches_is_predicted_too(clock: FakeClock) -> None:
    """The backlog is what two batches take from end to end, not what the device runs of it."""

    class SlowToFill(FakeDevice):
        def rows(self, bucket: int, count: int) -> int:
            self.clock.now += RUN_SECONDS
            return super().rows(bucket, count)

    device, scheduler = SlowToFill(clock), Scheduler(clock=clock)
    scheduler.submit_all(device.work(name) for name in range(300))
    began = clock.now
    run_all(scheduler)
    a_batch = (clock.now - began) / len(device.batches)
    assert a_batch >= 2 * RUN_SECONDS
    scheduler.submit_all(device.work(name) for name in range(6))
    assert scheduler.backlog_seconds == pytest.approx(2 * a_batch, rel=0.01)


def test_a_text_whose_deadline_is_nearer_than_its_batch_would_take_is_not_run(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    near, far = scheduler.submit_all([device.work(0, deadline=clock.now + 3), device.work(1)])
    clock.now += 2.5
    run_all(scheduler)
    assert isinstance(near.exception(0), DeadlineExceeded)
    assert device.ran == [[1]]
    assert names([far]) == [1]


def test_a_cancelled_text_leaves_its_queue_at_once(scheduler: Scheduler, device: FakeDevice) -> None:
    first, second = scheduler.submit_all([device.work(1, 16), device.work(2, 16)])
    assert scheduler.waiting_tokens == 32
    assert first.cancel()
    assert scheduler.waiting_tokens == 16
    scheduler.step()
    assert names([second]) == [2]
    assert device.ran == [[2]]


def test_nothing_is_left_to_the_garbage_collector(scheduler: Scheduler, device: FakeDevice) -> None:
    async def ask() -> list[weakref.ref]:
        works = [device.work(1), device.work(2, BUCKETS[-1] + 1), device.work(3), device.work(4, deadline=0.0)]
        futures = scheduler.submit_all(works)
        futures[2].cancel()
        waiting = asyncio.create_task(finished(futures, None))
        await asyncio.sleep(0)
        run_all(scheduler)
        await waiting
        assert names(futures[:1]) == [1]
        assert isinstance(futures[1].exception(), InvalidRequest)
        return [weakref.ref(future) for future in futures]

    gc.disable()
    try:
        assert [ref() for ref in asyncio.run(ask())] == [None] * 4
    finally:
        gc.enable()


def test_cancelling_while_it_runs_changes_nothing(scheduler: Scheduler, device: FakeDevice, monkeypatch) -> None:
    futures = scheduler.submit_all([device.work(1), device.work(2)])
    cancelled = []

    def collect(ids: Sequence[np.ndarray]) -> Sequence[Output]:
        cancelled.extend(future.cancel() for future in futures)
        return [Output(np.full(2, one[0], np.float32)) for one in ids]

    monkeypatch.setattr(device, "collect", collect)
    scheduler.step()
    assert cancelled == [False, False]
    assert names(futures) == [1, 2]


def test_more_than_the_bound_is_refused_and_nothing_else_is(scheduler: Scheduler, device: FakeDevice) -> None:
    futures = scheduler.submit_all(device.work(name, 16) for name in range(5))  # 64 tokens fit four
    refused = futures[4].exception(0)
    assert isinstance(refused, Overloaded)
    assert "64" in str(refused)
    assert refused.retry_seconds == pytest.approx(RUN_SECONDS * 4 / 3 / 2)  # half of four texts, three a batch
    assert isinstance(scheduler.submit(device.work(9)).exception(0), Overloaded)
    scheduler.step()
    again = scheduler.submit(device.work(10, 16))
    run_all(scheduler)
    assert names([*futures[:4], again]) == [0, 1, 2, 3, 10]


def test_bulk_texts_leave_room_for_others(scheduler: Scheduler, device: FakeDevice) -> None:
    bulk = scheduler.submit_all(device.work(name, 16, priority=Priority.BULK) for name in range(3))
    assert isinstance(bulk[2].exception(0), Overloaded)
    assert "in bulk" in str(bulk[2].exception(0))
    futures = scheduler.submit_all(device.work(name, 16) for name in range(3, 5))
    run_all(scheduler)
    assert names([*bulk[:2], *futures]) == [0, 1, 3, 4]


def test_a_text_longer_than_every_bucket_is_refused_at_the_door(scheduler: Scheduler, device: FakeDevice) -> None:
    long, short = scheduler.submit_all([device.work(1, 17), device.work(2, 16)])
    assert isinstance(long.exception(0), InvalidRequest)
    scheduler.step()
    assert names([short]) == [2]


@pytest.mark.parametrize("depth", [1, 2])
def test_one_failure_does_not_fail_its_batch_mates(device: FakeDevice, clock: FakeClock, depth: int) -> None:
    scheduler = Scheduler(clock=clock, depth=depth)
    before, poison, after, *later = scheduler.submit_all(
        device.work(name, poison=name in (2, 7)) for name in range(1, 8)
    )
    run_all(scheduler)
    assert isinstance(poison.exception(0), InternalError)
    assert names([before, after, *later[:-1]]) == [1, 3, 4, 5, 6]
    assert isinstance(later[-1].exception(0), InternalError)
    assert scheduler.alive


def test_what_cannot_be_started_fails_like_what_cannot_be_run(
    scheduler: Scheduler, device: FakeDevice, monkeypatch
) -> None:
    def launch(ids: Sequence[np.ndarray], bucket: int) -> Callable[[], Sequence[Output]]:
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(device, "launch", launch)
    futures = scheduler.submit_all(device.work(name) for name in range(2))
    run_all(scheduler)
    assert all(isinstance(future.exception(0), InternalError) for future in futures)


def test_a_deadline_that_passes_during_the_second_try_is_not_run(
    scheduler: Scheduler, device: FakeDevice, clock: FakeClock
) -> None:
    poison, late = scheduler.submit_all(
        device.work(name, poison=name == 1, deadline=clock.now + 1.9) for name in (1, 2)
    )
    scheduler.step()
    assert isinstance(poison.exception(0), InternalError)
    assert isinstance(late.exception(0), DeadlineExceeded)
    assert device.ran == [[1, 2], [1]]


def test_closing_finishes_what_waits_and_refuses_the_rest(device: FakeDevice, monkeypatch) -> None:
    scheduler = Scheduler()
    running, go_on = threading.Event(), threading.Event()
    real = device.launch

    def launch(ids: Sequence[np.ndarray], bucket: int) -> Callable[[], Sequence[Output]]:
        running.set()
        assert go_on.wait(30)
        return real(ids, bucket)

    monkeypatch.setattr(device, "launch", launch)
    waiting = scheduler.submit_all(device.work(name) for name in range(7))
    scheduler.start()
    assert running.wait(30)
    assert scheduler.running_seconds > 0
    scheduler.close(timeout=0)  # while one batch runs and two wait
    assert isinstance(scheduler.submit(device.work(9)).exception(0), Unavailable)
    go_on.set()
    scheduler.close(timeout=30)
    assert names(waiting) == list(range(7))
    assert scheduler.alive
    assert scheduler.running_seconds == 0


def test_a_scheduler_that_never_started_closes(scheduler: Scheduler) -> None:
    scheduler.close(timeout=1)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_lost_device_fails_all_who_wait_and_is_told(device: FakeDevice, depth: int) -> None:
    died = threading.Event()
    scheduler = Scheduler(on_death=died.set, depth=depth)
    device.lost = True
    futures = scheduler.submit_all(device.work(name, 2 + 6 * (name % 2)) for name in range(10))
    scheduler.start()
    assert died.wait(30)
    assert not scheduler.alive
    assert all(isinstance(future.exception(30), Unavailable) for future in futures)
    assert isinstance(scheduler.submit(device.work(11)).exception(0), Unavailable)
    assert scheduler.waiting_tokens == 0
    scheduler.close(timeout=30)


def test_the_loop_survives_cancellations_from_other_threads(device: FakeDevice) -> None:
    """Futures are cancelled while the loop takes, runs and answers them; every other one is answered."""
    scheduler = Scheduler(max_waiting_tokens=1 << 30)
    scheduler.start()
    kept, cancelled = [], []
    for name in range(300):
        keep, drop = scheduler.submit_all([device.work(name), device.work(name)])
        drop.cancel()
        kept.append(keep)
        cancelled.append(drop)
    assert [future.result(30).output.logits_L[0] for future in kept] == list(range(300))
    assert all(future.done() for future in cancelled)
    assert scheduler.alive
    scheduler.close(timeout=30)
    assert scheduler.waiting_tokens == 0
