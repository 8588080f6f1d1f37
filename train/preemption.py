"""Stopping a run in good order: SIGTERM saves and ends it, SIGINT ends it between two steps; and when to save."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from .distributed import any_process, is_initialized, is_primary, leave
from .process_info import STOPPED_CODE


class Stopped(Exception):
    """The run was stopped by SIGTERM, and its progress is saved.

    Args:
      sentence: the message for the user.
      together: whether all processes of the job stopped at the same step.
    """

    def __init__(self, sentence: str, *, together: bool = True) -> None:
        super().__init__(sentence)
        self.together = together


def end(stopped: Stopped) -> int:
    """Leaves the job after a stop; returns this process's exit code (see `process_info.STOPPED_CODE`)."""
    code = int(os.environ.get(STOPPED_CODE, "0"))
    if stopped.together or not is_initialized():
        leave()
        return code
    # `leave` would wait for all processes, and some may be in the middle of a collective operation.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class CheckpointSchedule:
    """When to save within an epoch, and when to stop: the same answer at the same step in every process.

    Args:
      steps: save every so many steps; 0 never.
      minutes: save when so many have passed since the last time, by the primary's clock; 0 never.
      clock: monotonic seconds.
    """

    def __init__(self, steps: int, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._seconds, self._clock = steps, minutes * 60, clock
        self._saved = clock()
        self._pending: Callable[[], tuple[bool, ...]] | None = None

    def after(self, step: int) -> tuple[bool, bool]:
        """(save, stop) after a step. With several processes, a clock's or signal's request takes effect a step later.

        Raises:
          KeyboardInterrupt: SIGINT came.
        """
        _signals.check()
        due = is_primary() and self._seconds > 0 and self._clock() - self._saved >= self._seconds
        asked, self._pending = self._pending, any_process(due, _signals.asked)
        if not is_initialized():
            asked = self._pending
        due, stop = asked() if asked is not None else (False, False)
        save = due or stop or (self._steps > 0 and step % self._steps == 0)
        if save:
            self._saved = self._clock()
        return save, stop


class _Signals:
    """Handles SIGTERM and SIGINT. Within `deferred` they are only noted, and the loop checks them between two steps.

    SIGTERM raises `Stopped`, after the loop has saved. SIGINT raises KeyboardInterrupt: in the middle of a step it
    could hit a callback of JAX or Orbax, where it is lost or leaves a lock behind. A second SIGINT does not wait.
    """

    def __init__(self) -> None:
        self.asked = False
        self.interrupted = False
        self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted or not self._deferred:
                raise KeyboardInterrupt
            self.interrupted = True
            os.write(2, b"\nclasser: stopping after this step; interrupt again to stop at once\n")
            return
        self.asked = True
        if not self._deferred:
            raise Stopped("Stopped; there was nothing new to save.", together=False)

    def __enter__(self) -> None:
        self._deferred = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if SIGINT came."""
        if self.interrupted:
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._deferred = False
        if kind is None:
            self.check()
        # The signal came after the last step at which `CheckpointSchedule` was asked.
        if kind is None and any_process(self.asked)()[0]:
            raise Stopped("Stopped at the end of a stage; it is saved.")


_signals = _Signals()


def listen() -> None:
    """Installs the handlers: from now on SIGTERM raises `Stopped`, and SIGINT ends the run between two steps.

    Call it after `distributed.join`, in the main thread.
    """
    _signals.asked = _signals.interrupted = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _signals)


def deferred() -> _Signals:
    """A context manager within which SIGTERM and SIGINT wait for `CheckpointSchedule.after`."""
    return _signals
