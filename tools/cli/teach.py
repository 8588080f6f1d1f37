"""The command `classer teach`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .arguments import check_can_make, parse


def teach(argv: Sequence[str]) -> None:
    """Ask teachers for soft labels, which `classer train --soft-labels` learns from."""
    from classer.train.teach import TeachJob
    from classer.train.teach import teach as ask

    job = parse(TeachJob, argv, "classer teach", teach.__doc__)
    check_can_make(job.out.parent)
    ask(job)
    print(f"Learn from it:  classer train --soft-labels {shlex.quote(str(job.out))} --data FOLDER --out FOLDER")
