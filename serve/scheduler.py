"""Turbine's scheduler: what waits, in which order, and the one loop that feeds the device.

No gRPC and no JAX: it sees token ids, a `Device` and a clock. Texts wait in one queue for each length bucket. Whenever
the device is free, the bucket with the oldest text gives the next batch; there is no timer, because batches form by
themselves while the device is busy. Taking the oldest first, a text is overtaken only by those that share its batch or
came before it, so neither long nor short ones starve.

All times are seconds of the scheduler's clock.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np

from ..data.buckets import bucket_for
from ..model.evidence import Kept
from .errors import ClasserError, DeadlineExceeded, InternalError, InvalidRequest, Overloaded, Unavailable
from .log import log_failure

# About four thousand texts of 256 tokens. Twice what the largest batch call can bring (1,024 texts of 512 tokens), so
# that one such call alone is never refused.
MAX_WAITING_TOKENS = 1 << 20


class Device(Protocol):
    """What the scheduler needs of an engine. Called by one thread at a time."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths, in tokens and ascending, that texts are padded to."""
        ...

    def batch_for(self, bucket: int, waiting: int) -> int:
        """How many of `waiting` texts of a bucket to run next: 1 … `waiting`."""
        ...

    def run(self, ids: Sequence[np.ndarray], bucket: int) -> Sequence[Output]:
        """What N texts give, at most as many as `batch_for` said. Whatever it raises is these texts' failure."""
        ...

    def check(self) -> None:
        """Runs something known to work; whatever it raises means that the device is lost."""
        ...


class Output(NamedTuple):
    """What the device says of one text.

    Attributes:
      logits_L: (L,) float32, over all labels of the model.
      kept: the tokens that it read to the end; None where nothing is left out.
    """

    logits_L: np.ndarray
    kept: Kept | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """What became of one text.

    Attributes:
      output: what the device said.
      queue_seconds: from `submit` until its batch began.
      compute_seconds: what the device took over its batch.
    """

    output: Output
    queue_seconds: float
    compute_seconds: float


@dataclasses.dataclass(eq=False)
class _Entry:
    ids: np.ndarray
    bucket: int
    deadline: float | None
    enqueued: float
    order: int
    future: Future[Scored]


