"""When the calls of a load test are due: Poisson arrivals whose rate is constant, rises or steps. No clock, no network.

Axes: `N` calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of time over which the rate goes in a straight line.

    Attributes:
      seconds: how long it is.
      first_rate: calls a second at its start.
      last_rate: calls a second at its end.
    """

    seconds: float
    first_rate: float
    last_rate: float

    @property
    def calls(self) -> float:
        """How many calls it has on average."""
        return self.seconds * (self.first_rate + self.last_rate) / 2

    def time_of(self, calls_N: np.ndarray) -> np.ndarray:
        """Seconds (N,) after its start by which it has on average had so many calls."""
        slope = (self.last_rate - self.first_rate) / self.seconds
        # Of first·t + slope·t²/2 = calls, the root that stays finite where the slope is zero.
        root_N = np.sqrt(np.maximum(self.first_rate**2 + 2 * slope * calls_N, 0.0))
        return 2 * calls_N / (self.first_rate + root_N)


def arrivals(segments: Sequence[Segment], rng: np.random.Generator) -> np.ndarray:
    """The times at which calls of independent users arrive, a Poisson process of that rate.

    A Poisson process of rate 1, its time stretched by the inverse of the mean number of calls (Çinlar 1975,
    Introduction to Stochastic Processes, section 4.7).

    Args:
      segments: the rate, piece after piece; at no time negative, and above zero somewhere in each.
      rng: what draws them.

    Returns:
      (N,) float64, seconds from the start, ascending.
    """
    total = sum(segment.calls for segment in segments)
    # Enough gaps to pass the end all but surely; more are drawn in the rare case.
    gaps_N = rng.exponential(size=int(total + 10 * np.sqrt(total) + 10))
    while gaps_N.sum() < total:
        gaps_N = np.append(gaps_N, rng.exponential(size=len(gaps_N)))
    calls_N = np.cumsum(gaps_N)
    calls_N = calls_N[calls_N < total]
    due, start, before = [], 0.0, 0.0
    for segment in segments:
        own_N = calls_N[(calls_N >= before) & (calls_N < before + segment.calls)] - before
        due.append(start + segment.time_of(own_N))
        start += segment.seconds
        before += segment.calls
    return np.concatenate(due)
