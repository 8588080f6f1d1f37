"""The one error type for what a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is a whole sentence for that user: which file, row or field, what was wrong, what would be right.
    Commands print it without a traceback and exit with code 2.
    """


def listed(names: Sequence[str], most: int = 10) -> str:
    """The names in quotes, for such a sentence; of many the first."""
    first = ", ".join(f"'{name}'" for name in names[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first
