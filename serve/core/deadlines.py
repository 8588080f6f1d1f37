"""The deadline policy: what is left of a deadline for the device, when a text's turn comes, and what is refused.

`ResponsePath` estimates the seconds that an answer takes from the device to its caller and takes them off deadlines.
`RunTimes` predicts what the device needs, from the warm-up's measurements and what the last batches really took. Both
only compute: they have no clock and no lock. All times are seconds.
"""

from __future__ import annotations

import dataclasses
import math

from ..wire.errors import DeadlineExceeded

# A moving mean plus four moving deviations bounds nearly all values, as TCP bounds round trips (RFC 6298, section 2).
MEAN_RATE, SPREAD_RATE, SPREADS = 1 / 8, 1 / 4, 4
# The response path's bounds. At most this share of a deadline: a text that finds the device free is then always run,
# and its measurement corrects the estimate. At least so many seconds, or this share of a shorter deadline: the part of
# the path that lies outside this process is not measured.
MAX_RESPONSE_SHARE = 0.5
MIN_RESPONSE_SECONDS, MIN_RESPONSE_SHARE = 0.04, 0.1
# The rate of the moving ratio between real and measured run times, and the range that one batch's ratio is clipped to.
DRIFT_RATE = 0.1
DRIFT_RANGE = (0.25, 8.0)
# The rate of the moving mean of a text's run time.
TEXT_RATE = 0.05
# A deadline is accepted if it leaves this many times the predicted wait.
MARGIN = 1.4
# The shortest hint of a refusal: a caller who comes back sooner finds the same queue.
MIN_RETRY_SECONDS = 0.02


@dataclasses.dataclass
class LatencyEstimate:
    """A moving mean and deviation of seconds."""

    mean: float = 0.0
    spread: float = 0.0

    @property
    def upper(self) -> float:
        """An upper bound that nearly all values keep."""
        return self.mean + SPREADS * self.spread

    def add(self, seconds: float) -> None:
        self.spread += SPREAD_RATE * (abs(seconds - self.mean) - self.spread)
        self.mean += MEAN_RATE * (seconds - self.mean)


class ResponsePath:
    """The seconds from the device's answer until the response can be sent, and the deadlines that follow from them."""

    def __init__(self, estimate: LatencyEstimate | None = None) -> None:
        self.estimate = LatencyEstimate() if estimate is None else estimate

    def limits(self, seconds: float | None, now: float) -> tuple[float | None, float]:
        """The device's deadline, and the time at which the call is answered without the texts that are not done.

        Args:
          seconds: how long the caller waits; None has no deadline.
          now: the present time.

        Returns:
          The caller's deadline less the response path, and less half of it; (None, infinity) without a deadline.
        """
        if seconds is None:
            return None, math.inf
        least = min(MIN_RESPONSE_SECONDS, MIN_RESPONSE_SHARE * seconds)
        path = min(max(self.estimate.upper, least), MAX_RESPONSE_SHARE * seconds)
        deadline = now + seconds - path
        return deadline, deadline + path / 2

    def add(self, total: float, on_device: float) -> None:
        """Records a call that took `total` seconds, `on_device` of them in the queue and on the device."""
        self.estimate.add(max(total - on_device, 0.0))


class RunTimes:
    """Predictions of the device's run times.

    Attributes:
      drift: the moving ratio of what batches take to what the warm-up measured.
    """

    def __init__(self) -> None:
        self.drift = 1.0
        self._text_seconds = 0.0

    @property
    def per_text(self) -> float:
        """The predicted seconds of one more text, its share of a full batch; 0 before the first."""
        return self._text_seconds * self.drift

    def add_text(self, seconds: float) -> None:
        """Records a queued text by its share of the measured time of a full batch."""
        self._text_seconds += TEXT_RATE * (seconds - self._text_seconds)

    def add_batch(self, seconds: float, measured: float) -> None:
        """Records a batch that took `seconds` where the warm-up measured `measured`."""
        low, high = DRIFT_RANGE
        ratio = seconds / max(measured, 1e-9)
        self.drift += DRIFT_RATE * (min(max(ratio, low), high) - self.drift)

    def fitting(self, count: int, left: float, wait: float) -> int:
        """How many of `count` texts meet a deadline `left` seconds away, with `wait` seconds of work before them.

        With nothing before it the first text always fits: predictions can be wrong, and only runs correct them.
        """
        each = self.per_text
        if each <= 0:
            return count
        before_last = math.floor((left / MARGIN - wait) / each)
        return min(count, max(before_last + 1, 1 if wait == 0 else 0))

    def misses(self, left: float, wait: float, measured: float) -> bool:
        """Whether a text misses a deadline `left` seconds away.

        Args:
          left: seconds until the deadline.
          wait: the predicted seconds until the text's batch begins.
          measured: the warm-up's time of that batch, with which the text is answered.
        """
        return MARGIN * (wait + self.drift * measured) > left


def too_late(left: float, wait: float) -> DeadlineExceeded:
    """The refusal of a text whose deadline is `left` seconds away and whose turn comes in `wait`."""
    return DeadlineExceeded(
        f"The deadline is {left:.3f} seconds away, but the text's turn would come in about {wait:.3f}; it was not run.",
        retry_seconds=max(wait, MIN_RETRY_SECONDS),
    )
