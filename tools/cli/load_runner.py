"""Makes the calls of a load test and writes down what became of each. All times are of the running event loop's clock.

An open loop calls at times set beforehand, whether or not earlier calls were answered, as independent users do. A
closed loop has a number of callers, each of which waits for its answer before it calls again, so that a slow server
slows its own test down. Axes: `N` calls.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np

from classer.serve.wire.errors import DeadlineExceeded, ServeError
from classer.serve.wire.status import CODES, code_of

OK, TIMED_OUT = "OK", "TIMED_OUT"
# The status that each error is on the wire; how a user of any client knows it. TIMED_OUT is not one: it is a deadline
# that ran out at the caller's before the server had said anything.
OUTCOMES = (OK, *(code.name for code in CODES.values()), TIMED_OUT)
_MEMORY_SECONDS = 0.5

# Makes the call of that number; one outcome for each of its texts. Raises a ServeError if it failed as a whole.
Call = Callable[[int], Awaitable[Sequence[str]]]


@dataclasses.dataclass
class Recorder:
    """What became of each call, in the order in which they were answered.

    Attributes:
      timeout: how long each caller waited at most, in seconds.
      due: when each call should have been sent, in seconds after the start.
      sent: when it was.
      done: when its answer was there.
      outcomes: of each call.
      texts: how many texts had which outcome.
    """

    timeout: float
    due: list[float] = dataclasses.field(default_factory=list)
    sent: list[float] = dataclasses.field(default_factory=list)
    done: list[float] = dataclasses.field(default_factory=list)
    outcomes: list[str] = dataclasses.field(default_factory=list)
    texts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    async def call(self, call: Call, number: int, start: float, due: float | None, texts: int) -> None:
        """Makes one call and notes it; `due` None means now."""
        time = asyncio.get_running_loop().time
        sent = time() - start
        try:
            outcomes = await call(number)
            # A batch none of whose texts was answered was refused, though the call itself ended well.
            outcome = OK if OK in outcomes else collections.Counter(outcomes).most_common(1)[0][0]
        except ServeError as error:
            outcome = code_of(error).name
            if isinstance(error, DeadlineExceeded) and time() - start - sent >= self.timeout:
                outcome = TIMED_OUT
            outcomes = [outcome] * texts
        self.done.append(time() - start)
        self.sent.append(sent)
        self.due.append(sent if due is None else due)
        self.outcomes.append(outcome)
        self.texts.update(outcomes)


async def run_open(
    call: Call,
    due_N: np.ndarray,
    *,
    timeout: float,
    texts: int,
    max_in_flight: int,
    progress: Callable[[float], object] = lambda _: None,
) -> Recorder:
    """Makes each call when it is due, however many are still unanswered, up to `max_in_flight`; then later ones wait.

    Args:
      call: makes one.
      due_N: seconds from now, ascending.
      timeout: the deadline that `call` gives each call, in seconds.
      texts: how many texts a call has.
      max_in_flight: bounds this process's memory. Calls held back by it are late, and their latency counts that.
      progress: told the seconds since the start, now and then.
    """
    loop = asyncio.get_running_loop()
    recorder = Recorder(timeout)
    slots = asyncio.Semaphore(max_in_flight)
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        try:
            await recorder.call(call, number, start, due, texts)
        finally:
            slots.release()

    start = loop.time()
    for number, due in enumerate(due_N.tolist()):
        wait = start + due - loop.time()
        if wait > 0:
            progress(loop.time() - start)
            await asyncio.sleep(wait)
        await slots.acquire()
        task = asyncio.create_task(one(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.gather(*tasks)
    progress(loop.time() - start)
    return recorder


async def run_closed(
    call: Call,
    *,
    callers: int,
    seconds: float,
    max_calls: int,
    timeout: float,
    texts: int,
    progress: Callable[[float], object] = lambda _: None,
) -> Recorder:
    """So many callers, each calling again as soon as it is answered, for `seconds` and at most `max_calls` in all."""
    loop = asyncio.get_running_loop()
    recorder = Recorder(timeout)
    numbers = iter(range(max_calls))
    start = loop.time()

    async def caller() -> None:
        while loop.time() - start < seconds and (number := next(numbers, None)) is not None:
            await recorder.call(call, number, start, None, texts)
            progress(loop.time() - start)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return recorder


async def watch_memory(pid: int, samples: list[tuple[float, float]]) -> None:
    """Notes (seconds from now, resident MB) of a process and all below it, until cancelled. Needs Linux's /proc."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while True:
        samples.append((loop.time() - start, resident_mb(pid)))
        await asyncio.sleep(_MEMORY_SECONDS)


def resident_mb(pid: int) -> float:
    """The resident memory of a process and all processes below it, in MB; pages that they share count for each."""
    process = Path(f"/proc/{pid}")
    try:
        status = (process / "status").read_text()
        children = [child for file in process.glob("task/*/children") for child in file.read_text().split()]
    except OSError:
        return 0.0  # it has ended
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024 / 1e6 + sum(resident_mb(int(child)) for child in children)
