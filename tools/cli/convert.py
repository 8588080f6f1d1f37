"""The command `classer convert`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .arguments import check_can_make, parse


def convert(argv: Sequence[str]) -> None:
    """Turn a pretrained encoder of the BERT family into the native architecture."""
    from classer.train.convert import ConvertJob, run_convert

    job = parse(ConvertJob, argv, "classer convert", convert.__doc__)
    check_can_make(job.out)
    run_convert(job)
    print(f"Train from it:  classer train --encoder {shlex.quote(str(job.out))} --data FILE --out FOLDER")
