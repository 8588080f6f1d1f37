"""The deadline policy by itself: no clock, no queue, no device."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classer.serve.core.deadlines import (
    DRIFT_RANGE,
    MARGIN,
    MIN_RETRY_SECONDS,
    LatencyEstimate,
    ResponsePath,
    RunTimes,
    too_late,
)


@given(st.lists(st.floats(0.0, 10.0), min_size=200, max_size=300))
def test_an_estimate_bounds_what_repeats(values: list[float]) -> None:
    estimate = LatencyEstimate()
    for value in [*values, *[3.0] * 200]:
        estimate.add(value)
    assert estimate.mean == pytest.approx(3.0, abs=0.01)
    assert estimate.upper >= 3.0 - 0.01


@given(st.floats(1e-3, 1e4), st.floats(0, 1e4), st.floats(0, 100))
def test_at_least_half_of_a_deadline_is_the_device_s(seconds: float, mean: float, spread: float) -> None:
    deadline, give_up = ResponsePath(LatencyEstimate(mean, spread)).limits(seconds, now=0.0)
    assert deadline is not None
    assert seconds / 2 * (1 - 1e-9) <= deadline <= give_up < seconds


def test_without_a_deadline_nothing_is_given_up() -> None:
    assert ResponsePath().limits(None, now=5.0) == (None, math.inf)


def test_a_call_teaches_the_path_only_what_was_not_the_device() -> None:
    path = ResponsePath()
    path.add(total=1.0, on_device=1.5)  # clocks of two threads
    assert path.estimate.mean == 0
    path.add(total=1.0, on_device=0.2)
    assert path.estimate.mean == pytest.approx(0.8 / 8)


def test_one_batch_moves_the_drift_by_a_tenth_of_its_clipped_ratio() -> None:
    times = RunTimes()
    times.add_batch(seconds=2.0, measured=1.0)
    assert times.drift == pytest.approx(1.1)
    for _ in range(500):
        times.add_batch(seconds=1e6, measured=1.0)
    assert times.drift == pytest.approx(DRIFT_RANGE[1])


@given(st.integers(1, 100), st.floats(0, 50), st.floats(0, 50))
def test_as_many_fit_as_are_not_missed(count: int, left: float, wait: float) -> None:
    times = RunTimes()
    for _ in range(300):
        times.add_text(0.5)
    fit = times.fitting(count, left, wait)
    assert 0 <= fit <= count
    if wait == 0:
        assert fit >= 1
    elif fit:
        assert MARGIN * (wait + (fit - 1) * times.per_text) <= left * (1 + 1e-9)
    if 0 < fit < count:
        assert MARGIN * (wait + fit * times.per_text) > left * (1 - 1e-9)


def test_before_the_first_text_all_fit() -> None:
    assert RunTimes().fitting(7, left=0.001, wait=100.0) == 7


def test_the_margin_decides_what_misses() -> None:
    times = RunTimes()
    assert not times.misses(left=MARGIN * 3.0 + 1e-9, wait=1.0, measured=2.0)
    assert times.misses(left=MARGIN * 3.0 - 1e-6, wait=1.0, measured=2.0)
    assert not times.misses(math.inf, wait=1e9, measured=1e9)


def test_a_refusal_says_when_to_come_back() -> None:
    assert too_late(0.5, 2.0).retry_seconds == 2.0
    assert too_late(0.5, 0.0).retry_seconds == MIN_RETRY_SECONDS
