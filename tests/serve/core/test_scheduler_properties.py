"""Random arrivals: no text is lost, answered twice or starved, and no batch exceeds its program."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from classer.serve.core.scheduler import BULK_PATIENCE, BULK_SHARE, Scheduler
from classer.serve.core.work import Priority, Scored
from classer.serve.wire.errors import DeadlineExceeded, InternalError, InvalidRequest, ServeError
from classer.tests.serve.core.fakes import BUCKETS, MAX_BATCH, FakeClock, FakeDevice


@dataclasses.dataclass
class Sent:
    future: Future[Scored]
    device: FakeDevice
    length: int
    bucket: int
    deadline: float | None
    priority: Priority
    poison: bool
    rank: tuple[float, int]
    calls: int = 0


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submitting, cancelling, waiting and running; see the invariants for what must hold."""

    @initialize(bound=st.sampled_from([16, 40, 200]), depth=st.sampled_from([1, 2, 3]))
    def begin(self, bound: int, depth: int) -> None:
        self.clock = FakeClock()
        self.devices = [FakeDevice(self.clock), FakeDevice(self.clock)]
        self.bound = bound
        self.depth = depth
        self.scheduler = Scheduler(max_waiting_tokens=bound, depth=depth, clock=self.clock)
        self.sent: list[Sent] = []

    @rule(
        lengths=st.lists(st.integers(2, 18), max_size=6),
        which=st.integers(0, 1),
        patience=st.none() | st.floats(-1, 6),
        priority=st.sampled_from(Priority),
        poison=st.sets(st.integers(0, 5), max_size=1),
    )
    def submit(
        self, lengths: list[int], which: int, patience: float | None, priority: Priority, poison: set[int]
    ) -> None:
        device = self.devices[which]
        deadline = None if patience is None else self.clock.now + patience
        first = len(self.sent)
        works = [
            device.work(first + i, length, poison=i in poison, deadline=deadline, priority=priority)
            for i, length in enumerate(lengths)
        ]
        patient = BULK_PATIENCE if priority is Priority.BULK else 0.0
        for i, (future, length) in enumerate(zip(self.scheduler.submit_all(works), lengths, strict=True)):
            bucket = next((bucket for bucket in BUCKETS if bucket >= length), 0)
            rank = (self.clock.now + patient, first + i)
            sent = Sent(future, device, length, bucket, deadline, priority, i in poison, rank)
            future.add_done_callback(lambda _, sent=sent: self.count(sent))
            self.sent.append(sent)

    @staticmethod
    def count(sent: Sent) -> None:
        sent.calls += 1

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.sent)).future.cancel()

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(seconds=st.sampled_from([0.01, 1.0, 5.0]))
    def be_slower_or_faster(self, seconds: float) -> None:
        for device in self.devices:
            device.run_seconds = seconds

    @rule()
    def run_one_batch(self) -> None:
        waiting = self.waiting()
        before = {id(device): len(device.batches) for device in self.devices}
        self.scheduler.step()
        started = [
            device.batches[before[id(device)]] for device in self.devices if len(device.batches) > before[id(device)]
        ]
        # The text of the lowest rank starts or is refused first; only texts of its own batch may overtake it.
        if waiting:
            oldest = min(waiting, key=lambda name: self.sent[name].rank)
            assert self.sent[oldest].future.done() or self.sent[oldest].future.running()
            if (batch := next((batch for _, batch, _ in started if oldest in batch), None)) is not None:
                assert batch[0] == oldest
            elif not self.sent[oldest].future.running():
                assert self.sent[oldest].deadline is not None

    def waiting(self) -> list[int]:
        return [name for name, sent in enumerate(self.sent) if not sent.future.done() and not sent.future.running()]

    @invariant()
    def waiting_tokens_are_counted_and_bounded(self) -> None:
        tokens = {
            priority: sum(self.sent[name].bucket for name in self.waiting() if self.sent[name].priority is priority)
            for priority in Priority
        }
        assert self.scheduler.waiting_tokens == sum(tokens.values()) <= self.bound
        assert tokens[Priority.BULK] <= self.bound * BULK_SHARE

    @invariant()
    def batches_are_within_their_program_and_model(self) -> None:
        for device in self.devices:
            for bucket, batch, now in device.batches:
                assert 1 <= len(batch) <= MAX_BATCH
                for name in batch:
                    sent = self.sent[name]
                    assert sent.device is device
                    assert sent.bucket <= bucket
                    assert sent.deadline is None or sent.deadline > now

    @invariant()
    def each_runs_once_but_for_a_second_try_after_a_failure(self) -> None:
        tries = [0] * len(self.sent)
        alone = [0] * len(self.sent)
        for device in self.devices:
            for _, batch, _ in device.batches:
                for name in batch:
                    tries[name] += 1
                    alone[name] += len(batch) == 1
        assert all(n <= 1 or (n == 2 and alone[name] >= 1) for name, n in enumerate(tries))

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
                assert isinstance(error, ServeError)
                assert isinstance(error, InternalError) <= sent.poison
                assert isinstance(error, InvalidRequest) == (sent.length > BUCKETS[-1])
                assert not isinstance(error, DeadlineExceeded) or sent.deadline is not None

    def teardown(self) -> None:
        while self.scheduler.step():
            pass
        assert all(sent.future.done() for sent in self.sent)
        assert self.scheduler.backlog_seconds == 0
        self.each_is_answered_once_and_rightly()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@given(
    arrivals=st.lists(
        st.tuples(st.integers(2, 16), st.sampled_from(Priority), st.sampled_from([0.0, 0.3, 2.0])),
        min_size=1,
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_nobody_waits_longer_than_the_bound(arrivals: list[tuple[int, Priority, float]]) -> None:
    """A text begins, at the latest, after all that rank before it had each a batch of their own."""
    clock = FakeClock()
    device = FakeDevice(clock)
    scheduler = Scheduler(clock=clock)
    ranks: list[tuple[float, int]] = []
    for name, (length, priority, pause) in enumerate(arrivals):
        clock.now += pause
        ranks.append((clock.now + (BULK_PATIENCE if priority is Priority.BULK else 0.0), name))
        scheduler.submit(device.work(name, length, priority=priority))
        if pause:
            scheduler.step()
    while scheduler.step():
        pass
    begun = {name: when for _, batch, when in device.batches for name in batch}
    assert sorted(begun) == list(range(len(arrivals)))
    heads = [batch[0] for batch in device.ran]
    for name, rank in enumerate(ranks):
        # What ranks after it may head a batch before it only if it was begun before the text came.
        for head in heads:
            if begun[head] < begun[name] and ranks[head] > rank:
                assert begun[head] <= rank[0]
