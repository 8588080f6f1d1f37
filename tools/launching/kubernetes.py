"""A job on Kubernetes: a headless service and an Indexed Job with one pod per process."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from classer.data.errors import InputError
from classer.tools.launching.job import SECONDS_TO_SAVE, Launch, where
from classer.train.process_info import COORDINATOR, STOPPED_CODE

if TYPE_CHECKING:
    from classer.train.config import TrainJob

PORT = 8476
USER_ERROR = 2  # the exit code of an error that a restart would repeat
# The exit code of a pod that was evicted (from a drained node, say) and saved. Kubernetes counts 0 as completed.
STOPPED = 128 + signal.SIGTERM


def manifests(launch: Launch, command: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """The service, by which pods find the first pod, and the job. Kubernetes sets JOB_COMPLETION_INDEX in each pod."""
    name = launch.called(out)
    metadata = {"name": name, "labels": {"app": "classer"}} | (
        {"namespace": launch.namespace} if launch.namespace else {}
    )
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # pods connect to one another before any of them is ready
            "selector": {"job-name": name},
            "ports": [{"name": "coordinator", "port": PORT}],
        },
    }
    variables = launch.environment() | {
        COORDINATOR: f"{name}-0.{name}:{PORT}",
        STOPPED_CODE: str(STOPPED),
        "PYTHONUNBUFFERED": "1",
    }
    resources = {
        "cpu": str(launch.cpus) if launch.cpus else None,
        "memory": f"{launch.memory}i" if launch.memory else None,
        "nvidia.com/gpu": str(launch.devices_per_process) if launch.gpu else None,
    }
    container = {
        "name": "train",
        "image": launch.image,
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {key: value for key, value in resources.items() if value}},
        "volumeMounts": [{"name": "claim", "mountPath": launch.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    volumes = [
        {"name": "claim", "persistentVolumeClaim": {"claimName": launch.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "containers": [container],
        "volumes": volumes,
    }
    failures = [
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [USER_ERROR]}},
        # Restarts that do not count towards `backoffLimit`.
        {"action": "Ignore", "onExitCodes": {"containerName": "train", "operator": "In", "values": [STOPPED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": launch.processes,
            "parallelism": launch.processes,
            # When one pod dies, all others fail too, and all restart.
            "backoffLimit": launch.restarts * launch.processes,
            "podFailurePolicy": {"rules": failures},
            "template": {"metadata": {"labels": {"app": "classer"}}, "spec": pod},
        },
    }
    return [service, job]


def manifests_yaml(launch: Launch, command: Sequence[str], out: Path) -> str:
    """The manifests in YAML."""
    return yaml.safe_dump_all(manifests(launch, command, out), sort_keys=False)


def apply_manifests(launch: Launch, command: Sequence[str], job: TrainJob) -> int:
    """Applies the manifests with kubectl and returns exit code 0.

    Raises:
      InputError: kubectl is missing, a job of this name is running, or kubectl refuses the manifests.
    """
    if shutil.which("kubectl") is None:
        raise InputError(
            "--target kubernetes needs the command kubectl on this machine; --dry-run prints the manifests."
        )
    name = launch.called(job.out)
    within = ["--namespace", launch.namespace] if launch.namespace else []
    # A job cannot be changed; one that failed or was stopped is deleted, and the new job resumes its training.
    old = subprocess.run(
        ["kubectl", *within, "get", "job", name, "--output", "jsonpath={.status.active}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if old.returncode == 0:
        if old.stdout.strip() not in ("", "0"):
            raise InputError(f"The Kubernetes job '{name}' is running already; name another with --name.")
        subprocess.run(["kubectl", *within, "delete", "job", name], check=False)
    done = subprocess.run(
        ["kubectl", "apply", "--filename", "-"],
        input=manifests_yaml(launch, command, job.out),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"kubectl refused the job: {done.stderr.strip()}")
    kubectl = shlex.join(["kubectl", *within])
    print(
        f"Applied as Kubernetes job '{name}': {launch.processes} pods. Watch it: {kubectl} get pods -l job-name={name}"
    )
    print(where(job, logs=f"{kubectl} logs -f -l job-name={name} --prefix", stop=f"{kubectl} delete job {name}"))
    return 0
