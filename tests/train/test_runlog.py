import io
import json
import math
from pathlib import Path

import pytest

from classer.train.runlog import RunLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that grow only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def records(folder: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def train(log: RunLog, clock: Clock, steps: range, *, loss: float = 1.0, seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        log.step(step, loss, tokens=500, lr=0.1)


def test_each_step_is_one_json_object_a_line(tmp_path, clock):
    with RunLog(tmp_path, 3, stream=io.StringIO(), clock=clock) as log:
        train(log, clock, range(1, 3), loss=0.25)
        log.scalars(2, {"dev/accuracy": 0.5})
    assert records(tmp_path) == [
        {"step": 1, "seconds": 1.0, "loss": 0.25, "lr": 0.1, "tokens_per_second": 500.0},
        {"step": 2, "seconds": 2.0, "loss": 0.25, "lr": 0.1, "tokens_per_second": 500.0},
        {"step": 2, "seconds": 2.0, "dev/accuracy": 0.5},
    ]


def test_without_a_terminal_a_plain_line_comes_every_ten_seconds(tmp_path, clock):
    stream = io.StringIO()
    with RunLog(tmp_path, 1_000, stream=stream, clock=clock) as log:
        train(log, clock, range(1, 26))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 10/1,000 · loss 1.0000 · 500 tokens/s · 16:30 left",
        "step 20/1,000 · loss 1.0000 · 500 tokens/s · 16:20 left",
    ]


def test_last_step_is_always_said(tmp_path, clock):
    stream = io.StringIO()
    with RunLog(tmp_path, 2, stream=stream, clock=clock) as log:
        train(log, clock, range(1, 3))
    assert stream.getvalue() == "step 2/2 · loss 1.0000 · 500 tokens/s · 00:00 left\n"


def test_terminal_shows_a_bar_and_lines_above_it(tmp_path, clock):
    stream = Terminal()
    with RunLog(tmp_path, 4, stream=stream, clock=clock) as log:
        train(log, clock, range(1, 3))
        log.say("dev accuracy 0.93")
        train(log, clock, range(3, 5))
    shown = stream.getvalue()
    assert "4/4" in shown
    assert "loss 1.0000 · 500 tokens/s" in shown
    assert "\rdev accuracy 0.93\n" in shown or "\ndev accuracy 0.93\n" in shown


def test_shown_loss_is_smoothed_without_a_bias_towards_zero(tmp_path, clock):
    stream = io.StringIO()
    with RunLog(tmp_path, 20, stream=stream, clock=clock) as log:
        train(log, clock, range(1, 10), loss=2.0)
        train(log, clock, range(10, 11), loss=4.0)
    shown = float(stream.getvalue().split("loss ")[1].split()[0])
    # The average weighs step i by 0.95^(10 − i).
    weights = [0.95 ** (10 - i) for i in range(1, 11)]
    assert shown == pytest.approx((2 * sum(weights[:-1]) + 4 * weights[-1]) / sum(weights), abs=1e-4)


def test_speed_is_of_the_last_steps_not_of_a_slow_start(tmp_path, clock):
    with RunLog(tmp_path, 1_000, stream=io.StringIO(), clock=clock) as log:
        train(log, clock, range(1, 2), seconds=60.0)  # the first step compiles
        assert log.tokens_per_second == pytest.approx(500 / 60)
        train(log, clock, range(2, 60))
        assert log.tokens_per_second == pytest.approx(500)


def test_nan_loss_is_logged_as_null_and_forgotten_by_the_average(tmp_path, clock):
    stream = io.StringIO()
    with RunLog(tmp_path, 3, stream=stream, clock=clock) as log:
        train(log, clock, range(1, 2))
        train(log, clock, range(2, 3), loss=math.nan)
        train(log, clock, range(3, 4))
    assert records(tmp_path)[1]["loss"] is None
    assert "loss 1.0000" in stream.getvalue()


def test_resumed_run_holds_each_step_once(tmp_path, clock):
    with RunLog(tmp_path, 9, stream=io.StringIO(), clock=clock) as log:
        train(log, clock, range(1, 6), loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the crash
    # The last checkpoint is of step 3.
    with RunLog(tmp_path, 9, start_step=3, stream=io.StringIO(), clock=clock) as log:
        train(log, clock, range(4, 10), loss=2.0)
    found = [(r["step"], r["loss"]) for r in records(tmp_path)]
    assert found == [(s, 1.0) for s in (1, 2, 3)] + [(s, 2.0) for s in range(4, 10)]


def test_new_run_starts_with_an_empty_log(tmp_path, clock):
    for _ in range(2):
        with RunLog(tmp_path, 2, stream=io.StringIO(), clock=clock) as log:
            train(log, clock, range(1, 3))
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_scalars(tmp_path, clock):
    with RunLog(tmp_path, 2, stream=io.StringIO(), clock=clock) as log:
        log.scalars(2, {"dev/accuracy": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"dev/accuracy" in events.read_bytes()
