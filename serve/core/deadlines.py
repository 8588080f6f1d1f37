"""The policy for deadlines: how a caller's deadline is divided, and which texts can be answered within theirs.

It rests on two estimates: how long an answer takes from the device to its caller (`LatencyEstimate`, `divide`), and how
long the device takes over a batch (`BatchTimes`). No threads and no clock; all times are seconds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

# `LatencyEstimate` estimates as TCP does for round trips (RFC 6298 §2): a moving mean plus four moving deviations.
MEAN_RATE, DEVIATION_RATE, DEVIATIONS = 1 / 8, 1 / 4, 4
# The largest part of a deadline that is set aside for the answer's way back. Whatever the estimate, a text that finds
# the device free is run, and its measurement corrects the estimate.
MAX_WAY_BACK_SHARE = 0.5
# The smallest: so many seconds, or this part of a short deadline. The network's part of the way is not measured here.
MIN_WAY_BACK, MIN_WAY_BACK_SHARE = 0.04, 0.1
# How fast predictions follow the batches that run, and the range of the factor on the warm-up's measurements.
DRIFT_RATE = 0.1
DRIFT_RANGE = (0.25, 8.0)
# How fast the mean text follows those that are queued.
TEXT_RATE = 0.05
# A text is taken on if its deadline leaves this factor of the predicted time.
MARGIN = 1.4


@dataclasses.dataclass
class LatencyEstimate:
    """A running estimate of a latency that varies.

    Attributes:
      mean: the moving mean.
      deviation: the moving mean of the distance from it.
    """

    mean: float = 0.0
    deviation: float = 0.0

    @property
    def upper(self) -> float:
        """What the latency exceeds only rarely."""
        return self.mean + DEVIATIONS * self.deviation

    def add(self, seconds: float) -> None:
        """Takes a measurement into the estimate."""
        self.deviation += DEVIATION_RATE * (abs(seconds - self.mean) - self.deviation)
        self.mean += MEAN_RATE * (seconds - self.mean)


class DeadlineParts(NamedTuple):
    """A caller's deadline, divided.

    Attributes:
      device: when the device must be done: the caller's deadline less the way back; None if there is no deadline.
      give_up: when the call is answered without the text: half of the way back later; infinite if there is no deadline.
    """

    device: float | None
    give_up: float


def divide(now: float, seconds: float | None, way_back: LatencyEstimate) -> DeadlineParts:
    """Divides a deadline that is `seconds` away (None: there is none) between the device and the answer's way back."""
    if seconds is None:
        return DeadlineParts(None, math.inf)
    least = min(MIN_WAY_BACK, MIN_WAY_BACK_SHARE * seconds)
    reserved = min(max(way_back.upper, least), MAX_WAY_BACK_SHARE * seconds)
    device = now + seconds - reserved
    return DeadlineParts(device, device + reserved / 2)


class BatchTimes:
    """Predicts how long the device takes: the warm-up's measurements times a factor that follows the last batches."""

    def __init__(self) -> None:
        self._drift = 1.0
        self._text_seconds = 0.0  # moving mean over texts of each one's share of a full batch, as the warm-up measured

    def predict(self, measured: float) -> float:
        """The time of what took `measured` at warm-up."""
        return measured * self._drift

    @property
    def per_text(self) -> float:
        """The predicted time of a text whose length is not known yet; 0 before the first text."""
        return self.predict(self._text_seconds)

    def queued(self, measured: float) -> None:
        """Takes in a text's share of a full batch, as the warm-up measured it."""
        self._text_seconds += TEXT_RATE * (measured - self._text_seconds)

    def ran(self, measured: float, seconds: float) -> None:
        """Takes in that a batch which took `measured` at warm-up has now taken `seconds`."""
        low, high = DRIFT_RANGE
        self._drift += DRIFT_RATE * (min(max(seconds / max(measured, 1e-9), low), high) - self._drift)

    def in_time(self, count: int, left: float, wait: float) -> int:
        """How many of `count` texts of unknown length have their turn before a deadline.

        Args:
          count: the texts.
          left: until the deadline.
          wait: predicted until the first one's turn; if it is 0 the device is free, and at least one text is tried.
        """
        if self.per_text <= 0:
            return count
        turns = math.floor((left / MARGIN - wait) / self.per_text) + 1
        return min(count, max(turns, 1 if wait == 0 else 0))

    def fits(self, left: float, wait: float, measured: float) -> bool:
        """Whether a batch that took `measured` at warm-up, and starts after `wait`, ends before a deadline."""
        return MARGIN * (wait + self.predict(measured)) <= left
