"""The description of a job, common to all launchers."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from classer.data.errors import InputError
from classer.train.process_info import NUM_PROCESSES

if TYPE_CHECKING:
    from classer.train.config import TrainJob

TargetName = Literal["local", "slurm", "kubernetes"]
# Seconds between the request to save and the end of the job.
SECONDS_TO_SAVE = 120
# Lines of a dead process's output that are shown.
LAST_LINES = 20


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a job runs, and its resources.

    Attributes:
      target: this machine, Slurm or Kubernetes.
      processes: number of processes; each is one Slurm task or one pod.
      devices_per_process: accelerators per process, or virtual CPU devices without accelerators; 0 uses all devices.
      cpus: processor cores per process; 0 leaves the number to the scheduler.
      memory: memory per process, such as 32G; by default the scheduler's.
      gpu: whether the devices are GPUs; the scheduler is asked for them.
      time_limit: Slurm: time limit of the job, such as 12:00:00; the job is requeued when the time is over.
      partition: Slurm: the partition; by default the cluster's.
      account: Slurm: the account; by default the cluster's.
      restarts: maximum number of restarts by the scheduler after a process died.
      name: the job's name; by default that of the folder `out`.
      image: Kubernetes: the container image, with Classer installed.
      claim: Kubernetes: the persistent volume claim with data and `out`; all pods must be able to read and write it.
      mount: Kubernetes: mount path of the claim in the containers; `data` and `out` are paths below it.
      namespace: Kubernetes: the namespace; by default kubectl's.
    """

    target: TargetName = "local"
    processes: int = 1
    devices_per_process: int = 0
    cpus: int = 0
    memory: str = ""
    gpu: bool = False
    time_limit: str = ""
    partition: str = ""
    account: str = ""
    restarts: int = 3
    name: str = ""
    image: str = ""
    claim: str = ""
    mount: str = "/data"
    namespace: str = ""

    def __post_init__(self) -> None:
        for field, low in (("processes", 1), ("devices_per_process", 0), ("cpus", 0), ("restarts", 0)):
            if getattr(self, field) < low:
                raise InputError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must be at least {low}.")
        if self.gpu and not self.devices_per_process:
            raise InputError("--gpu asks a scheduler for GPUs; say how many with --devices-per-process.")
        if self.memory and not re.fullmatch(r"\d+[MGT]", self.memory):
            raise InputError(f"--memory is '{self.memory}'; give a number and M, G or T, such as 32G.")
        if self.time_limit and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time_limit):
            raise InputError(f"--time-limit is '{self.time_limit}'; give D-HH:MM:SS, HH:MM:SS or minutes.")
        if self.name and not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", self.name):
            raise InputError(f"--name is '{self.name}'; use lower-case letters, digits and '-', a letter first.")
        if self.target == "kubernetes":
            for field, example in (("image", "registry.example/classer:1.0"), ("claim", "training")):
                if not getattr(self, field):
                    raise InputError(f"--target kubernetes needs --{field}, such as {example}.")
            if not re.fullmatch(r"/[^\0]*[^/\0]", self.mount):
                raise InputError(f"--mount is '{self.mount}'; give an absolute path in the container, such as /data.")

    def called(self, out: Path) -> str:
        """The job's name: `name`, or one derived from the name of the folder `out`."""
        made = re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-")[:50].rstrip("-")
        return self.name or (made if made[:1].isalpha() else f"classer-{made}".rstrip("-"))

    def environment(self) -> dict[str, str]:
        """Environment variables with the same value in every process of the job."""
        variables = {NUM_PROCESSES: str(self.processes)}
        if self.devices_per_process and not self.gpu:
            variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.devices_per_process}"
        return variables


def where(job: TrainJob, *, logs: str, stop: str) -> str:
    """A text for the user: the places of logs and checkpoints, and how to stop and resume the job.

    Args:
      job: the training job.
      logs: where the logs are, or a command that shows them.
      stop: the command that stops the job.
    """
    parts = []  # in the order of training
    if job.curriculum is not None or job.recipe.curriculum:
        parts.append(job.out / "stages" / "*")
    elif job.recipe.epochs:
        parts.append(job.out)
    if job.recipe.focus_epochs:
        parts.append(job.out / "focus")
    tell = {
        "Logs": logs,
        "Checkpoints": ", ".join(str(part / "checkpoints") for part in parts),
        "Dashboard": f"tensorboard --logdir {shlex.quote(str(job.out))}",
        "Stop": f"{stop} (it saves first)",
        "Resume": "the same command again",
    }
    return "\n".join(f"  {name + ':':13}{text}" for name, text in tell.items())
