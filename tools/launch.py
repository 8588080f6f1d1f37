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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from classer.tools.cli.main import run, tune_allocator
from classer.tools.cli.train import parse_job, train
from classer.tools.launching.job import Launch, where
from classer.tools.launching.kubernetes import apply_manifests, manifests_yaml
from classer.tools.launching.local import describe_processes, process_environment, run_processes
from classer.tools.launching.slurm import batch_script, submit_batch_script

if TYPE_CHECKING:
    from classer.train.config import TrainJob


class LaunchTarget(NamedTuple):
    """Where a job can run.

    Attributes:
      describe: what `--dry-run` prints, from the launch, the command and the job's folder.
      start: runs or submits the job; returns an exit code.
    """

    describe: Callable[[Launch, Sequence[str], Path], str]
    start: Callable[[Launch, Sequence[str], TrainJob], int]


TARGETS = {
    "local": LaunchTarget(describe_processes, run_processes),
    "slurm": LaunchTarget(batch_script, submit_batch_script),
    "kubernetes": LaunchTarget(manifests_yaml, apply_manifests),
}


@dataclasses.dataclass(frozen=True)
class LaunchArguments(Launch):
    """
    Attributes:
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
        os.environ |= process_environment(arguments, rank=0)
        tune_allocator()
        print("1 process on this machine.")
        print(where(job, logs="this output, and metrics.jsonl beside the checkpoints", stop=f"kill {os.getpid()}"))
        train(command[2:])
    else:
        sys.exit(target.start(arguments, command, job))


if __name__ == "__main__":
    sys.exit(run(launch, sys.argv[1:]))
