"""Batches of a curriculum's stage: fixed shares, every example once per pass, and resumption at any step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from classer.data import curriculum
from classer.data.curriculum import sampling_shares
from classer.data.errors import InputError
from classer.data.pipeline import Batch, TrainExamples, stage_batches


def make(sizes: list[int], shares: list[float], *, num_steps: int = 600, batch_size: int = 4, stage: int = 0, seed=0):
    """Every token of the n-th example (from 1) is n; lengths vary."""
    count = sum(sizes)
    ids = [np.full(5 + 13 * (n % 7), n + 1, np.int32) for n in range(count)]
    tasks_N = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    targets, shares_N = csr_array(np.eye(count, dtype=np.float32)), np.linspace(0, 1, count, dtype=np.float32)
    examples = TrainExamples(ids, targets, tasks_N, csr_array(0.5 * targets), shares_N)
    return stage_batches(examples, np.array(shares), num_steps, batch_size=batch_size, seed=seed, stage=stage, pad_id=0)


def numbers(batch: Batch) -> list[int]:
    return (batch.tokens_BS[:, 0] - 1).tolist()


def same(left: Batch, right: Batch) -> bool:
    return all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(Batch)
    )


def test_temperature_evens_tasks_out_and_weights_multiply() -> None:
    np.testing.assert_allclose(sampling_shares([10, 90, 0], [1, 1, 1], 1), [0.1, 0.9, 0])
    np.testing.assert_allclose(sampling_shares([10, 90, 0], [1, 1, 1], 2), [0.25, 0.75, 0])
    np.testing.assert_allclose(sampling_shares([10, 90, 5], [1, 1, 0], 1e9), [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(sampling_shares([10, 90], [3, 1], 1), [0.25, 0.75])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_tasks_come_in_their_shares_and_their_examples_in_turn(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes)))
    shares_T = np.array(weights) / np.sum(weights)
    batches = make(sizes, shares_T.tolist(), num_steps=curriculum.WINDOW * 2)
    seen = Counter()
    for window in range(2):
        for step in range(window * curriculum.WINDOW, (window + 1) * curriculum.WINDOW):
            batch = batches.batch(step)
            assert batch.weights_B.all()
            seen.update(numbers(batch))
        rows = (window + 1) * curriculum.WINDOW * 4
        first = np.cumsum([0, *sizes])
        for task, share in enumerate(shares_T):
            counts = [seen[n] for n in range(first[task], first[task + 1])]
            assert abs(sum(counts) - share * rows) <= 1
            assert max(counts) - min(counts) <= 1  # no example is repeated before all others were drawn
        assert batches.plan.drawn((window + 1) * curriculum.WINDOW).sum() == rows


def test_a_task_of_no_share_is_not_drawn_however_many_rows_there_are() -> None:
    for shares in ([0.1] * 10 + [0.0], [0.0] + [0.1] * 10, [1 / 3] * 3 + [0.0, 0.0]):
        plan = make([1] * len(shares), shares).plan
        for steps in (1, 3, 256, 10**7 + 1, 10**9, 10**12 + 7):
            due_T = plan.due(steps)
            assert due_T.sum() == 4 * steps
            assert not due_T[np.array(shares) == 0].any()
            np.testing.assert_allclose(due_T, np.array(shares) * 4 * steps, atol=1 + 1e-11 * steps)


def test_what_was_drawn_is_counted_from_the_batches() -> None:
    batches = make([30, 0, 20, 5], [0.5, 0, 0.3, 0.2])
    for steps in (0, 1, 100, 300):
        tasks = [task for step in range(steps) for task in batches.batch(step).tasks_B.tolist()]
        assert batches.plan.drawn(steps).tolist() == np.bincount(tasks, minlength=4).tolist()
    window = make([30, 0, 20, 5], [0.5, 0, 0.3, 0.2]).plan
    assert batches.plan.drawn(100).tolist() != window.due(100).tolist()  # within a window the shares are random


def test_tasks_and_targets_belong_to_the_examples() -> None:
    batch = make([30, 20], [0.5, 0.5]).batch(7)
    for row, number in enumerate(numbers(batch)):
        assert batch.tasks_B[row] == (number >= 30)
        assert batch.targets_BL[row].argmax() == number
        assert batch.soft_BL is not None
        assert batch.soft_BL[row].argmax() == number


def test_the_next_hundred_batches_after_a_stop_in_the_middle_are_those_that_would_have_come() -> None:
    whole = iter(make([50, 30, 7], [0.5, 0.3, 0.2]))
    before = [next(whole) for _ in range(211)]
    state = whole.get_state()
    to_come = list(islice(whole, 100))  # across a window's boundary
    resumed = iter(make([50, 30, 7], [0.5, 0.3, 0.2]))
    resumed.set_state(state)
    for expected, got in zip(to_come, islice(resumed, 100), strict=True):
        assert same(expected, got)
    assert not same(before[0], to_come[0])


@pytest.mark.parametrize("change", [{"seed": 1}, {"stage": 1}, {"shares": [0.4, 0.4, 0.2]}, {"sizes": [50, 30, 8]}])
def test_a_position_of_other_batches_is_refused(change: dict) -> None:
    state = iter(make([50, 30, 7], [0.5, 0.3, 0.2])).get_state()
    arguments = {"sizes": [50, 30, 7], "shares": [0.5, 0.3, 0.2], **change}
    other = make(arguments.pop("sizes"), arguments.pop("shares"), **arguments)
    with pytest.raises(InputError, match="was taken with other examples"):
        iter(other).set_state(state)


def test_stages_and_seeds_shuffle_differently() -> None:
    first = make([50], [1.0]).batch(0)
    assert same(first, make([50], [1.0]).batch(0))
    assert not same(first, make([50], [1.0], stage=1).batch(0))
    assert not same(first, make([50], [1.0], seed=1).batch(0))


def test_a_task_without_examples_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="A task without examples is drawn"):
        make([5, 0], [0.5, 0.5])
