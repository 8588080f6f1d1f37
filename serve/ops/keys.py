"""API keys, each with a rate and a quota: shown once when made, stored as hashes, compared in constant time. No gRPC.

A key is `ck_ID_SECRET`. The id finds its entry. The secret has 256 random bits, so that a plain SHA-256 of it cannot be
reversed by search, and a slow hash is not needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...data.errors import InputError
from ...data.files import atomic_write
from ..wire.errors import Overloaded, Unauthenticated
from .log import logger

KEY_PREFIX = "ck"
_DAY = 86_400
# How often a server checks whether the file has changed.
_LOOK_SECONDS = 1.0
# The burst: so many seconds of its rate a key may save up.
_BURST_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """One key as it is stored.

    Attributes:
      name: the holder; stands in logs and metrics.
      id: the public part of the key.
      sha256: SHA-256 of the secret, in hex.
      rate: texts a second; None for no limit.
      per_day: texts a day (UTC); None for no limit.
      admin: whether it may change the server's models.
      created: the day on which it was made.
    """

    name: str
    id: str
    sha256: str
    rate: float | None = None
    per_day: int | None = None
    admin: bool = False
    created: str = ""


def make_key(
    name: str, *, rate: float | None = None, per_day: int | None = None, admin: bool = False
) -> tuple[ApiKey, str]:
    """Makes a key; returns its entry and the key itself, which is stored nowhere.

    Raises:
      InputError: the name or a limit is out of range.
    """
    if not name or len(name) > 64 or not name.isascii() or not all(c.isalnum() or c in "-_." for c in name):
        raise InputError(f"The key's name is '{name}'; give 1 to 64 letters, digits, '-', '_' or '.'.")
    if rate is not None and not 0 < rate < 1e9:
        raise InputError(f"--rate is {rate:g}; give texts a second, above 0.")
    if per_day is not None and per_day < 1:
        raise InputError(f"--per-day is {per_day}; give at least 1 text a day.")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    entry = ApiKey(name, key_id, _digest(secret), rate, per_day, admin, time.strftime("%Y-%m-%d", time.gmtime()))
    return entry, f"{KEY_PREFIX}_{key_id}_{secret}"


def read_keys(path: Path) -> list[ApiKey]:
    """The entries of a key file.

    Raises:
      InputError: it cannot be read, others may write to it, or an entry is malformed.
    """
    try:
        mode = path.stat().st_mode
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); `classer keys new` makes a key file.") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if mode & 0o022:
        raise InputError(f"{path} can be written by others, who could add keys; forbid it: chmod go-w {path}")
    rows = data.get("keys") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise InputError(f'{path} has no list "keys"; `classer keys new` makes a key file.')
    entries = [_entry(row, f"{path}, key {number}") for number, row in enumerate(rows, start=1)]
    for field in ("name", "id"):
        values = [getattr(entry, field) for entry in entries]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise InputError(f"{path}: two keys have the {field} '{twice}'; each needs its own.")
    return entries


def _entry(row: Any, where: str) -> ApiKey:
    kinds = {
        "name": str,
        "id": str,
        "sha256": str,
        "rate": (int, float, type(None)),
        "per_day": (int, type(None)),
        "admin": bool,
        "created": str,
    }
    if not isinstance(row, dict) or not {"name", "id", "sha256"} <= row.keys() <= kinds.keys():
        raise InputError(
            f"{where}: an object with name, id and sha256 was expected, and beside them {', '.join(kinds)}."
        )
    for field, value in row.items():
        if not isinstance(value, kinds[field]):
            raise InputError(f"{where}: the field '{field}' is of the wrong kind.")
    if not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
        raise InputError(f"{where}: the field 'sha256' must have 64 hexadecimal digits, in lower case.")
    return ApiKey(**row)


def write_keys(path: Path, entries: Iterable[ApiKey]) -> None:
    """Writes a key file, whole or not at all, for its owner's eyes only."""
    text = json.dumps({"keys": [dataclasses.asdict(entry) for entry in entries]}, indent=1)
    with atomic_write(path, mode=0o600, shared=True) as part:
        part.write_text(text + "\n", encoding="utf-8")