class Scheduler:
    """Queues texts and runs them on a device, in a thread of its own after `start` (or by `step`, from one thread).

    Every future it hands out ends: with a `Scored`, with a `ClasserError`, or cancelled by its owner.

    Args:
      device: what runs the batches.
      max_waiting_tokens: how many tokens (each text counted as its bucket's length) may wait before more is refused.
      clock: seconds, monotonic; deadlines are on the same clock.
      on_death: called once, from the loop's thread, if the loop dies. It must not raise.
    """

    def __init__(
        self,
        device: Device,
        *,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
        clock: Callable[[], float] = time.monotonic,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._max_waiting_tokens = max_waiting_tokens
        self._clock = clock
        self._on_death = on_death
        self._queues = {bucket: collections.OrderedDict[int, _Entry]() for bucket in device.buckets}
        self._waiting_tokens = 0
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
        return self._waiting_tokens

    @property
    def alive(self) -> bool:
        """False once the loop has died; such a scheduler refuses all work."""
        return not self._dead

    def start(self) -> None:
        """Starts the device loop."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """Takes on nothing more, lets what waits finish, and ends the loop; at most `timeout` seconds."""
        with self._changed:
            self._refusal = self._refusal or "The server is shutting down; send the text to another one."
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def submit(self, ids: np.ndarray, *, deadline: float | None = None) -> Future[Scored]:
        """`submit_all` for one text."""
        return self.submit_all([ids], deadline=deadline)[0]

    def submit_all(self, ids: Sequence[np.ndarray], *, deadline: float | None = None) -> list[Future[Scored]]:
        """Queues texts, together, so that they can share batches.

        Args:
          ids: the token ids of each text, (S_i,).
          deadline: when the answer is of no more use. A text whose deadline has passed is never run.

        Returns:
          A future for each text; cancelling it takes the text out of its queue, unless it is already running. A
          refusal is the future's exception, and never touches the texts beside it: InvalidRequest (longer than every
          bucket), DeadlineExceeded, Overloaded (now or never: nothing is computed), Unavailable (closing or dead).
        """
        now = self._clock()
        futures: list[Future[Scored]] = []
        refused: list[tuple[Future[Scored], ClasserError]] = []
        with self._changed:
            for text_ids in ids:
                future: Future[Scored] = Future()
                futures.append(future)
                try:
                    self._enqueue(text_ids, deadline, now, future)
                except ClasserError as error:
                    refused.append((future, error))
            self._changed.notify()
        # Callbacks of futures may come back to the scheduler, so they run without its lock.
        for future, error in refused:
            future.set_exception(error)
        return futures

    def step(self) -> int:
        """Runs one batch of what waits; the number of texts taken from the queues (0: nothing waits)."""
        batch, expired = self._take()
        for entry in expired:
            _deliver(
                entry, DeadlineExceeded("The deadline passed while the text waited for the device; it was not run.")
            )
        if batch:
            try:
                self._run(batch)
            except BaseException:
                for entry in batch:
                    if not entry.future.done():
                        _deliver(entry, Unavailable("The server lost its device while it ran the text."))
                raise
        return len(batch) + len(expired)

    def _enqueue(self, ids: np.ndarray, deadline: float | None, now: float, future: Future[Scored]) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if len(ids) > self._device.buckets[-1]:
            raise InvalidRequest(f"The text has {len(ids)} tokens; the model reads {self._device.buckets[-1]} at most.")
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded(
                "The deadline had passed before the text reached the device's queue; it was not run."
            )
        bucket = bucket_for(len(ids), self._device.buckets)
        if self._waiting_tokens + bucket > self._max_waiting_tokens:
            raise Overloaded(
                f"The server has {self._waiting_tokens} tokens waiting and takes on {self._max_waiting_tokens} at "
                "most; try again in a moment."
            )
        entry = _Entry(ids, bucket, deadline, now, next(self._orders), future)
        self._queues[bucket][entry.order] = entry
        self._waiting_tokens += bucket
        future.add_done_callback(lambda _: self._forget(entry))

    def _forget(self, entry: _Entry) -> None:
        """Takes a cancelled text out of its queue (any other that is done has left it before)."""
        with self._changed:
            if self._queues[entry.bucket].pop(entry.order, None) is not None:
                self._waiting_tokens -= entry.bucket

    def _take(self) -> tuple[list[_Entry], list[_Entry]]:
        """The next batch, and the texts before it whose deadlines have passed."""
        batch: list[_Entry] = []
        expired: list[_Entry] = []
        with self._changed:
            waiting = [queue for queue in self._queues.values() if queue]
            if not waiting:
                return batch, expired
            queue = min(waiting, key=lambda queue: next(iter(queue)))
            bucket = queue[next(iter(queue))].bucket
            count = self._device.batch_for(bucket, len(queue))
            now = self._clock()
            while queue and len(batch) < count:
                _, entry = queue.popitem(last=False)
                self._waiting_tokens -= bucket
                # From here on the owner can no longer cancel; False means that it just has.
                if not entry.future.set_running_or_notify_cancel():
                    continue
                late = entry.deadline is not None and entry.deadline <= now
                (expired if late else batch).append(entry)
        return batch, expired

    def _run(self, batch: list[_Entry]) -> None:
        started = self._clock()
        try:
            outputs = self._device.run([entry.ids for entry in batch], batch[0].bucket)
        except Exception as error:
            log_failure(f"A batch of {len(batch)} texts failed", error)
            self._run_apart(batch)
            return
        seconds = self._clock() - started
        for entry, output in zip(batch, outputs, strict=True):
            _deliver(entry, Scored(output, started - entry.enqueued, seconds))

    def _run_apart(self, batch: list[_Entry]) -> None:
        """After a failed batch: one text's failure is not its batch-mates', and a lost device is not one text's."""
        if len(batch) > 1:
            for entry in batch:
                if entry.deadline is not None and entry.deadline <= self._clock():
                    _deliver(entry, DeadlineExceeded("The deadline passed while the text was tried again."))
                else:
                    self._run([entry])
            return
        self._device.check()
        _deliver(batch[0], InternalError("The server failed on this text; its log says why."))

    def _loop(self) -> None:
        try:
            while self._wait():
                self.step()
        except BaseException as error:  # whatever ended the loop, those who wait must hear of it
            log_failure("The device loop died", error)
            self._die()

    def _wait(self) -> bool:
        """Blocks until something waits (True), or nothing ever will again (False)."""
        with self._changed:
            while not self._waiting_tokens and self._refusal is None:
                self._changed.wait()
            return self._waiting_tokens > 0

    def _die(self) -> None:
        with self._changed:
            self._dead = True
            self._refusal = "The server has lost its device and needs a restart; send the text to another one."
            left = [entry for queue in self._queues.values() for entry in queue.values()]
            for queue in self._queues.values():
                queue.clear()
            self._waiting_tokens = 0
        for entry in left:
            if entry.future.set_running_or_notify_cancel():
                _deliver(entry, Unavailable(self._refusal))
        self._on_death()


def _deliver(entry: _Entry, result: Scored | ClasserError) -> None:
    if isinstance(result, Scored):
        entry.future.set_result(result)
    else:
        entry.future.set_exception(result)
