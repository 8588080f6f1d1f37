"""A job under Slurm: the batch script, and its submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from classer.data.errors import InputError
from classer.tools.launch_job import Launch, where
from classer.train.place import COORDINATOR, LOGS

SECONDS_TO_SAVE = 120  # before the time limit


def describe(launch: Launch, command: Sequence[str], out: Path) -> str:
    """The batch script.

    Slurm gives its shell USR1 before the time limit; it then tells the tasks to save, and puts the job back in the
    queue. It does so too when a task died (exit codes from 128 on are signals, 1 is a crash; 2, the user's error, would
    only come again). `scancel` ends the job for good.
    """
    out = out.resolve()
    options = {
        "job-name": launch.called(out),
        "ntasks": launch.processes,
        "output": f"{out}/{LOGS}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{SECONDS_TO_SAVE}",
        "cpus-per-task": launch.cpus or None,
        "mem-per-cpu" if launch.cpus else "mem": _memory(launch),
        "gpus-per-task": launch.devices_per_process if launch.gpu else None,
        "time": launch.time_limit,
        "partition": launch.partition,
        "account": launch.account,
    }
    lines = ["#!/bin/bash", "#SBATCH --requeue"]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in launch.environment().items()]
    bundle = shlex.quote(f"{out}/bundle")
    died = f'[ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launch.restarts} ]'
    task = shlex.join([sys.executable, "-m", "classer.tools.cli", *command[1:]])
    return "\n".join(
        [
            *lines,
            "",
            *exports,
            f'export {COORDINATOR}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            ':$((20000 + SLURM_JOB_ID % 20000))"',
            "",
            f"srun --kill-on-bad-exit=1 --open-mode=append --output={shlex.quote(f'{out}/{LOGS}/worker-%t.log')} \\",
            f"  {task} &",
            "tasks=$!",
            "again=",
            "trap 'again=time; kill -TERM $tasks' USR1",
            'wait "$tasks"; code=$?',
            '[ "$again" ] && { wait "$tasks"; code=$?; }  # a trap ends the first wait',
            f'if [ ! -e {bundle} ] && {{ [ "$again" ] || {{ {died}; }}; }}; then',
            '  echo "The tasks ended with exit code $code; back to the queue."',
            '  scontrol requeue "$SLURM_JOB_ID" && sleep 60',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def start(launch: Launch, command: Sequence[str], out: Path) -> int:
    """Writes the script to `out/logs/job.sbatch` and submits it."""
    if shutil.which("sbatch") is None:
        raise InputError("--target slurm needs the command sbatch on this machine; --dry-run prints the script.")
    logs = out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "job.sbatch"
    script.write_text(describe(launch, command, out), encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"sbatch refused the job: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    print(f"Submitted as Slurm job {number}: {launch.processes} tasks. Watch it: squeue --job {number}")
    print(where(out, logs=f"{logs}/worker-*.log, {logs}/slurm-{number}.log", stop=f"scancel --signal=TERM {number}"))
    return 0


def _memory(launch: Launch) -> str:
    """Slurm counts memory by core or by node."""
    if not launch.memory:
        return ""
    number, unit = re.fullmatch(r"(\d+)(.)", launch.memory).groups()  # pyright: ignore
    megabytes = int(number) * {"M": 1, "G": 1 << 10, "T": 1 << 20}[unit]
    return f"{-(-megabytes // launch.cpus)}M" if launch.cpus else f"{megabytes}M"
