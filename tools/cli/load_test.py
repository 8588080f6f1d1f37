"""`classer load-test`: asks a running server with real texts, at a rate or as fast as it answers, and reports.

Latency is counted from the moment at which a call was *due*, not at which it was sent: a generator that waits for a
slow server before it goes on would leave out the very calls that suffer (coordinated omission; Gil Tene, "How NOT to
Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tqdm import tqdm

from classer.data.errors import InputError
from classer.serve.wire.limits import MAX_TEXTS

from .arguments import TextsArguments, parse
from .connection import ConnectionArguments

if TYPE_CHECKING:
    import numpy as np

    from classer.serve.client.client import AsyncClient

    from .load_report import Summary, Try
    from .load_runner import Call, Recorder
    from .load_schedule import Segment

Mode = Literal["poisson", "ramp", "step", "closed", "search"]
MAX_SECONDS = 3_600.0
# How near, relatively, the search comes to the highest rate.
SEARCH_PRECISION = 0.05
# Beyond this share of the wanted latency the delay of our own sending would be taken for the server's.
LAG_SHARE = 0.5
# A pause in which a server that was asked too much can clear its queue.
PAUSE_SECONDS = 2.0
WARM_UP_CALLERS = 4


@dataclasses.dataclass(frozen=True)
class LoadTestArguments(TextsArguments, ConnectionArguments):
    """
    Attributes:
      server: address of a running `classer serve`, HOST:PORT.
      task: name of the task; needed only if the model has several.
      mode: poisson: calls of independent users at --rate; ramp: from --rate to --to-rate; step: each of --rates in
        turn; closed: --callers callers, each of which waits for its answer; search: the highest rate at which 99 % of
        the answers arrive within --target-ms.
      rate: calls a second (search: the first that is tried).
      to_rate: of a ramp, calls a second at its end.
      rates: of steps, calls a second.
      callers: number of callers in the mode `closed`.
      seconds: duration of the load; of each step, and of each try of a search.
      batch: texts per call of ClassifyBatch; 0 sends one text per call of Classify.
      timeout: deadline of each call, in seconds.
      target_ms: limit of the 99th percentile in a search, in milliseconds.
      max_failed: share of calls that may fail in a search.
      max_calls: limit of the number of calls.
      max_in_flight: limit of unanswered calls; a call that is due beyond it waits, and the wait counts as latency.
      connections: number of connections that the calls are spread over.
      warm_up: seconds of calls before the measurement, which are not counted.
      watch: process id of the server on this machine, to report its memory (Linux).
      seed: of the arrival times and the order of the texts.
      out: a new folder for the report: load.json, report.md and pictures.
    """

    server: str = "localhost:50051"
    task: str | None = None
    mode: Mode = "poisson"
    rate: float = 50.0
    to_rate: float = 200.0
    rates: tuple[float, ...] = (50.0, 100.0, 200.0)
    callers: int = 16
    seconds: float = 30.0
    batch: int = 0
    timeout: float = 10.0
    target_ms: float = 100.0
    max_failed: float = 0.001
    max_calls: int = 1_000_000
    max_in_flight: int = 10_000
    connections: int = 1
    warm_up: float = 2.0
    watch: int | None = None
    seed: int = 0
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None

    def __post_init__(self) -> None:
        if ":" not in self.server:
            raise InputError(f"--server is '{self.server}'; an address is HOST:PORT, such as localhost:50051.")
        for option, value in (
            ("--rate", self.rate),
            ("--to-rate", self.to_rate),
            *(("--rates", r) for r in self.rates),
        ):
            if not 0 < value <= 1e6:
                raise InputError(f"{option} is {value:g}; give calls a second, above 0 and at most 1,000,000.")
        if not self.rates:
            raise InputError("--rates is empty; give the steps' calls a second, such as --rates 50 100 200.")
        for option, value, most in (("--seconds", self.seconds, MAX_SECONDS), ("--timeout", self.timeout, MAX_SECONDS)):
            if not 0 < value <= most:
                raise InputError(f"{option} is {value:g}; give seconds, above 0 and at most {most:,.0f}.")
        if not 0 <= self.warm_up <= MAX_SECONDS:
            raise InputError(f"--warm-up is {self.warm_up:g}; give seconds, from 0 to {MAX_SECONDS:,.0f}.")
        if not 0 <= self.batch <= MAX_TEXTS:
            raise InputError(
                f"--batch is {self.batch}; one call takes up to {MAX_TEXTS} texts, and 0 means one by one."
            )
        for option, value in (
            ("--callers", self.callers),
            ("--max-calls", self.max_calls),
            ("--max-in-flight", self.max_in_flight),
            ("--connections", self.connections),
        ):
            if value < 1:
                raise InputError(f"{option} is {value}; it must be at least 1.")
        if self.target_ms <= 0 or not 0 <= self.max_failed < 1:
            raise InputError("--target-ms must be above 0, and --max-failed from 0 to below 1.")
        if self.watch is not None and not Path(f"/proc/{self.watch}/status").exists():
            raise InputError(f"--watch is {self.watch}; there is no such process here.")
        if self.out is not None and self.out.exists():
            raise InputError(f"{self.out} exists already and was not touched; name a new folder with --out.")


def load_test(argv: Sequence[str]) -> None:
    """Load a running server with real texts and report its latency and throughput."""
    run_load_test(parse(LoadTestArguments, argv, "classer load-test", load_test.__doc__))


def run_load_test(arguments: LoadTestArguments) -> None:
    """Runs the test, prints what it found, and writes the report if a folder was named.

    Raises:
      InputError: the texts cannot be read, or it would make more calls than --max-calls.
      ServeError: no healthy server answers there, or it refuses the first call.
    """
    from classer.data.readers import data_file, read_texts

    texts = read_texts(data_file(arguments.data, arguments.split), text_column=arguments.text_column)
    _check_count(arguments)
    asyncio.run(_run(arguments, texts))


def segments_of(a: LoadTestArguments) -> list[Segment]:
    """The rate over time of an open loop."""
    from .load_schedule import Segment

    if a.mode == "ramp":
        return [Segment(a.seconds, a.rate, a.to_rate)]
    rates = a.rates if a.mode == "step" else (a.rate,)
    return [Segment(a.seconds, rate, rate) for rate in rates]


def _check_count(a: LoadTestArguments) -> None:
    calls = 0.0 if a.mode == "closed" else sum(segment.calls for segment in segments_of(a))
    if calls > a.max_calls:
        raise InputError(
            f"This would make about {calls:,.0f} calls, but --max-calls is {a.max_calls:,}; ask for less, or raise it."
        )


async def _run(a: LoadTestArguments, texts: Sequence[str]) -> None:
    import numpy as np

    from classer.serve.client.client import AsyncClient

    from .load_report import describe, write_load_report

    tls, key = a.connect_with()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(a.server, tls=tls, key=key, own_connection=True))
            for _ in range(a.connections)
        ]
        await clients[0].wait_until_healthy(5.0)
        await clients[0].classify(texts[0], a.task, timeout=a.timeout)  # what is wrong with every call is said here
        rng = np.random.default_rng(a.seed)
        call = make_call(clients, texts, a, rng)
        await _warm_up(call, a)
        title = f"{a.mode}, {'one text a call' if not a.batch else f'{a.batch} texts a call'}, {a.server}"
        settings = {name: str(value) for name, value in dataclasses.asdict(a).items() if name != "out"}
        lengths = np.array([len(text) for text in texts])
        settings["texts"] = (
            f"{len(texts):,}, of {np.median(lengths):.0f} characters at the median and {lengths.max()} at most"
        )
        settings["cores of this machine"] = str(os.cpu_count())
        if a.mode == "search":
            tries = await search(call, a, rng)
            held = max((one.rate for one in tries if one.held), default=None)
            found = "No rate that was tried was held." if held is None else f"Highest rate held: {held:,.1f} calls/s."
            print(f"\n{found} Wanted: p99 at most {a.target_ms:g} ms, at most {a.max_failed:.1%} not answered.")
            if a.out is not None:
                write_load_report(a.out, title, settings, None, None, tries, a.target_ms)
        else:
            recorder, summary = await measure_load(call, a, rng)
            print(f"\n{describe(summary)}")
            if a.out is not None:
                write_load_report(a.out, title, settings, summary, recorder)
        if a.out is not None:
            print(f"Report and pictures: {a.out}")


def make_call(
    clients: Sequence[AsyncClient], texts: Sequence[str], a: LoadTestArguments, rng: np.random.Generator
) -> Call:
    """What makes the call of a number: with its own texts, over one of the connections."""
    from classer.serve.wire.errors import ServeError
    from classer.serve.wire.status import code_of

    from .load_runner import OK

    order: list[int] = rng.permutation(len(texts)).tolist()
    width = max(a.batch, 1)

    async def call(number: int) -> Sequence[str]:
        client = clients[number % len(clients)]
        own = [texts[order[i % len(order)]] for i in range(number * width, (number + 1) * width)]
        if not a.batch:
            await client.classify(own[0], a.task, timeout=a.timeout)
            return (OK,)
        outcomes = await client.classify_batch(own, a.task, timeout=a.timeout)
        return [code_of(one).name if isinstance(one, ServeError) else OK for one in outcomes]

    return call


async def measure_load(call: Call, a: LoadTestArguments, rng: np.random.Generator) -> tuple[Recorder, Summary]:
    """One run of any mode but search, with the server's memory watched if asked."""
    from .load_report import summarise
    from .load_runner import run_closed, run_open, watch_memory
    from .load_schedule import arrivals

    memory: list[tuple[float, float]] = []
    watching = asyncio.create_task(watch_memory(a.watch, memory)) if a.watch is not None else None
    width = max(a.batch, 1)
    segments = [] if a.mode == "closed" else segments_of(a)
    seconds = a.seconds if a.mode == "closed" else sum(segment.seconds for segment in segments)
    # Each step is a window of its own.
    boundaries = [i * a.seconds for i in range(len(segments) + 1)] if a.mode == "step" else ()
    try:
        with _bar(seconds, a.mode) as progress:
            if a.mode == "closed":
                recorder = await run_closed(
                    call,
                    callers=a.callers,
                    seconds=a.seconds,
                    max_calls=a.max_calls,
                    timeout=a.timeout,
                    texts=width,
                    progress=progress,
                )
            else:
                due_N = arrivals(segments, rng)
                recorder = await run_open(
                    call, due_N, timeout=a.timeout, texts=width, max_in_flight=a.max_in_flight, progress=progress
                )
    finally:
        if watching is not None:
            watching.cancel()
    return recorder, summarise(recorder, seconds, boundaries, memory)


