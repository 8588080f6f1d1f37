"""The command `classer serve`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from .environment import from_environment


def serve(argv: Sequence[str]) -> None:
    """Serve bundles over gRPC."""
    from classer.serve.rpc.server import ServeConfig
    from classer.serve.rpc.server import serve as run_server

    @dataclasses.dataclass(frozen=True)
    class ServeArguments(ServeConfig):
        """`ServeConfig` with the bundles as positional arguments."""

        bundles: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="BUNDLE")] = ()

    more, argv = from_environment(ServeArguments, argv, os.environ)
    description = f"{serve.__doc__} Every option is also an environment variable: --max-waiting-tokens is " + (
        "CLASSER_MAX_WAITING_TOKENS, the bundles are CLASSER_BUNDLES; the command line goes before it."
    )
    default: dict[str, Any] = {"default": ServeArguments(**more)} if more else {}
    arguments = tyro.cli(ServeArguments, prog="classer serve", args=argv, description=description, **default)
    run_server(ServeConfig(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(ServeConfig)}))
