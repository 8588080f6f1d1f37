"""The load test: its arrivals, its clock, its verdicts; and one real run against a real server."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import selectors
import shutil
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from scipy import stats

from classer.serve.wire.errors import DeadlineExceeded, Forbidden, InternalError, Overloaded, Unauthenticated
from classer.tools.cli.load_report import Summary, describe, summarise, write_load_report
from classer.tools.cli.load_runner import OK, Call, Recorder, resident_mb, run_closed, run_open
from classer.tools.cli.load_schedule import Segment, arrivals
from classer.tools.cli.load_test import LoadTestArguments, search, why_not_held

from ..conftest import Classer, Trained

T = TypeVar("T")
TIMEOUT = 60.0


class _NoWait(selectors.DefaultSelector):
    """Never waits; it moves its loop's clock on instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits for something that never comes"
        self.now += timeout
        return super().select(0)


def in_no_time(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on an event loop whose clock moves only while everything sleeps, and then at once."""
    selector = _NoWait()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


# Arrivals


@pytest.mark.parametrize(("first", "last"), [(200.0, 200.0), (10.0, 400.0), (400.0, 0.0)])
def test_arrivals_are_a_poisson_process_of_that_rate(first: float, last: float) -> None:
    """The mean number of calls up to each arrival, which a rate of 1 has in its place, has exponential gaps."""
    segment = Segment(60.0, first, last)
    due_N = arrivals([segment], np.random.default_rng(0))
    assert np.all(np.diff(due_N) >= 0)
    assert due_N.min() >= 0
    assert due_N.max() <= 60
    assert abs(len(due_N) - segment.calls) < 5 * np.sqrt(segment.calls)
    slope = (last - first) / 60.0
    calls_N = first * due_N + slope * due_N**2 / 2
    assert stats.kstest(np.diff(calls_N, prepend=0.0), "expon").pvalue > 1e-3
    # The same times are not a process of another rate.
    assert stats.kstest(np.diff(1.2 * calls_N, prepend=0.0), "expon").pvalue < 1e-3


def test_steps_follow_one_another() -> None:
    segments = [Segment(10.0, rate, rate) for rate in (100.0, 400.0, 50.0)]
    due_N = arrivals(segments, np.random.default_rng(1))
    counts = np.histogram(due_N, bins=[0, 10, 20, 30])[0]
    assert np.all(np.abs(counts - [1000, 4000, 500]) < 5 * np.sqrt([1000, 4000, 500]))
    assert np.all(np.diff(due_N) >= 0)


# The clock


def served_in(seconds: float, *, stall: tuple[float, float] = (0.0, 0.0), servers: int = 1) -> Call:
    """A server that takes so long over each call, so many at a time, and answers none between the two times."""
    free: list[float] = [0.0] * servers

    async def call(_: int) -> Sequence[str]:
        now = asyncio.get_running_loop().time()
        slot = free.index(min(free))
        start = max(now, free[slot])
        if stall[0] <= start < stall[1]:
            start = stall[1]
        free[slot] = start + seconds
        await asyncio.sleep(free[slot] - now)
        return (OK,)

    return call


def test_a_stall_counts_for_all_calls_that_were_due_in_it() -> None:
    """100 calls a second of 1 ms each, and a second in which nothing is answered: a tenth of ten seconds' calls suffer.

    A generator that lets one call at a time out sends almost all of them late, and so sees one slow call only.
    """
    due_N = np.arange(0.005, 10, 0.01)
    stalling = functools.partial(served_in, 0.001, stall=(4.0, 5.0))
    recorder = in_no_time(run_open(stalling(), due_N, timeout=10, texts=1, max_in_flight=1))
    summary = summarise(recorder, 10.0)
    assert summary.latency_ms["p95"] > 400  # the middle of the suffering tenth waited for half a second
    assert summary.latency_ms["max"] == pytest.approx(996, abs=2)
    assert summary.from_send_ms["p99"] == pytest.approx(1, abs=0.1)
    assert summary.send_lag_ms["max"] == pytest.approx(986, abs=3)
    # With room for all of them each is sent when due, and the two agree.
    summary = summarise(in_no_time(run_open(stalling(), due_N, timeout=10, texts=1, max_in_flight=1000)), 10.0)
    assert summary.send_lag_ms["max"] == pytest.approx(0, abs=0.01)
    assert summary.latency_ms == pytest.approx(summary.from_send_ms)
    assert summary.latency_ms["p95"] > 400


def test_an_open_loop_does_not_wait_for_answers() -> None:
    due_N = np.arange(0.0, 1.0, 0.1)
    recorder = in_no_time(run_open(served_in(5.0, servers=10), due_N, timeout=9, texts=1, max_in_flight=100))
    assert recorder.sent == pytest.approx(due_N)
    assert recorder.done == pytest.approx(due_N + 5)


def test_a_closed_loop_is_as_fast_as_its_server() -> None:
    recorder = in_no_time(
        run_closed(served_in(0.1, servers=2), callers=4, seconds=10, max_calls=10_000, timeout=9, texts=1)
    )
    summary = summarise(recorder, 10.0)
    assert summary.answered == pytest.approx(20, rel=0.03)
    assert summary.latency_ms["p50"] == pytest.approx(200, rel=0.01)
    counted = in_no_time(run_closed(served_in(0.1), callers=4, seconds=10, max_calls=7, timeout=9, texts=1))
    assert len(counted.done) == 7


def test_every_call_is_counted_by_what_became_of_it() -> None:
    """A refusal after 5 ms, a deadline that the server saw, one that it did not, and a batch of mixed texts."""

    async def call(number: int) -> Sequence[str]:
        if number % 4 == 0:
            await asyncio.sleep(0.005)
            raise Overloaded("Full.")
        if number % 4 == 1:
            raise DeadlineExceeded("It cannot be met.")
        if number % 4 == 2:
            await asyncio.sleep(2.0)
            raise DeadlineExceeded("Nothing came.")
        return (OK, "RESOURCE_EXHAUSTED")

    recorder = in_no_time(run_open(call, np.linspace(0, 1, 8), timeout=2.0, texts=2, max_in_flight=100))
    summary = summarise(recorder, 1.0)
    assert summary.outcomes == {"OK": 2, "RESOURCE_EXHAUSTED": 2, "DEADLINE_EXCEEDED": 2, "TIMED_OUT": 2}
    assert summary.text_outcomes == {"OK": 2, "RESOURCE_EXHAUSTED": 6, "DEADLINE_EXCEEDED": 4, "TIMED_OUT": 4}
    assert summary.failed_share == 0.75
    assert summary.refused_ms["max"] == pytest.approx(5)
    assert summary.refused_ms["p50"] == pytest.approx(2.5)
    assert "| TIMED_OUT | 2 | 25.00% |" in describe(summary)


def test_a_refused_key_is_not_taken_for_a_server_s_failure() -> None:
    errors = [Unauthenticated("Who?"), Forbidden("Not you."), InternalError("It broke.")]

    async def call(number: int) -> Sequence[str]:
        raise errors[number]

    recorder = in_no_time(run_open(call, np.arange(3.0), timeout=2.0, texts=1, max_in_flight=100))
    assert summarise(recorder, 3.0).outcomes == {"UNAUTHENTICATED": 1, "PERMISSION_DENIED": 1, "INTERNAL": 1}


def test_a_batch_of_which_nothing_was_answered_was_refused() -> None:
    async def call(number: int) -> Sequence[str]:
        return (
            ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED") if number else ("INTERNAL", OK, "INTERNAL")
        )

    recorder = in_no_time(run_open(call, np.zeros(2), timeout=2.0, texts=3, max_in_flight=1))
    assert recorder.outcomes == [OK, "DEADLINE_EXCEEDED"]
    assert recorder.texts == {OK: 1, "INTERNAL": 2, "RESOURCE_EXHAUSTED": 1, "DEADLINE_EXCEEDED": 2}


def test_windows_hold_the_calls_that_were_due_in_them() -> None:
    recorder = Recorder(1.0)
    for due, done, outcome in ((0.1, 0.2, OK), (0.9, 2.5, OK), (1.5, 1.6, "UNAVAILABLE")):
        recorder.due.append(due)
        recorder.sent.append(due)
        recorder.done.append(done)
        recorder.outcomes.append(outcome)
    first, second = summarise(recorder, 2.0).windows
    assert (first.calls, first.ok, second.calls, second.ok) == (2, 2, 1, 0)
    assert first.p50_ms == pytest.approx((100 + 1600) / 2)
    assert second.p50_ms is None
    assert summarise(recorder, 2.0).late == 1


# The search


@pytest.mark.parametrize("first", [20.0, 1000.0])
def test_the_search_ends_near_the_capacity_from_below(first: float) -> None:
    """A single server of 10 ms a call: its queue stays short up to nearly 100 calls a second, and grows beyond."""

    a = LoadTestArguments(data=Path("texts.csv"), mode="search", rate=first, seconds=30.0, target_ms=200.0)
    tries = in_no_time(search(served_in(0.01), a, np.random.default_rng(0)))
    highest = max(one.rate for one in tries if one.held)
    # M/D/1: at 90 % load the 99th percentile of the wait is about 21 service times.
    assert 75 < highest < 97
    assert min(one.rate for one in tries if not one.held) - highest <= 0.05 * 100
    assert len(tries) < 14


def test_a_test_at_its_own_limit_is_no_verdict_on_the_server() -> None:
    recorder = Recorder(10.0)
    for i in range(100):
        recorder.due.append(i / 100)
        recorder.sent.append(i / 100 + 0.08)
        recorder.done.append(i / 100 + 0.09)
        recorder.outcomes.append(OK)
    summary = summarise(recorder, 1.0)
    assert "the test is at its limit" in why_not_held(summary, 100.0, 0.001)
    assert why_not_held(summary, 1000.0, 0.001) == ""
    assert "p99 above" in why_not_held(dataclasses.replace(summary, send_lag_ms={"p99": 0.0}), 50.0, 0.001)
    failed = dataclasses.replace(summary, outcomes={OK: 90, "UNAVAILABLE": 10})
    assert why_not_held(failed, 1000.0, 0.01) == "10.00% of the calls failed"


def test_a_report_of_refusals_only_can_be_written(tmp_path: Path) -> None:
    async def call(_: int) -> Sequence[str]:
        raise Overloaded("Full.")

    recorder = in_no_time(run_open(call, np.linspace(0, 3, 9), timeout=2.0, texts=1, max_in_flight=100))
    summary: Summary = summarise(recorder, 3.0, memory_mb=[(0.0, 5.0), (1.0, 6.0)])
    write_load_report(tmp_path / "report", "All refused", {"rate": "3"}, summary, recorder)
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"load.json", "report.md", "timeline.png"}
    assert json.loads((tmp_path / "report" / "load.json").read_text())["summary"]["outcomes"] == {
        "RESOURCE_EXHAUSTED": 9
    }


def test_resident_memory_is_this_process_s() -> None:
    psutil = pytest.importorskip("psutil")
    assert resident_mb(os.getpid()) >= 0.8 * psutil.Process().memory_info().rss / 1e6


# The command


def test_a_real_run_leaves_a_report(classer: Classer, server: str, trained: Trained, tmp_path: Path) -> None:
    options = ("--data", trained.data, "--server", server, "--seconds", 2, "--warm-up", 0)
    done = classer(
        "load-test", *options, "--mode", "step", "--rates", 20, 60, "--connections", 2, "--out", tmp_path / "steps"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "steps" / "load.json").read_text())
    summary = data["summary"]
    assert set(summary["outcomes"]) == {"OK"}
    assert summary["text_outcomes"]["OK"] == summary["calls"]
    assert [window["seconds"] for window in summary["windows"]] == [2, 2]
    assert summary["windows"][0]["calls"] < summary["windows"][1]["calls"]
    assert data["settings"]["texts"].startswith("300, of ")
    report = (tmp_path / "steps" / "report.md").read_text()
    assert "latency.png" in report
    assert "| OK |" in done.stdout

    done = classer("load-test", *options, "--mode", "closed", "--callers", 3, "--batch", 7, "--max-calls", 12)
    assert done.returncode == 0, done.stderr
    assert "12 calls" in done.stdout


def test_a_task_folder_and_standard_input_name_texts(
    classer: Classer, server: str, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "task.json").write_text("{}")
    shutil.copy(trained.test, tmp_path / "dev.csv")
    options = ("--server", server, "--mode", "closed", "--callers", 1, "--max-calls", 3, "--warm-up", 0)
    done = classer("load-test", "--data", tmp_path, "--split", "dev", *options)
    assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
    done = classer("load-test", "--data", "-", *options, stdin=b'{"text": "rain"}\n')
    assert done.returncode == 0, done.stderr
    done = classer("load-test", "--data", tmp_path, *options)
    assert (done.returncode, done.stderr) == (2, f"classer: error: {tmp_path} has no split 'test'; it has dev.\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rate", "0"), "--rate is 0; give calls a second"),
        (("--rate", "1000", "--seconds", "3600"), "about 3,600,000 calls, but --max-calls is 1,000,000"),
        (("--batch", "2000"), "takes up to 1024 texts"),
        (("--server", "nowhere"), "an address is HOST:PORT"),
        (("--watch", "999999999"), "no such process"),
        (("--text-column", "body"), "body"),
        (("--server", "127.0.0.1:1"), "No healthy server"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_sentence(
    options: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    from classer.tools.cli.main import main

    data = tmp_path / "texts.csv"
    data.write_text("text\nmy card\n")
    assert main(["load-test", "--data", str(data), *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("classer: error: ")
    assert says in errors
