"""Options from environment variables: `--max-waiting-tokens` is CLASSER_MAX_WAITING_TOKENS."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

PREFIX = "CLASSER_"


def from_environment(
    kind: type, argv: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Options of a command from environment variables, for those that the command line does not give.

    A variable holds several values of an option as a shell splits words.

    Args:
      kind: the dataclass of the command's options.
      argv: the command line.
      environment: variables by name; unknown ones are left alone.

    Returns:
      The values of positional arguments by field, and the command line with the options of the environment after it.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    given = {argument.partition("=")[0] for argument in argv if argument.startswith("--")}
    positional: dict[str, Any] = {}
    options: list[str] = []
    for field in dataclasses.fields(kind):
        value = environment.get(variable(field.name))
        flag = "--" + field.name.replace("_", "-")
        if value is None or {flag, "--" + field.name, "--no-" + flag[2:]} & given:
            continue
        if _is_positional(hints[field.name]):
            positional[field.name] = tuple(shlex.split(value))
        elif hints[field.name] is bool:
            options.append(flag if value.lower() in ("1", "true", "yes", "on") else f"--no-{flag[2:]}")
        else:
            options += [flag, *shlex.split(value)] if "tuple" in str(hints[field.name]) else [flag, value]
    # An option with several values would take the positional arguments that follow it.
    return positional, [*argv, *options]


def variable(field: str) -> str:
    """The environment variable of an option."""
    return PREFIX + field.upper()


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ()) or "Positional" in str(hint)
