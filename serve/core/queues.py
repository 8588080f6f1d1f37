"""What waits for the device: one queue for each model, length bucket and priority. Not thread-safe; no clock."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from concurrent.futures import Future

from .work import Device, Priority, Scored, Work

# Whose queue it is: the model's, the bucket's in tokens, the priority's.
Key = tuple[Device, int, Priority]


@dataclasses.dataclass(eq=False)
class Entry:
    """A text that waits.

    Attributes:
      work: the text.
      bucket: the length, in tokens, that it is padded to.
      enqueued: when it came, in seconds.
      order: how many came before it.
      rank: the lowest goes first.
      seconds: its share of the warm-up's time for a full batch.
      future: where its owner waits.
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
        return self.work.deadline is not None and self.work.deadline <= now


class Queues:
    """All queues, each in the order of arrival, and what is in them: false if that is nothing."""

    def __init__(self) -> None:
        self._lanes: dict[Key, collections.OrderedDict[int, Entry]] = {}
        self._tokens = dict.fromkeys(Priority, 0)
        self._seconds = dict.fromkeys(Priority, 0.0)

    def __bool__(self) -> bool:
        return bool(self._lanes)

    @property
    def tokens(self) -> int:
        """Tokens that wait, each text counted as its bucket's length."""
        return sum(self._tokens.values())

    def tokens_of(self, priority: Priority) -> int:
        """Those of one priority."""
        return self._tokens[priority]

    def seconds_before(self, priority: Priority) -> float:
        """What those take, as measured at warm-up, that go before a text of a priority which comes now."""
        return sum(self._seconds[other] for other in Priority if other <= priority)

    def count(self, keys: Iterable[Key]) -> int:
        """How many texts wait in some queues."""
        return sum(len(self._lanes.get(key, ())) for key in keys)

    def first(self, keys: Iterable[Key] | None = None) -> Entry | None:
        """The entry of the lowest rank in some queues, or in all."""
        heads = [
            next(iter(lane.values()))
            for key in (self._lanes if keys is None else keys)
            if (lane := self._lanes.get(key))
        ]
        return min(heads, key=lambda entry: entry.rank) if heads else None

    def add(self, entry: Entry) -> None:
        self._lanes.setdefault(entry.key, collections.OrderedDict())[entry.order] = entry
        self._tokens[entry.work.priority] += entry.bucket
        self._seconds[entry.work.priority] += entry.seconds

    def remove(self, entry: Entry) -> None:
        """Takes an entry out, if it is still in."""
        lane = self._lanes.get(entry.key)
        if lane is not None and lane.pop(entry.order, None) is not None:
            self._tokens[entry.work.priority] -= entry.bucket
            self._seconds[entry.work.priority] -= entry.seconds
            if not lane:
                del self._lanes[entry.key]
        if not self._lanes:
            self._seconds = dict.fromkeys(Priority, 0.0)  # else sums of floats would drift off zero

    def clear(self) -> list[Entry]:
        """Takes all out."""
        entries = [entry for lane in self._lanes.values() for entry in lane.values()]
        self._lanes.clear()
        self._tokens = dict.fromkeys(Priority, 0)
        self._seconds = dict.fromkeys(Priority, 0.0)
        return entries
