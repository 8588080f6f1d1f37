"""The errors of this library: one root, and below it the one for unusable input."""

from __future__ import annotations

from collections.abc import Sequence


class ClasserError(Exception):
    """Root of every error that Classer raises for its users.

    The message is a whole sentence for the user: what was wrong, where (file, row, field), what would be right.
    Commands print it without a traceback and exit with code 2.
    """


class InputError(ClasserError):
    """Something the user gave, such as a file, a row or an option, cannot be used."""


def listed(names: Sequence[str], most: int = 10) -> str:
    """The names in quotes, separated by commas, for an error's sentence; at most the first `most` of them."""
    first = ", ".join(f"'{name}'" for name in names[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first
