"""Runs a job's processes on this machine: starts them, watches them, and ends them together."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from classer.tools.launching.job import LAST_LINES, Launch, where
from classer.train.process_info import COORDINATOR, LAUNCHER, LOGS, PROCESS_ID

if TYPE_CHECKING:
    from classer.train.config import TrainJob

SECONDS_BETWEEN_LOOKS = 0.1
GRACE = 600.0  # seconds that workers get to save after a stop


def describe_processes(launch: Launch, command: Sequence[str], out: Path) -> str:
    """The shell command that `run_processes` would run, or, for one process, the equivalent of this process."""
    alone = launch.processes == 1
    variables = process_environment(launch, rank=0) if alone else _worker_environment(launch, rank=None, port=None)
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    line = " ".join([*words, shlex.join(_python(command))])
    return line if alone else f"# {launch.processes} times, RANK from 0:\n{line}"


def run_processes(launch: Launch, command: Sequence[str], job: TrainJob) -> int:
    """Runs a job of several processes and waits for its end.

    Prints the first process's output; the output of every process is in `out/logs`. When a process dies, the others are
    killed and its last lines are printed. SIGTERM and Ctrl-C stop the job after every process has saved.

    Returns:
      The exit code: 0 if the job finished or was stopped.
    """
    logs = job.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{launch.processes} processes on this machine.")
    print(where(job, logs=f"{logs}/worker-*.log", stop=f"Ctrl-C, or kill {os.getpid()}"), flush=True)
    port = _free_port()
    workers = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [worker.kill() for worker in workers])
        for rank in range(launch.processes):
            variables = os.environ | _worker_environment(launch, rank, port)
            workers.append(_Worker(logs / f"worker-{rank}.log", _python(command), variables))
        return _watch(workers)


class _Worker:
    def __init__(self, log: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        self.log = log
        self.shown = self._begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            # In a new session, so that Ctrl-C reaches the launcher only, which signals each worker once.
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def news(self) -> str:
        """The worker's output since the last call."""
        with self.log.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        self.shown += len(new)
        lines = new.decode(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))  # start-up messages of CPU collectives

    def last_lines(self) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def _watch(workers: list[_Worker]) -> int:
    stops = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stops
        stops += 1

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    deadline = None
    while True:
        codes = [worker.code for worker in workers]
        print(workers[0].news(), end="", flush=True)
        if dead := [worker for worker, code in zip(workers, codes, strict=True) if code]:
            return _bury(workers, min(dead, key=lambda worker: _suspicion(worker.code or 0)))
        if all(code == 0 for code in codes):
            return 0
        if stops > 1 or (deadline is not None and time.monotonic() > deadline):
            print("Stopped without saving.", file=sys.stderr)
            return 128 + signal.SIGINT
        if stops and deadline is None:
            print("Stopping: the processes save first; once more stops at once.", file=sys.stderr, flush=True)
            deadline = time.monotonic() + GRACE
            for worker in workers:
                worker.stop()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _suspicion(code: int) -> int:
    """Rank of an exit code as the cause of other exits; 0 is the most likely: user error, signal, failure, abort."""
    return 0 if code == 2 else 1 if code < 0 and code != -signal.SIGABRT else 2 if code > 0 else 3


def _bury(workers: list[_Worker], dead: _Worker) -> int:
    code = dead.code or 0
    for worker in workers:
        worker.kill()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"\nProcess {workers.index(dead)} {how}, so the job ends. Its last lines ({dead.log}):", file=sys.stderr)
    for line in dead.last_lines():
        print(f"  | {line}", file=sys.stderr)
    print("The same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


def process_environment(launch: Launch, rank: int | None) -> dict[str, str]:
    """`Launch.environment` with the XLA_FLAGS of this process added, and the GPUs of a rank (None: a placeholder)."""
    variables = launch.environment()
    if "XLA_FLAGS" in variables and (flags := os.environ.get("XLA_FLAGS")):
        variables["XLA_FLAGS"] = f"{flags} {variables['XLA_FLAGS']}"
    if launch.gpu:
        devices = range((rank or 0) * launch.devices_per_process, ((rank or 0) + 1) * launch.devices_per_process)
        variables["CUDA_VISIBLE_DEVICES"] = "ITS SHARE" if rank is None else ",".join(map(str, devices))
    return variables


def _worker_environment(launch: Launch, rank: int | None, port: int | None) -> dict[str, str]:
    variables = process_environment(launch, rank)
    variables[COORDINATOR] = f"127.0.0.1:{'PORT' if port is None else port}"
    variables[PROCESS_ID] = "RANK" if rank is None else str(rank)
    if rank is not None:
        variables[LAUNCHER] = str(os.getpid())
    return variables


def _python(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "classer.tools.cli.main", *command[1:]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
