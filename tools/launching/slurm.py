"""A job under Slurm: the batch script and its submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from classer.data.errors import InputError
from classer.tools.launching.job import LAST_LINES, SECONDS_TO_SAVE, Launch, where
from classer.train.process_info import COORDINATOR, LOGS

if TYPE_CHECKING:
    from classer.train.config import TrainJob

# srun's errors name the failed tasks, the first failure first.
_FIRST_DEAD = r"sed -n 's/^srun: error: .* tasks\{0,1\} \([0-9][0-9]*\).*/\1/p' | head -n 1"


def batch_script(launch: Launch, command: Sequence[str], out: Path) -> str:
    """The batch script.

    Slurm sends USR1 to the script's shell before the time limit. The script then signals the tasks to save, and
    requeues the job. It also requeues the job after a task died (exit code 1 is a crash, codes from 128 on are
    signals), but not after a user error (2), which would occur again. Deaths are counted in a file, because Slurm's own
    count includes all requeues. `scancel` ends the job for good.
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
    task = shlex.join([sys.executable, "-m", "classer.tools.cli.main", *command[1:]])
    return "\n".join(
        [
            *lines,
            "",
            *exports,
            f'export {COORDINATOR}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            ':$((20000 + SLURM_JOB_ID % 20000))"',
            "",
            f"logs={shlex.quote(f'{out}/{LOGS}')}",
            'log="$logs/slurm-$SLURM_JOB_ID.log" deaths="$logs/deaths-$SLURM_JOB_ID"',
            'begin=$(($(wc -l <"$log") + 1))  # what was said before a requeue stands above',
            "again=",
            "trap 'again=time; kill -TERM $!' USR1",
            'srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/worker-%t.log" \\',
            f"  {task} &",
            "wait $!; code=$?",
            '[ "$again" ] && { wait $!; code=$?; }  # a trap ends the first wait',
            'if [ -z "$again" ] && [ "$code" -ne 0 ]; then',
            f'  dead=$(tail -n "+$begin" "$log" | {_FIRST_DEAD})',
            '  if [ "$dead" ]; then',
            '    echo "Task $dead was the first to end. Its last lines ($logs/worker-$dead.log):"',
            f"    tail -n {LAST_LINES} \"$logs/worker-$dead.log\" | sed 's/^/  | /'",
            "  fi",
            '  if [ "$code" -ne 2 ]; then',
            '    echo "$code" >>"$deaths"',
            f'    [ "$(wc -l <"$deaths")" -le {launch.restarts} ] && again=death',
            "  fi",
            "fi",
            f'if [ "$again" ] && [ ! -e {bundle} ]; then',
            '  echo "The tasks ended with exit code $code; back to the queue."',
            '  scontrol requeue "$SLURM_JOB_ID" && sleep 60',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def submit_batch_script(launch: Launch, command: Sequence[str], job: TrainJob) -> int:
    """Writes the script to `out/logs/job.sbatch`, submits it, and returns exit code 0.

    Raises:
      InputError: sbatch is missing or refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise InputError("--target slurm needs the command sbatch on this machine; --dry-run prints the script.")
    logs = job.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "job.sbatch"
    script.write_text(batch_script(launch, command, job.out), encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"sbatch refused the job: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    print(f"Submitted as Slurm job {number}: {launch.processes} tasks. Watch it: squeue --job {number}")
    print(where(job, logs=f"{logs}/worker-*.log, {logs}/slurm-{number}.log", stop=f"scancel --signal=TERM {number}"))
    return 0


def _memory(launch: Launch) -> str:
    """The memory option's value in MB: per core if `cpus` is given, else per node; "" without a limit."""
    if not launch.memory:
        return ""
    number, unit = re.fullmatch(r"(\d+)(.)", launch.memory).groups()  # pyright: ignore
    megabytes = int(number) * {"M": 1, "G": 1 << 10, "T": 1 << 20}[unit]
    return f"{-(-megabytes // launch.cpus)}M" if launch.cpus else f"{megabytes}M"
