"""Launches a training job on this machine, under Slurm or on Kubernetes, in one process or in many.

python tools/launch.py --preset banking77 --data FOLDER --out runs/banking77 --processes 2 --devices-per-process 4

It takes what `classer train` takes (see `classer train --help`) and runs the same job in every process. The same
command goes on with a job that was stopped or died, also with another number of processes, and leaves a finished one as
it is.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from classer.tools.cli.main import run, tune_allocator
from classer.tools.cli.train import parse_job, train
from classer.tools.launching import kubernetes as launch_kubernetes
from classer.tools.launching import local as launch_local
from classer.tools.launching import slurm as launch_slurm
from classer.tools.launching.job import Launch, where

TARGETS = {"local": launch_local, "slurm": launch_slurm, "kubernetes": launch_kubernetes}


@dataclasses.dataclass(frozen=True)
class LaunchArguments(Launch):
    __doc__ = f"""{Launch.__doc__}
      dry_run: print what would be run, and run nothing.
    """

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def launch(argv: Sequence[str]) -> None:
    """Checks the job, and runs or submits it; raises SystemExit with the exit code of a local job.

    Raises:
      InputError: the job cannot be run as it is described.
    """
    arguments, training = tyro.cli(
        LaunchArguments, prog="launch.py", args=list(argv), description=__doc__, return_unknown_args=True
    )
    job = parse_job(training, prog="launch.py")
    command = ("classer", "train", *training, "--restartable")
    target = TARGETS[arguments.target]
    if arguments.dry_run:
        print(target.describe(arguments, command, job.out))
    elif arguments.target == "local" and arguments.processes == 1:
        os.environ |= launch_local.environment(arguments, rank=0)
        tune_allocator()
        print("1 process on this machine.")
        print(where(job, logs="this output, and metrics.jsonl beside the checkpoints", stop=f"kill {os.getpid()}"))
        train(command[2:])
    else:
        sys.exit(target.start(arguments, command, job))


if __name__ == "__main__":
    sys.exit(run(launch, sys.argv[1:]))
