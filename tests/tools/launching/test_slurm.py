"""A job under a real Slurm with one node: submission, a killed task, requeueing, resumption and completion."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from classer.data.taxonomy import TaskKind
from classer.tests.helpers import write_toy_data
from classer.tests.processes import Process

from ..conftest import LAUNCHER
from .test_launch import steps_logged

TIMEOUT = 400


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Starts Slurm; yields the environment variables with which its commands reach it."""
    if missing := [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"skipped: no {missing[0]} here; on Debian: apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("skipped: Slurm's daemons are started as root")
    port = next(port for port in range(26817, 27817, 2) if is_free(port) and is_free(port + 1))
    script = Path(__file__).with_name("start_slurm.sh")
    # The path of a Unix socket has a maximum length, which pytest's folders can exceed.
    folder = Path(f"/tmp/classer-slurm-{os.getpid()}")
    with Process([script, folder, port]) as process:
        try:
            assert process.stdout.line() == "ready\n", "Slurm did not start"
            yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def ask(environment: dict[str, str], *command: object) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    return done.stdout


def state(environment: dict[str, str], job: str) -> str:
    """The job's state in Slurm's terms, such as RUNNING; GONE if Slurm does not list the job."""
    said = ask(environment, "scontrol", "show", "job", job)
    return next((word.partition("=")[2] for word in said.split() if word.startswith("JobState=")), "GONE")


def wait_for(condition: Callable[[], bool], run: Path) -> None:
    until = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < until, [(log.name, log.read_text()[-2000:]) for log in (run / "logs").glob("*.log")]
        time.sleep(0.2)


def tasks_of(run: Path) -> list[int]:
    """Process ids of the job's tasks."""
    found = subprocess.run(
        ["pgrep", "-f", "--", f"-m classer.tools.cli.main train .*{run}"], capture_output=True, text=True, check=False
    )
    programs = {int(word): Path(f"/proc/{word}/comm") for word in found.stdout.split()}
    return [task for task, program in programs.items() if program.exists() and "python" in program.read_text()]


@pytest.mark.slow
def test_a_job_is_requeued_after_a_kill_goes_on_and_finishes(
    slurm: dict[str, str], tmp_path: Path, tiny_encoder: Path
) -> None:
    run = tmp_path / "run"
    data = write_toy_data(tmp_path / "toy.jsonl", TaskKind.MULTICLASS, 120)
    words = ["--target", "slurm", "--processes", 2, "--data", data, "--encoder", tiny_encoder, "--out", run]
    words += ["--max-length", 16, "--batch-size", 32, "--epochs", 60, "--patience", 0, "--save-steps", 5]
    submitted = ask(slurm, *LAUNCHER, *words)
    assert "Submitted as Slurm job" in submitted
    job = submitted.split("Slurm job ")[1].split(":")[0]
    assert f"scancel --signal=TERM {job}" in submitted

    wait_for(lambda: steps_logged(run) >= 10, run)
    assert state(slurm, job) == "RUNNING"
    os.kill(tasks_of(run)[-1], signal.SIGKILL)
    wait_for(lambda: state(slurm, job) == "PENDING", run)
    assert not (run / "bundle").exists(), "it was killed too late to show anything"
    # Slurm waits two minutes before a restart. Do not shorten this: slurmd may still clean up and kill the new tasks.
    wait_for(lambda: state(slurm, job) not in ("PENDING", "RUNNING", "COMPLETING"), run)
    assert state(slurm, job) == "COMPLETED"
    assert (run / "bundle").is_dir()
    log = (run / "logs" / f"slurm-{job}.log").read_text()
    assert "The tasks ended with exit code" in log
    assert "back to the queue" in log
    assert re.search(r"^Task [01] was the first to end\. Its last lines", log, re.MULTILINE), log
    assert (run / "logs" / f"deaths-{job}").read_text().count("\n") == 1
    said = (run / "logs" / "worker-0.log").read_text()
    assert "Going on after epoch" in said
    assert steps_logged(run) == 60 * 4


@pytest.mark.slow
def test_a_job_saves_when_it_is_told_to_stop_and_is_not_put_back(
    slurm: dict[str, str], tmp_path: Path, tiny_encoder: Path
) -> None:
    run = tmp_path / "run"
    data = write_toy_data(tmp_path / "toy.jsonl", TaskKind.MULTICLASS, 120)
    words = ["--target", "slurm", "--processes", 2, "--data", data, "--encoder", tiny_encoder, "--out", run]
    submitted = ask(slurm, *LAUNCHER, *words, "--max-length", 16, "--batch-size", 32, "--epochs", 500, "--patience", 0)
    job = submitted.split("Slurm job ")[1].split(":")[0]
    wait_for(lambda: steps_logged(run) >= 10, run)
    ask(slurm, "scancel", "--signal=TERM", job)
    wait_for(lambda: state(slurm, job) not in ("PENDING", "RUNNING", "COMPLETING"), run)
    assert state(slurm, job) == "COMPLETED"
    assert "it is saved. The same command goes on." in (run / "logs" / "worker-0.log").read_text()
    assert not (run / "bundle").exists()
