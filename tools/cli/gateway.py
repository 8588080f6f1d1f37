"""The command `classer gateway`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import tyro

from .environment import from_environment


def gateway(argv: Sequence[str]) -> None:
    """Offer a running server over HTTP and JSON, with an OpenAPI page."""
    from classer.serve.gateway.run import GatewayConfig, run_gateway

    more, argv = from_environment(GatewayConfig, argv, os.environ)
    description = f"{gateway.__doc__} Every option is also an environment variable, --port for one CLASSER_PORT."
    run_gateway(
        tyro.cli(
            GatewayConfig, prog="classer gateway", args=argv, description=description, default=GatewayConfig(**more)
        )
    )
