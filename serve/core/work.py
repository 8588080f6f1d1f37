"""What passes between those who have texts, the scheduler and the engines. No gRPC and no JAX."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ...model.evidence import Kept


class Priority(enum.IntEnum):
    """Which of two texts that came together is run first."""

    INTERACTIVE = 0
    BULK = 1


class Device(Protocol):
    """What the scheduler needs of an engine. Called by one thread at a time, but for `buckets` and `seconds`."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths, in tokens and ascending, that texts are padded to."""
        ...

    def batch_for(self, bucket: int, waiting: int) -> int:
        """How many of `waiting` texts of a bucket to run next: 1 … `waiting`."""
        ...

    def rows(self, bucket: int, count: int) -> int:
        """The rows of the program that `count` texts of a bucket run in; those left over cost the same empty."""
        ...

    def seconds(self, bucket: int, count: int) -> float:
        """What a batch of `count` texts of a bucket is expected to take."""
        ...

    def launch(self, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], Sequence[Output]]:
        """Starts N texts, at most as many as `rows` said; the function returned waits for what they give.

        Whatever either raises is these texts' failure.
        """
        ...

    def check(self) -> None:
        """Runs something known to work; whatever it raises means that the hardware is lost."""
        ...


class Output(NamedTuple):
    """What the device says of one text.

    Attributes:
      logits_L: (L,) float32, over all labels of the model.
      kept: the tokens that it read to the end; None where nothing is left out.
      precision: what the program computed in; empty where that is not known.
    """

    logits_L: np.ndarray
    kept: Kept | None = None
    precision: str = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """What became of one text.

    Attributes:
      output: what the device said.
      queue_seconds: from `submit` until its batch began.
      compute_seconds: what the device took over its batch.
    """

    output: Output
    queue_seconds: float
    compute_seconds: float


class BatchRun(NamedTuple):
    """What a batch was, for those who count.

    Attributes:
      device: whose it was.
      bucket: tokens a row.
      rows: of the program, filled or not.
      texts: in it.
      tokens: of these texts, without padding.
      seconds: that the device took.
      queue_seconds: how long each text waited for it.
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
      device: the model that is to read it.
      ids: its token ids, (S,).
      deadline: when the answer is of no more use.
      priority: whether someone waits for it.
    """

    device: Device
    ids: np.ndarray
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
