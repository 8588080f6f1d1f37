"""The types that pipeline, scheduler and engines exchange. No gRPC and no JAX."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ...model.evidence import Kept


class Priority(enum.IntEnum):
    """The order among texts that arrive together: the lower value is run first."""

    INTERACTIVE = 0
    BULK = 1


class Device(Protocol):
    """The part of an engine that the scheduler uses. Only `buckets` and `seconds` may be called by several threads."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths, in tokens and ascending, that texts are padded to."""
        ...

    def batch_for(self, bucket: int, waiting: int) -> int:
        """How many of `waiting` texts of a bucket to run in the next batch: 1 … `waiting`."""
        ...

    def rows(self, bucket: int, count: int) -> int:
        """The rows of the program that runs `count` texts of a bucket. Empty rows cost as much as filled ones."""
        ...

    def seconds(self, bucket: int, count: int) -> float:
        """The expected seconds of a batch of `count` texts of a bucket."""
        ...

    def launch(self, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], Sequence[Output]]:
        """Starts a batch of N texts, at most as many as `rows` says.

        Returns:
          A function that waits for the outputs of the N texts. An exception of it, or of `launch`, fails these texts.
        """
        ...

    def check(self) -> None:
        """Runs a batch that is known to work. An exception means that the device is lost."""
        ...


class Output(NamedTuple):
    """The device's output for one text.

    Attributes:
      logits_L: (L,) float32, over all labels of the model.
      kept: the tokens that were kept to the last layer; None if the model drops none.
      precision: what the program computed in; empty where that is not known.
    """

    logits_L: np.ndarray
    kept: Kept | None = None
    precision: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """The result of one text.

    Attributes:
      output: the device's output.
      queue_seconds: from `submit` until its batch started.
      compute_seconds: the run time of its batch.
    """

    output: Output
    queue_seconds: float
    compute_seconds: float


class BatchRun(NamedTuple):
    """A batch that was run, for metrics.

    Attributes:
      device: the device that ran it.
      bucket: tokens a row, padding included.
      rows: rows of the program, filled or not.
      texts: texts in the batch.
      tokens: tokens of these texts, without padding.
      seconds: run time.
      queue_seconds: how long each text was queued.
    """

    device: Device
    bucket: int
    rows: int
    texts: int
    tokens: int
    seconds: float
    queue_seconds: list[float]


class Work(NamedTuple):
    """One text to run.

    Attributes:
      device: the engine that runs it.
      ids: its token ids, (S,).
      deadline: when it must have been run, on the scheduler's clock; None if there is none.
      priority: its place among texts that arrive together.
    """

    device: Device
    ids: np.ndarray
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
