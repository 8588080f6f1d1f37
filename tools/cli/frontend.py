"""The command `classer frontend`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import tyro

from .environment import from_environment


def frontend(argv: Sequence[str]) -> None:
    """Run a front end for an engine that `classer serve` runs, here or elsewhere."""
    from classer.serve.ops.operations import OperationsConfig
    from classer.serve.rpc.frontend import FrontEndConfig, run_front_end

    for kind in (FrontEndConfig, OperationsConfig):
        _, argv = from_environment(kind, argv, os.environ)
    options = (tyro.conf.OmitArgPrefixes,)
    description = f"{frontend.__doc__} Every option is also an environment variable, --engine for one CLASSER_ENGINE."
    run_front_end(tyro.cli(FrontEndConfig, prog="classer frontend", args=argv, description=description, config=options))
