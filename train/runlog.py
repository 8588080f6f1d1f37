"""The log of a run: a progress bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import collections
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

from ..data.files import atomic_write
from .distributed import is_primary, is_quiet

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to draw a bar on
LOSS_SMOOTHING = 0.95  # of an exponential moving average over steps
RATE_WINDOW = 50  # steps that tokens per second and the time left are measured over


class RunLog:
    """The log of one run, in its folder.

    On a terminal a bar shows the smoothed loss, tokens per second and the time left; where stderr is no terminal, a
    plain line every 10 seconds says the same. `metrics.jsonl` gets one object a line: {"step", "seconds" (since this
    process began to log), …}; a number that JSON cannot hold (NaN, infinity) is null there. TensorBoard reads the
    folder `tensorboard`.

    A run that goes on from a checkpoint passes its step as `start_step`: what a cut-off run logged after it is dropped,
    so that no step stands twice.

    Args:
      folder: the run's folder; made if missing.
      total_steps: how many steps the whole run has.
      start_step: how many are done already.
      stream: where the bar or the lines go; stderr if None.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._last_line = clock()
        self._loss = 0.0
        self._loss_weight = 0.0
        # (time, step, tokens in all) after each of the last steps; the first entry is where the window starts.
        self._window = collections.deque([(self._start, start_step, 0)], maxlen=RATE_WINDOW + 1)

        path = folder / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {desc}",
            )

    def step(
        self,
        step: int,
        loss: float,
        tokens: int,
        lr: float,
        teacher_loss: float | None = None,
        relation_loss: float | None = None,
    ) -> None:
        """Logs one training step.

        Args:
          step: its number, from 1.
          loss: its mean loss.
          tokens: tokens it trained on, without padding.
          lr: its learning rate.
          teacher_loss: what a teacher's answers had in the loss, if there was one.
          relation_loss: how far the relations of the texts are from the teachers', if these are learnt.
        """
        now, loss = self._clock(), float(loss)
        self._window.append((now, step, self._window[-1][2] + int(tokens)))
        if math.isfinite(loss):  # one NaN would stay in the average for ever
            self._loss = LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * loss
            self._loss_weight = LOSS_SMOOTHING * self._loss_weight + (1 - LOSS_SMOOTHING)
        values = {"loss": loss, "lr": float(lr), "tokens_per_second": self.tokens_per_second}
        learnt = {"teacher_loss": teacher_loss, "relation_loss": relation_loss}
        self.scalars(step, values | {name: value for name, value in learnt.items() if value is not None})

        if self._bar is not None:
            self._bar.set_description_str(self._status(step), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = now
            self.say(f"step {step:,}/{self._total:,} · {self._status(step)}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers by name, such as the dev set's metrics, to metrics.jsonl and TensorBoard (not to the bar)."""
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        record: dict[str, Any] = {"step": step, "seconds": round(self._clock() - self._start, 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps; 0 before the first."""
        (start, _, tokens_before), (now, _, tokens) = self._window[0], self._window[-1]
        return (tokens - tokens_before) / (now - start) if now > start else 0.0

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._tensorboard.close()
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _status(self, step: int) -> str:
        loss = self._loss / self._loss_weight if self._loss_weight else math.nan
        (start, first, _), (now, last, _) = self._window[0], self._window[-1]
        left = max(self._total - step, 0) * (now - start) / max(last - first, 1)
        return f"loss {loss:.4f} · {self.tokens_per_second:,.0f} tokens/s · {tqdm.format_interval(left)} left"


def open_log(folder: Path, total_steps: int, *, start_step: int = 0) -> RunLog:
    """The log of a run; one that prints and writes nothing in all processes but the first, and where `is_quiet`."""
    return (RunLog if is_primary() and not is_quiet() else _Silence)(folder, total_steps, start_step=start_step)


class _Silence(RunLog):
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def step(self, *_: Any) -> None:
        pass

    def scalars(self, *_: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _drop_after(path: Path, step: int) -> None:
    """Rewrites a metrics.jsonl without the lines after `step`, nor one that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("step", 0) <= step and line.endswith("\n"):
            kept.append(line)
    with atomic_write(path) as part:
        part.write_text("".join(kept), encoding="utf-8")