async def search(call: Call, a: LoadTestArguments, rng: np.random.Generator) -> list[Try]:
    """Doubles the rate until it is not held any more (or halves it until it is), then halves the space between.

    A rate is held if the 99th percentile, from when calls were due, stays within the target and no more than
    `max_failed` of the calls fail.
    """
    from .load_report import Try

    tries: list[Try] = []
    held, failed = 0.0, math.inf
    rate = a.rate
    while math.isinf(failed) or failed - held > SEARCH_PRECISION * failed:
        if rate * a.seconds > a.max_calls:
            print(f"Stopped before {rate:,.1f} calls/s: a try would make more calls than --max-calls.")
            break
        if rate * a.seconds < 100:
            print(f"Stopped before {rate:,.2f} calls/s: in {a.seconds:g} s there are too few calls for a percentile.")
            break
        _, summary = await measure_load(call, dataclasses.replace(a, mode="poisson", rate=rate), rng)
        why = why_not_held(summary, a.target_ms, a.max_failed)
        tries.append(Try(rate, not why, why, summary))
        print(f"  {rate:,.1f} calls/s: p99 {summary.latency_ms.get('p99', float('nan')):,.1f} ms; {why or 'held'}")
        if why:
            failed = rate
        else:
            held = rate
        rate = held * 2 if math.isinf(failed) else failed / 2 if not held else (held + failed) / 2
        await asyncio.sleep(PAUSE_SECONDS)
    return tries


