"""Queues of texts that wait for the device: one a model, length bucket and priority. Not thread-safe; no clock."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from concurrent.futures import Future

from .work import Device, Priority, Scored, Work

# What identifies a queue: the device, the length bucket in tokens, the priority.
Key = tuple[Device, int, Priority]


@dataclasses.dataclass(eq=False)
class Entry:
    """A text that waits.

    Attributes:
      work: the text.
      bucket: the length, in tokens, that it is padded to.
      enqueued: when it was queued, in seconds.
      order: how many texts were queued before it.
      rank: the entry of the lowest rank goes first.
      seconds: its share of a full batch's time, as the warm-up measured it.
      future: receives its result.
    """

    work: Work
    bucket: int
    enqueued: float
    order: int
    rank: tuple[float, int]
    seconds: float
    future: Future[Scored]

    @property
    def key(self) -> Key:
        return self.work.device, self.bucket, self.work.priority

    def late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.work.deadline is not None and self.work.deadline <= now


class Queues:
    """All queues, each in the order of arrival. Falsy when empty."""

    def __init__(self) -> None:
        self._lanes: dict[Key, collections.OrderedDict[int, Entry]] = {}
        self._tokens = dict.fromkeys(Priority, 0)
        self._seconds = dict.fromkeys(Priority, 0.0)

    def __bool__(self) -> bool:
        return bool(self._lanes)

    @property
    def tokens(self) -> int:
        """Tokens in all queues, each text counted as its bucket's length."""
        return sum(self._tokens.values())

    def tokens_of(self, priority: Priority) -> int:
        """Tokens in the queues of one priority."""
        return self._tokens[priority]

    def seconds_before(self, priority: Priority) -> float:
        """Seconds, as measured at warm-up, of the texts that go before a new one of a priority."""
        return sum(self._seconds[other] for other in Priority if other <= priority)

    def count(self, keys: Iterable[Key]) -> int:
        """How many texts are in the given queues."""
        return sum(len(self._lanes.get(key, ())) for key in keys)

    def first(self, keys: Iterable[Key] | None = None) -> Entry | None:
        """The entry of the lowest rank in the given queues, or in all; None if they are empty."""
        heads = [
            next(iter(lane.values()))
            for key in (self._lanes if keys is None else keys)
            if (lane := self._lanes.get(key))
        ]
        return min(heads, key=lambda entry: entry.rank) if heads else None

    def add(self, entry: Entry) -> None:
        """Appends an entry to its queue."""
        self._lanes.setdefault(entry.key, collections.OrderedDict())[entry.order] = entry
        self._tokens[entry.work.priority] += entry.bucket
        self._seconds[entry.work.priority] += entry.seconds

    def remove(self, entry: Entry) -> None:
        """Removes an entry; nothing happens if it is not queued any more."""
        lane = self._lanes.get(entry.key)
        if lane is not None and lane.pop(entry.order, None) is not None:
            self._tokens[entry.work.priority] -= entry.bucket
            self._seconds[entry.work.priority] -= entry.seconds
            if not lane:
                del self._lanes[entry.key]
        if not self._lanes:
            self._seconds = dict.fromkeys(Priority, 0.0)  # else sums of floats would drift off zero

    def clear(self) -> list[Entry]:
        """Removes and returns all entries."""
        entries = [entry for lane in self._lanes.values() for entry in lane.values()]
        self._lanes.clear()
        self._tokens = dict.fromkeys(Priority, 0)
        self._seconds = dict.fromkeys(Priority, 0.0)
        return entries
