"""Enum values as words, as they are in Python and JSON: PRIORITY_BULK is "bulk"."""

from __future__ import annotations

import functools
from typing import Any


def word_of(enum: Any, value: int) -> str:
    """The word of a value of a protobuf enum; empty for UNSPECIFIED, and for a value of a newer version."""
    return _words(enum).get(value, "")


def value_of(enum: Any, word: str) -> Any:
    """The value of a protobuf enum that a word stands for; UNSPECIFIED for an empty word.

    Raises:
      KeyError: no value has this word.
    """
    return _values(enum)[word]


@functools.cache
def _words(enum: Any) -> dict[int, str]:
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return {value: name.removeprefix(prefix).lower() if value else "" for name, value in enum.items()}


@functools.cache
def _values(enum: Any) -> dict[str, int]:
    return {word: value for value, word in _words(enum).items()}
