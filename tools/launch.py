"""Launches a training job on this machine, under Slurm or on Kubernetes, in one or several processes.

python tools/launch.py --preset banking77 --data FOLDER --out runs/banking77 --processes 2 --devices-per-process 4

It accepts all options of `classer train` (see `classer train --help`) and runs the same job in every process. The same
command resumes a job that was stopped or died, also with another number of processes. It leaves a finished job
unchanged.
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
    """A place to run jobs.

    Attributes:
      describe: builds the output of `--dry-run` from the launch, the command and the job's folder.
      start: runs or submits the job and returns an exit code.
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
      dry_run: print the command, batch script or manifests without running anything.
    """

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def launch(argv: Sequence[str]) -> None:
    """Checks the job and runs or submits it.

    Raises:
      InputError: an option of the job or of the launch is invalid, or the scheduler refuses the job.
      SystemExit: with the exit code of the job on this machine, or of the submission.
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
