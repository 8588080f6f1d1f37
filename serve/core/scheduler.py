"""Turbine's scheduler: forms batches of the texts that wait, and feeds the device from one loop.

No gRPC and no JAX: it works on token ids, on `work.Device`s (one a model and focus, all on the same hardware) and a
clock. Whenever the hardware is free, the text of the lowest rank determines the model and the length bucket of the next
batch. There is no timer: texts gather while the hardware is busy.

Order. A text's rank is its arrival time; a bulk text ranks as if it had arrived `BULK_PATIENCE` seconds later. Only
texts of a lower rank, texts that share a batch with one, and texts that fill otherwise empty rows are run before it. So
neither long nor short nor bulk texts starve.

Deadlines (`deadlines.RunTimes`). A text whose deadline would pass before its turn is refused at once; with `reserve`
even before it is tokenised. A text whose deadline has passed, or is nearer than its batch would take, is not run.

All times are seconds of the scheduler's clock.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from ...data.buckets import bucket_for
from ..ops.log import log_failure
from ..wire.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded, ServeError, Unavailable
from .deadlines import MIN_RETRY_SECONDS, RunTimes, too_late
from .queues import Entry, Queues
from .work import BatchRun, Device, Output, Priority, Scored, Work

# About four thousand texts of 256 tokens. Twice the largest batch call (1,024 texts of 512 tokens), so that one such
# call alone is never refused, bulk or not.
MAX_WAITING_TOKENS = 1 << 20
# The part of the queue's tokens that bulk texts may take; the rest is kept for interactive ones.
BULK_SHARE = 0.5
# How many seconds later a bulk text ranks; also the longest that a stream of interactive texts can delay it.
BULK_PATIENCE = 2.0


@dataclasses.dataclass(eq=False)
class _Batch:
    entries: list[Entry]
    bucket: int
    collect: Callable[[], Sequence[Output]]
    started: float
    expected: float  # seconds, as measured at warm-up

    @property
    def device(self) -> Device:
        return self.entries[0].work.device


class Scheduler:
    """Queues texts and runs them on devices: in its own thread after `start`, or by calls of `step` from one thread.

    Every future that it returns ends with a `Scored`, with a `ServeError`, or cancelled by its owner.

    Args:
      max_waiting_tokens: how many tokens may be queued, each text counted as its bucket's length; more are refused.
      depth: how many batches may be on the device at once. With 2 the next batch is prepared and sent while one runs,
        which keeps an accelerator busy; on a CPU two batches would compete for the cores.
      clock: seconds, monotonic; deadlines are on the same clock.
      on_death: called once, from the loop's thread, if the loop dies. It must not raise.
      on_batch: called in the loop's thread after each batch. It must be quick, and not raise.
    """

    def __init__(
        self,
        *,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        depth: int = 1,
        clock: Callable[[], float] = time.monotonic,
        on_death: Callable[[], None] = lambda: None,
        on_batch: Callable[[BatchRun], None] = lambda _: None,
    ) -> None:
        self._max_waiting_tokens = max_waiting_tokens
        self._depth = depth
        self._clock = clock
        self._on_death = on_death
        self._on_batch = on_batch
        self._queues = Queues()
        self._reserved = dict.fromkeys(Priority, 0)  # texts that are not tokenised yet
        self._running: collections.deque[_Batch] = collections.deque()
        self._answered: list[tuple[Entry, Scored]] = []  # of the last batch, not handed out yet
        self._times = RunTimes()
        self._collected = clock()
        self._orders = itertools.count()
        self._refusal: str | None = None  # why nothing more is taken on: closing, or dead
        self._dead = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="classer-device", daemon=True)

    @property
    def clock(self) -> Callable[[], float]:
        return self._clock

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queues now, each text counted as its bucket's length."""
        return self._queues.tokens

    @property
    def max_waiting_tokens(self) -> int:
        return self._max_waiting_tokens

    @property
    def backlog_seconds(self) -> float:
        """Predicted seconds until everything that is queued or running is done."""
        with self._changed:
            return self._backlog(Priority.BULK, self._clock())

    @property
    def alive(self) -> bool:
        """False once the loop has died; the scheduler then refuses all work."""
        return not self._dead

    @property
    def running_seconds(self) -> float:
        """How long the oldest batch on the device has been running; 0 if there is none."""
        with self._changed:
            return self._clock() - self._running[0].started if self._running else 0.0

    def start(self) -> None:
        """Starts the device loop."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Refuses new texts, runs those that are queued, and ends the loop; waits at most `timeout` seconds."""
        with self._changed:
            self._refusal = self._refusal or "The server is shutting down; send the text to another one."
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def reserve(self, count: int, deadline: float | None, priority: Priority) -> tuple[int, ServeError | None]:
        """Reserves device time for texts that are not tokenised yet; `release` gives it back.

        Returns:
          How many of the texts have a reservation, and the error of the rest: these would be refused once tokenised, so
          that tokenising them would only delay others.
        """
        now = self._clock()
        with self._changed:
            if self._refusal is not None:
                return 0, Unavailable(self._refusal)
            if self.waiting_tokens >= self._max_waiting_tokens:
                return 0, self._no_room(self.waiting_tokens, self._max_waiting_tokens, "tokens", now)
            each = self._times.per_text
            ahead = sum(texts for other, texts in self._reserved.items() if other <= priority)
            wait = self._backlog(priority, now) + ahead * each
            fit, error = count, None
            if deadline is not None:
                fit = self._times.fitting(count, deadline - now, wait)
                if fit < count:
                    error = too_late(deadline - now, wait + fit * each)
            self._reserved[priority] += fit
            return fit, error

    def release(self, count: int, priority: Priority) -> None:
        """Gives back the reservations of texts that are queued now, or never will be."""
        with self._changed:
            self._reserved[priority] -= count

    def submit(self, work: Work) -> Future[Scored]:
        """`submit_all` for one text."""
        return self.submit_all([work])[0]

    def submit_all(self, works: Iterable[Work]) -> list[Future[Scored]]:
        """Queues texts together, so that they can share batches.

        Returns:
          A future for each text. Cancelling it takes the text out of its queue, unless it is already running. A
          refused text has its error as the future's exception, and does not affect the others: InvalidRequest (longer
          than every bucket), DeadlineExceeded (passed, or cannot be met), Overloaded (the queues are full),
          Unavailable (the scheduler is closed or dead).
        """
        now = self._clock()
        futures: list[Future[Scored]] = []
        refused: list[tuple[Future[Scored], ServeError]] = []
        with self._changed:
            for work in works:
                future: Future[Scored] = Future()
                futures.append(future)
                try:
                    self._enqueue(work, now, future)
                except ServeError as error:
                    # The traceback refers to the future, which will refer to the error: a reference cycle (`_enqueue`).
                    refused.append((future, error.with_traceback(None)))
            self._changed.notify()
        # Callbacks of futures may come back to the scheduler, so they run without its lock.
        for future, error in refused:
            future.set_exception(error)
        return futures

    def step(self) -> bool:
        """Starts a batch of queued texts; then waits for the oldest running batch, unless another can be started.

        A batch's results are delivered after the next batch was started, so that the device does not wait for that.

        Returns:
          Whether there was anything to do.
        """
        entries, expired = self._take()
        try:
            if entries:
                self._launch(entries)
            self._hand_out()
            for entry in expired:
                _deliver(entry, DeadlineExceeded("The deadline passed, or was too near, when the text's turn came."))
            full = len(self._running) >= self._depth or not self.waiting_tokens
            if self._running and (full or not entries):
                self._collect()
            if not self.waiting_tokens:
                self._hand_out()
        except BaseException:
            self._hand_out()
            for entry in (*entries, *(entry for batch in self._running for entry in batch.entries)):
                if not entry.future.done():
                    _deliver(entry, Unavailable("The server lost its device while it ran the text."))
            raise
        return bool(entries or expired or self._running)

    def _enqueue(self, work: Work, now: float, future: Future[Scored]) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        buckets = work.device.buckets
        if len(work.ids) > buckets[-1]:
            raise InvalidRequest(f"The text has {len(work.ids)} tokens; the model reads {buckets[-1]} at most.")
        if work.deadline is not None and work.deadline <= now:
            raise DeadlineExceeded(
                "The deadline had passed before the text reached the device's queue; it was not run."
            )
        bucket = bucket_for(len(work.ids), buckets)
        self._check_room(work, bucket, now)
        full = work.device.batch_for(bucket, self._max_waiting_tokens)
        seconds = work.device.seconds(bucket, full) / full
        busy = self._running or self.waiting_tokens
        wait = self._backlog(work.priority, now)
        # A text is answered with its batch, not before. An idle device tries any text: predictions can be wrong, and
        # only runs correct them.
        mates = min(full, 1 + self._queues.count([(work.device, bucket, work.priority)]))
        left = math.inf if work.deadline is None else work.deadline - now
        if busy and self._times.misses(left, wait, work.device.seconds(bucket, mates)):
            raise too_late(left, wait)
        order = next(self._orders)
        rank = (now + (BULK_PATIENCE if work.priority is Priority.BULK else 0.0), order)
        entry = Entry(work, bucket, now, order, rank, seconds, future)
        self._queues.add(entry)
        self._times.add_text(seconds)
        # A future keeps its callbacks, and the entry refers to the future. A strong reference would make a cycle, which
        # only Python's garbage collector frees; under load its runs stop the process for a tenth of a second.
        queued = weakref.ref(entry)
        future.add_done_callback(lambda done: self._forget(queued()) if done.cancelled() else None)

    def _check_room(self, work: Work, bucket: int, now: float) -> None:
        waiting, bound, whose = self.waiting_tokens, self._max_waiting_tokens, "tokens"
        if work.priority is Priority.BULK:
            waiting, bound, whose = self._queues.tokens_of(Priority.BULK), int(bound * BULK_SHARE), "tokens in bulk"
        if waiting + bucket > bound or self.waiting_tokens + bucket > self._max_waiting_tokens:
            raise self._no_room(waiting, bound, whose, now)

    def _no_room(self, waiting: int, bound: int, whose: str, now: float) -> Overloaded:
        return Overloaded(
            f"The server has {waiting} {whose} waiting and takes on {bound} at most; try again in a moment.",
            # By then half of the queue is done, which makes room for as many callers again.
            retry_seconds=max(self._backlog(Priority.BULK, now) / 2, MIN_RETRY_SECONDS),
        )

    def _backlog(self, priority: Priority, now: float) -> float:
        """Predicted seconds until the turn of a text that is queued now."""
        running = sum(batch.expected for batch in self._running) * self._times.drift
        if self._running:
            running = max(running - (now - max(self._running[0].started, self._collected)), 0.0)
        return running + self._queues.seconds_before(priority) * self._times.drift

    def _forget(self, entry: Entry | None) -> None:
        """Removes a cancelled text from its queue, unless it has left it already."""
        if entry is not None:
            with self._changed:
                self._queues.remove(entry)

    def _take(self) -> tuple[list[Entry], list[Entry]]:
        """Removes and returns the next batch, and the texts whose deadlines have passed or are too near."""
        batch: list[Entry] = []
        expired: list[Entry] = []
        with self._changed:
            head = self._queues.first()
            if head is None:
                return batch, expired
            device, bucket = head.work.device, head.bucket
            own = [(device, bucket, priority) for priority in Priority]
            count = device.batch_for(bucket, self._queues.count(own))
            rows = device.rows(bucket, count)
            now = self._clock()
            ready = now + self._times.drift * device.seconds(bucket, count)
            shorter = [(device, b, priority) for b in device.buckets if b < bucket for priority in Priority]
            # Shorter texts fill the rows that would stay empty, at no cost.
            for keys, most in ((own, count), (shorter, rows)):
                while len(batch) < most and (entry := self._queues.first(keys)) is not None:
                    self._queues.remove(entry)
                    # From here on the owner cannot cancel; False means that it has just done so.
                    if not entry.future.set_running_or_notify_cancel():
                        continue
                    hopeless = entry.late(ready) and (bool(batch) or bool(self._queues))
                    (expired if entry.late(now) or hopeless else batch).append(entry)
        return batch, expired

    def _launch(self, entries: list[Entry]) -> None:
        bucket = max(entry.bucket for entry in entries)
        device = entries[0].work.device
        batch = _Batch(entries, bucket, tuple, self._clock(), device.seconds(bucket, len(entries)))
        with self._changed:
            self._running.append(batch)
        try:
            batch.collect = device.launch([entry.work.ids for entry in entries], bucket)
        except Exception as error:
            batch.collect = _raising(error)

    def _collect(self) -> None:
        batch = self._running[0]
        try:
            outputs = batch.collect()
        except Exception as error:
            log_failure(f"A batch of {len(batch.entries)} texts failed", error)
            self._run_apart(batch)
            with self._changed:
                self._running.popleft()
            return
        now = self._clock()
        # With several batches on the device, each starts when the one before it ends.
        began = max(batch.started, self._collected)
        # The cost for texts behind a batch counts from the end of the last one: forming and padding it are included.
        cost = now - max(self._collected, min(entry.enqueued for entry in batch.entries))
        with self._changed:
            self._running.popleft()
            self._collected = now
            self._times.add_batch(cost, batch.expected)
        self._answered += [
            (entry, Scored(output, began - entry.enqueued, now - began))
            for entry, output in zip(batch.entries, outputs, strict=True)
        ]
        self._on_batch(_account(batch, began, now))

    def _hand_out(self) -> None:
        answered, self._answered = self._answered, []
        for entry, scored in answered:
            _deliver(entry, scored)

    def _run_apart(self, batch: _Batch) -> None:
        """Runs the texts of a failed batch one by one, so that one text's failure fails no other.

        Raises:
          Exception: the device's check failed: the device is lost.
        """
        for entry in batch.entries:
            began = self._clock()
            if entry.late(began):
                _deliver(entry, DeadlineExceeded("The deadline passed while the text was tried again."))
                continue
            output = self._try_again(batch, entry) if len(batch.entries) > 1 else None
            if output is None:
                batch.device.check()
                _deliver(entry, InternalError("The server failed on this text; its log says why."))
            else:
                _deliver(entry, Scored(output, began - entry.enqueued, self._clock() - began))

    def _try_again(self, batch: _Batch, entry: Entry) -> Output | None:
        """The output of one text of a failed batch, run by itself; None if it fails again."""
        try:
            return batch.device.launch([entry.work.ids], batch.bucket)()[0]
        except Exception as error:
            log_failure("A text of it failed again", error)
            return None

    def _loop(self) -> None:
        try:
            while self._wait():
                self.step()
        except BaseException as error:  # every future must end, also after a SystemExit or KeyboardInterrupt
            log_failure("The device loop died", error)
            self._die()

    def _wait(self) -> bool:
        """Blocks until there is work (True), or the scheduler is closed and empty (False)."""
        with self._changed:
            while not self._queues and not self._running and not self._answered and self._refusal is None:
                self._changed.wait()
            return bool(self._queues or self._running or self._answered)

    def _die(self) -> None:
        with self._changed:
            self._dead = True
            self._refusal = "The server has lost its device and needs a restart; send the text to another one."
            left = self._queues.clear()
            self._running.clear()
        for entry in left:
            if entry.future.set_running_or_notify_cancel():
                _deliver(entry, Unavailable(self._refusal))
        self._on_death()


def _raising(error: Exception) -> Callable[[], Sequence[Output]]:
    def collect() -> Sequence[Output]:
        raise error

    return collect


def _deliver(entry: Entry, result: Scored | ServeError) -> None:
    if isinstance(result, Scored):
        entry.future.set_result(result)
    else:
        entry.future.set_exception(result)


def _account(batch: _Batch, began: float, ended: float) -> BatchRun:
    return BatchRun(
        batch.device,
        batch.bucket,
        batch.device.rows(batch.bucket, len(batch.entries)),
        len(batch.entries),
        sum(len(entry.work.ids) for entry in batch.entries),
        ended - began,
        [began - entry.enqueued for entry in batch.entries],
    )
