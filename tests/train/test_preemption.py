"""What signals do to a run, by themselves; whole runs that are stopped are in test_launch.py and test_commands.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from classer.train.preemption import CheckpointSchedule, Stopped, deferred, listen


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listen()
    yield
    listen()  # forgets what was noted
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_an_interrupt_waits_for_the_end_of_a_step(capfd: pytest.CaptureFixture[str]) -> None:
    pace, steps = CheckpointSchedule(0, 0), []

    def loop() -> None:
        with deferred():
            pace.after(1)
            send(signal.SIGINT)
            steps.append(2)
            pace.after(2)
            steps.append(3)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert steps == [2]
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_interrupt_does_not_wait() -> None:
    def loop() -> None:
        with deferred():
            send(signal.SIGINT)
            send(signal.SIGINT)
            pytest.fail("the second one was only noted")

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_an_interrupt_after_the_last_step_is_heard() -> None:
    with pytest.raises(KeyboardInterrupt), deferred():
        send(signal.SIGINT)


def test_outside_of_the_loop_signals_act_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    with pytest.raises(Stopped):
        send(signal.SIGTERM)


def test_a_stop_is_told_at_the_end_of_a_step() -> None:
    pace = CheckpointSchedule(0, 0)
    assert pace.after(1) == (False, False)

    def loop() -> None:
        with deferred():
            send(signal.SIGTERM)
            assert pace.after(2) == (True, True)

    with pytest.raises(Stopped):
        loop()
