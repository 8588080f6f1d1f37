"""The command `classer upcycle`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .arguments import check_can_make, parse


def upcycle(argv: Sequence[str]) -> None:
    """Turn a pretrained encoder of the BERT family into the native architecture."""
    from classer.train.upcycle import UpcycleJob, run_upcycle

    job = parse(UpcycleJob, argv, "classer upcycle", upcycle.__doc__)
    check_can_make(job.out)
    run_upcycle(job)
    print(f"Train from it:  classer train --encoder {shlex.quote(str(job.out))} --data FILE --out FOLDER")