class Allowance:
    """The limits of one key: a token bucket for its rate, a count for its day.

    If anything is left of the rate, a call of any size passes, and the key then waits until the bucket has refilled. So
    no call is too large to ever pass, and the rate holds on average.

    Args:
      entry: the key's entry.
      share: the part of its limits that this process grants, if several processes serve the same clients.
      clock: seconds, monotonic.
      now: seconds since 1970.
    """

    def __init__(
        self,
        entry: ApiKey,
        *,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.entry = entry
        self._rate = None if entry.rate is None else entry.rate * share
        self._per_day = None if entry.per_day is None else math.ceil(entry.per_day * share)
        self._clock, self._now = clock, now
        self._room = self._most = max(1.0, (self._rate or 0.0) * _BURST_SECONDS)
        self._seen = clock()
        self._day, self._used = 0, 0

    def take(self, texts: int) -> None:
        """Spends texts from the rate and the quota.

        Raises:
          Overloaded: the rate or the day's quota is used up; nothing was spent.
        """
        now = self._now()
        if self._per_day is not None:
            if int(now // _DAY) != self._day:
                self._day, self._used = int(now // _DAY), 0
            if self._used + texts > self._per_day:
                raise Overloaded(
                    f"The API key's quota of {self._per_day:,} texts a day leaves {self._per_day - self._used:,}, "
                    "fewer than the call has.",
                    retry_seconds=_DAY - now % _DAY,
                    reason="QUOTA_EXCEEDED",
                )
        if self._rate is not None:
            clock = self._clock()
            self._room = min(self._most, self._room + (clock - self._seen) * self._rate)
            self._seen = clock
            if self._room < min(texts, 1):
                raise Overloaded(
                    f"The API key's rate of {self._rate:g} texts a second is used up; try again later.",
                    retry_seconds=(1 - self._room) / self._rate,
                    reason="RATE_LIMITED",
                )
            self._room -= texts
        self._used += texts


class KeyRing:
    """The keys of a file. The file is read again when it changes, so that revoking a key needs no restart.

    Args:
      path: the key file.
      share: see `Allowance`.

    Raises:
      InputError: the file cannot be used. If a changed file cannot be used, that is logged and the keys stay as they
        were.
    """

    def __init__(self, path: Path, *, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._share, self._clock = path, share, clock
        self._allowances: dict[str, Allowance] = {}
        self._stamp = self._stamp_now()
        self._looked = clock()
        self._replace(read_keys(path))

    def find(self, presented: str | None) -> Allowance:
        """The limits of a key as a caller sent it.

        Raises:
          Unauthenticated: there is no key, or it is unknown. The message does not repeat it.
        """
        self._look()
        if not presented:
            raise Unauthenticated("This server answers to API keys only; send one as `authorization: Bearer KEY`.")
        _, key_id, secret = [*presented.split("_", 2), "", ""][:3]
        allowance = self._allowances.get(key_id)
        # The secret is hashed and compared for an unknown id too, so that timing does not reveal known ids.
        expected = allowance.entry.sha256 if allowance is not None else "0" * 64
        same = hmac.compare_digest(_digest(secret), expected)
        if allowance is None or not same:
            raise Unauthenticated("The API key is not one that this server knows; it may have been revoked.")
        return allowance

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._replace(read_keys(self._path))
        except InputError as error:
            logger.error("The key file has changed and cannot be used; the keys stay what they were. %s", error)

    def _replace(self, entries: Iterable[ApiKey]) -> None:
        """Replaces the entries. An unchanged key keeps its usage."""
        kept = self._allowances
        self._allowances = {
            entry.id: kept[entry.id]
            if entry.id in kept and kept[entry.id].entry == entry
            else Allowance(entry, share=self._share, clock=self._clock)
            for entry in entries
        }

    def _stamp_now(self) -> tuple[int, int]:
        with contextlib.suppress(OSError):
            status = self._path.stat()
            return status.st_mtime_ns, status.st_ino
        return 0, 0


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