def why_not_held(summary: Summary, target_ms: float, max_failed: float) -> str:
    """Why a rate was not held; empty if it was."""
    if summary.failed_share > max_failed:
        return f"{summary.failed_share:.2%} of the calls failed"
    if summary.send_lag_ms["p99"] > LAG_SHARE * target_ms:
        return f"this machine sent calls {summary.send_lag_ms['p99']:,.1f} ms late (p99): the test is at its limit"
    if summary.latency_ms["p99"] > target_ms:
        return f"p99 above {target_ms:g} ms"
    return ""


async def _warm_up(call: Call, a: LoadTestArguments) -> None:
    from .load_runner import run_closed

    if a.warm_up:
        await run_closed(
            call,
            callers=WARM_UP_CALLERS,
            seconds=a.warm_up,
            max_calls=a.max_calls,
            timeout=a.timeout,
            texts=max(a.batch, 1),
        )


@contextlib.contextmanager
def _bar(seconds: float, mode: str) -> Iterator[Callable[[float], None]]:
    """A progress bar over the seconds of a run; gives what to tell it."""
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
    every = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=round(seconds, 1), desc=mode, bar_format=shape, mininterval=every, miniters=0) as bar:

        def progress(now: float) -> None:
            bar.update(min(now, seconds) - bar.n)

        yield progress
