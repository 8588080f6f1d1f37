"""`classer keys`: makes API keys for a server, lists and revokes them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from classer.data.errors import InputError


@dataclasses.dataclass(frozen=True)
class New:
    """Make a key, print it once, and store its hash.

    Attributes:
      name: the key's holder, shown in logs and metrics.
      file: the key file; made if it does not exist.
      rate: limit of texts per second; no limit by default.
      per_day: limit of texts per day (UTC); no limit by default.
      admin: whether the key may also change the server's models.
    """

    name: tyro.conf.Positional[str]
    file: Path = Path("keys.json")
    rate: float | None = None
    per_day: int | None = None
    admin: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclasses.dataclass(frozen=True)
class ListKeys:
    """List the keys of a file.

    Attributes:
      file: the key file.
    """

    file: Path = Path("keys.json")


@dataclasses.dataclass(frozen=True)
class Revoke:
    """Remove a key; running servers refuse it within seconds.

    Attributes:
      name: the key's holder.
      file: the key file.
    """

    name: tyro.conf.Positional[str]
    file: Path = Path("keys.json")


KeysArguments = (
    Annotated[New, tyro.conf.subcommand("new")]
    | Annotated[ListKeys, tyro.conf.subcommand("list")]
    | Annotated[Revoke, tyro.conf.subcommand("revoke")]
)


def keys(argv: Sequence[str]) -> None:
    """Make, list and revoke the API keys of a server."""
    run_keys(tyro.cli(KeysArguments, prog="classer keys", args=list(argv), description=keys.__doc__))


def run_keys(arguments: New | ListKeys | Revoke) -> None:
    """Makes, lists or revokes; a new key alone goes to stdout, the note on it to stderr.

    Raises:
      InputError: the file cannot be used, or the name is taken (new) or unknown (revoke).
    """
    from classer.serve.ops.keys import make_key, read_keys, write_keys

    file = arguments.file
    if isinstance(arguments, New):
        entries = read_keys(file) if file.exists() else []
        if any(entry.name == arguments.name for entry in entries):
            raise InputError(f"{file} has a key '{arguments.name}' already; choose another name, or revoke that one.")
        entry, key = make_key(arguments.name, rate=arguments.rate, per_day=arguments.per_day, admin=arguments.admin)
        write_keys(file, [*entries, entry])
        print(key)
        print(f"This is the key of '{entry.name}'. It is shown only now: {file} holds its hash.", file=sys.stderr)
        return
    entries = read_keys(file)
    if isinstance(arguments, Revoke):
        left = [entry for entry in entries if entry.name != arguments.name]
        if len(left) == len(entries):
            names = ", ".join(entry.name for entry in entries) or "none"
            raise InputError(f"{file} has no key '{arguments.name}'; it has: {names}.")
        write_keys(file, left)
        print(f"{file}: revoked '{arguments.name}'; {len(left)} left.")
        return
    for entry in entries:
        rate = "any rate" if entry.rate is None else f"{entry.rate:g} texts/s"
        per_day = "any number a day" if entry.per_day is None else f"{entry.per_day:,} texts/day"
        print(f"{entry.name:24} {entry.created}  {rate}, {per_day}{', admin' if entry.admin else ''}")
