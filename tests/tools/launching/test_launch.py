"""The launcher: dry runs, invalid options, dead workers, stops, and resumption of runs that are killed repeatedly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from classer.data.errors import InputError
from classer.data.taxonomy import TaskKind
from classer.tests.helpers import TOY_LENGTH, write_shards, write_toy_data
from classer.tools import launch
from classer.tools.cli import train as training
from classer.tools.launching import kubernetes as launch_kubernetes
from classer.tools.launching import local as launch_local
from classer.tools.launching import slurm as launch_slurm
from classer.tools.launching.job import Launch, where
from classer.train.config import CurriculumStage, Recipe, TrainJob
from classer.train.preemption import CheckpointSchedule, Stopped
from classer.train.process_info import ProcessInfo

from ..conftest import LAUNCHER, Classer

TIMEOUT = 280
COMMAND = ("classer", "train", "--data", "my texts.csv", "--out", "runs/x", "--restartable")
KUBERNETES: dict[str, Any] = {"target": "kubernetes", "image": "registry.example/classer:1", "claim": "training"}


# The job's description


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"processes": 0}, "--processes is 0; it must be at least 1"),
        ({"devices_per_process": -1}, "--devices-per-process is -1"),
        ({"gpu": True}, "say how many with --devices-per-process"),
        ({"memory": "32 GB"}, "--memory is '32 GB'; give a number and M, G or T"),
        ({"time_limit": "a day"}, "--time-limit is 'a day'"),
        ({"name": "My Job"}, "--name is 'My Job'"),
        ({"target": "kubernetes", "claim": "x"}, "--target kubernetes needs --image"),
        ({"target": "kubernetes", "image": "x"}, "--target kubernetes needs --claim"),
        (KUBERNETES | {"mount": "data"}, "--mount is 'data'"),
    ],
)
def test_a_job_that_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Launch(**fields)


@pytest.mark.parametrize(
    ("out", "name"), [("runs/Big_Run.2", "big-run-2"), ("runs/2024", "classer-2024"), ("-", "classer")]
)
def test_a_name_is_made_from_the_folder(out: str, name: str) -> None:
    assert Launch().called(Path(out)) == name


def test_a_process_learns_who_it_is() -> None:
    given = {"CLASSER_COORDINATOR": "host:1", "CLASSER_NUM_PROCESSES": "4"}
    assert ProcessInfo.from_environment({"SLURM_PROCID": "3"}) is None
    for rank in ("CLASSER_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX"):
        assert ProcessInfo.from_environment(given | {rank: "3"}) == ProcessInfo("host:1", 4, 3)
    for wrong in ({}, {"CLASSER_PROCESS_ID": "4"}, {"CLASSER_PROCESS_ID": "-1"}, {"SLURM_PROCID": "first"}):
        with pytest.raises(InputError, match="CLASSER_NUM_PROCESSES must be a number"):
            ProcessInfo.from_environment(given | wrong)


@pytest.mark.parametrize(
    ("recipe", "folders"),
    [
        (Recipe(), "x/checkpoints"),
        (Recipe(focus_epochs=1), "x/checkpoints, x/focus/checkpoints"),
        (Recipe(epochs=0, focus_epochs=1), "x/focus/checkpoints"),
        (Recipe(curriculum=(CurriculumStage("all"),)), "x/stages/*/checkpoints"),
    ],
)
def test_a_job_says_where_its_checkpoints_are(recipe: Recipe, folders: str) -> None:
    job = TrainJob(data=Path("data"), out=Path("x"), recipe=recipe)
    assert f"Checkpoints: {folders}\n" in where(job, logs="here", stop="kill 1")
    if not recipe.curriculum:
        staged = TrainJob(data=Path("data"), out=Path("x"), recipe=recipe, curriculum=Path("stages.yaml"))
        assert "Checkpoints: x/stages/*/checkpoints" in where(staged, logs="here", stop="kill 1")


def test_a_save_is_due_by_steps_and_by_the_clock() -> None:
    now = 0.0
    pace = CheckpointSchedule(5, 1.0, clock=lambda: now)
    due = []
    for step in range(1, 21):
        now = step * 20.0
        due.append(pace.after(step)[0])
    assert [step for step, save in enumerate(due, start=1) if save] == [3, 5, 8, 10, 13, 15, 18, 20]
    assert [CheckpointSchedule(0, 0.0, clock=lambda: 1e9).after(step) for step in (1, 2)] == [(False, False)] * 2


# Slurm and Kubernetes


def test_the_batch_script_asks_for_what_was_said(tmp_path: Path) -> None:
    launch = Launch(target="slurm", processes=3, devices_per_process=8, gpu=True, cpus=4, memory="30G", time_limit="90")
    script = launch_slurm.batch_script(launch, COMMAND, tmp_path / "out")
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    options = {line.split("=")[0]: line.partition("=")[2] for line in lines}
    assert (options["ntasks"], options["gpus-per-task"], options["cpus-per-task"]) == ("3", "8", "4")
    assert (options["mem-per-cpu"], options["time"], options["signal"]) == ("7680M", "90", "B:USR1@120")
    assert "requeue" in options
    assert "'my texts.csv'" in script
    assert "XLA_FLAGS" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def command_on_path(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


class Batch:
    """Runs the batch script of a job with 2 tasks and 1 restart, with stubs of Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.out, self._commands, self._asked = folder / "out", folder / "bin", folder / "asked"
        (self.out / "logs").mkdir(parents=True)
        self.log = self.out / "logs" / "slurm-7.log"
        command_on_path(self._commands, "scontrol", f'echo "$@" >>{self._asked}')
        command_on_path(self._commands, "sleep", "")
        self._script = launch_slurm.batch_script(Launch(target="slurm", processes=2, restarts=1), COMMAND, self.out)

    def run(self, srun: str) -> tuple[int, bool]:
        """Runs the script with a stub of srun; returns the exit code and whether the job was requeued."""
        command_on_path(self._commands, "srun", srun)
        self._asked.unlink(missing_ok=True)
        path = f"{self._commands}:{os.environ['PATH']}"
        variables = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "9"}
        with self.log.open("a") as log:
            done = subprocess.run(
                ["bash", "-c", self._script],
                stdout=log,
                stderr=log,
                env=os.environ | variables,
                timeout=60,
                check=False,
            )
        return done.returncode, "requeue 7" in self._asked.read_text().splitlines()


KILLED = "echo 'srun: error: here: task 1: Killed' >&2; exit 137"
# The time limit is near: Slurm signals the batch script, which signals srun.
TIME = "trap 'exit 0' TERM; kill -USR1 $PPID; while :; do /bin/sleep 0.05; done"


def test_a_batch_job_goes_back_when_its_time_is_over_and_after_some_deaths(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    (batch.out / "logs" / "worker-1.log").touch()
    assert batch.run("exit 2") == (2, False)
    assert batch.run(KILLED) == (137, True)
    assert [batch.run(TIME) for _ in range(2)] == [(0, True)] * 2  # does not count as a death
    assert batch.run(KILLED) == (137, False)
    assert batch.run("exit 0") == (0, False)
    (batch.out / "bundle").mkdir()
    assert batch.run(TIME) == (0, False)


def test_a_batch_job_shows_the_last_lines_of_the_task_that_died_first(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    for task in (0, 1):
        lines = [f"line {number} of task {task}\n" for number in range(30)]
        (batch.out / "logs" / f"worker-{task}.log").write_text("".join(lines))
    batch.run(KILLED)
    assert f"Its last lines ({batch.out}/logs/worker-1.log):\n  | line 10 of task 1\n" in batch.log.read_text()
    before = batch.log.stat().st_size
    both = "echo 'srun: error: here: tasks 0-1: Exited with exit code 1' >&2; exit 1"
    assert batch.run(both) == (1, False)
    said = batch.log.read_text()[before:]
    assert "Task 0 was the first to end" in said
    assert "task 1" not in said


def test_the_manifests_are_an_indexed_job_and_its_service() -> None:
    launch = Launch(**KUBERNETES, processes=3, devices_per_process=8, gpu=True, memory="30G", namespace="ml")
    service, job = yaml.safe_load_all(launch_kubernetes.manifests_yaml(launch, COMMAND, Path("runs/x")))
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"job-name": "x"})
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    container = pod["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["CLASSER_COORDINATOR"] == "x-0.x:8476"
    assert ProcessInfo.from_environment(variables | {"JOB_COMPLETION_INDEX": "2"}) == ProcessInfo("x-0.x:8476", 3, 2)
    assert container["command"] == list(COMMAND)
    assert container["resources"]["limits"] == {"memory": "30Gi", "nvidia.com/gpu": "8"}
    assert job["metadata"]["namespace"] == "ml"


def test_a_pod_that_was_stopped_is_not_taken_for_finished(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A stopped pod exits with the manifest's code, and the failure policy restarts it without counting a failure."""
    _, job = launch_kubernetes.manifests(Launch(**KUBERNETES), COMMAND, Path("runs/x"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    code = next(one["value"] for one in container["env"] if one["name"] == "CLASSER_STOPPED_CODE")
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [2], "Ignore": [int(code)]}

    def stop(job: TrainJob) -> None:
        raise Stopped("Stopped after step 3.")

    monkeypatch.setattr("classer.train.run.run_job", stop)
    monkeypatch.setattr("classer.train.preemption.listen", lambda: None)
    words = ["--data", "x.csv", "--out", "nowhere", "--restartable"]
    training.train(words)  # without the variable, the exit code of a stop is 0
    monkeypatch.setenv("CLASSER_STOPPED_CODE", code)
    with pytest.raises(SystemExit, match=code):
        training.train(words)
    assert capsys.readouterr().out == "Stopped after step 3. The same command goes on.\n" * 2


def kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, active: str) -> None:
    """Installs a stub of kubectl that records its arguments and input.

    `active` is the number of active pods of an existing job; "" for no job.
    """
    script = f"""
        echo "$*" >>{folder}/asked
        case "$*" in
          *"get job"*) {f"echo -n {active}" if active else "exit 1"} ;;
          *apply*) cat >{folder}/applied; [ -e {folder}/refused ] && {{ echo forbidden >&2; exit 1; }} ;;
        esac; exit 0"""
    command_on_path(folder / "bin", "kubectl", script)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_a_job_is_applied_with_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    kubectl(tmp_path, monkeypatch, active="")
    job, asked = TrainJob(data=Path("data"), out=Path("runs/x")), tmp_path / "asked"
    described = Launch(**KUBERNETES, processes=2, namespace="ml")
    assert launch_kubernetes.apply_manifests(described, COMMAND, job) == 0
    assert "delete" not in asked.read_text()
    assert (tmp_path / "applied").read_text() == launch_kubernetes.manifests_yaml(described, COMMAND, job.out)
    said = capsys.readouterr().out
    assert "Applied as Kubernetes job 'x': 2 pods" in said
    assert "Stop:        kubectl --namespace ml delete job x (it saves first)" in said

    kubectl(tmp_path, monkeypatch, active="0")  # a failed job is replaced
    assert launch_kubernetes.apply_manifests(described, COMMAND, job) == 0
    assert asked.read_text().splitlines()[-2:] == ["--namespace ml delete job x", "apply --filename -"]

    kubectl(tmp_path, monkeypatch, active="2")
    with pytest.raises(InputError, match="The Kubernetes job 'x' is running already"):
        launch_kubernetes.apply_manifests(described, COMMAND, job)
    kubectl(tmp_path, monkeypatch, active="")
    (tmp_path / "refused").touch()
    with pytest.raises(InputError, match="kubectl refused the job: forbidden"):
        launch_kubernetes.apply_manifests(described, COMMAND, job)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="needs the command kubectl"):
        launch_kubernetes.apply_manifests(described, COMMAND, job)


def published_schema(kind: str) -> jsonschema.Draft202012Validator:
    """A validator of a kind by Kubernetes' published schema, which rejects unknown fields."""
    schema = json.loads(Path(__file__).with_name("kubernetes_v1.31.json").read_text())
    return jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{kind}"})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"devices_per_process": 4},
        {"processes": 64, "devices_per_process": 8, "gpu": True, "cpus": 8, "memory": "64G"},
    ],
)
def test_the_manifests_are_valid_by_the_published_schemas(fields: dict[str, Any]) -> None:
    launch = Launch(**KUBERNETES, **fields)
    service, job = yaml.safe_load_all(launch_kubernetes.manifests_yaml(launch, COMMAND, Path("runs/x")))
    published_schema("io.k8s.api.core.v1.Service").validate(service)
    published_schema("io.k8s.api.batch.v1.Job").validate(job)
    # A negative control: an unknown field is rejected.
    job["spec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        published_schema("io.k8s.api.batch.v1.Job").validate(job)


# Real processes on this machine


@pytest.fixture
def options(tmp_path: Path, tiny_encoder: Path) -> list[str]:
    data = write_toy_data(tmp_path / "toy.jsonl", TaskKind.MULTICLASS, 120)
    words = ["--data", data, "--encoder", tiny_encoder, "--out", tmp_path / "run", "--max-length", 16]
    words += ["--batch-size", 32, "--compute-dtype", "float32", "--dropout", 0.1, "--patience", 0]
    return [str(word) for word in words]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts the launcher with options and writes its output to a file."""
    started = []

    def begin(*words: object) -> subprocess.Popen[str]:
        with (tmp_path / "output").open("a") as output:
            started.append(subprocess.Popen([*LAUNCHER, *map(str, words)], stdout=output, stderr=output, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()  # the kernel kills its workers too
        process.wait()


def test_a_dry_run_of_each_target_runs_nothing(options: list[str], classer: Classer, tmp_path: Path) -> None:
    kubernetes = [word for name, value in KUBERNETES.items() for word in (f"--{name}", value)]
    for words, says in (
        (["--processes", 2, "--devices-per-process", 4], "# 2 times, RANK from 0:\nCLASSER_NUM_PROCESSES=2 XLA_FLAGS="),
        (["--gpu", "--devices-per-process", 2], "CLASSER_NUM_PROCESSES=1 CUDA_VISIBLE_DEVICES=0,1 /"),
        (["--target", "slurm", "--processes", 2], "#SBATCH --ntasks=2\n"),
        (kubernetes, "kind: Job\n"),
    ):
        done = classer(*options, *words, "--dry-run", command=LAUNCHER)
        assert done.returncode == 0, done.stderr
        assert "--restartable" in done.stdout
        assert says in done.stdout
    assert not (tmp_path / "run").exists()


def test_one_process_runs_here_on_its_gpus_and_says_where(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ran = []
    monkeypatch.setattr(launch, "train", ran.append)
    monkeypatch.setattr(launch, "tune_allocator", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    launch.launch(["--data", "x.csv", "--out", "runs/x", "--gpu", "--devices-per-process", "2"])
    assert ran == [("--data", "x.csv", "--out", "runs/x", "--restartable")]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    said = capsys.readouterr().out
    assert f"Stop:        kill {os.getpid()} (it saves first)" in said
    assert "Checkpoints: runs/x/checkpoints\n" in said
    assert "tensorboard --logdir runs/x" in said


@pytest.fixture
def run_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """A function that runs Python code in a local job of two processes and returns the job's exit code."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(launch_local, "_python", list)
    job = TrainJob(data=Path("data"), out=tmp_path / "run")
    yield lambda code: launch_local.run_processes(Launch(processes=2), (sys.executable, "-c", code), job)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_processes_that_do_not_stop_are_ended_in_the_end(run_local, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(launch_local, "GRACE", 0.0)
    hung = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.environ['CLASSER_PROCESS_ID'] == '1': os.kill(int(os.environ['CLASSER_LAUNCHER']), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert run_local(hung) == 128 + signal.SIGINT
    said = capfd.readouterr().err
    assert "Stopping: the processes save first" in said
    assert "Stopped without saving." in said


def test_a_dead_process_has_its_last_lines_shown(run_local, tmp_path: Path, capfd) -> None:
    dying = (
        "import os, sys, time; os.environ['CLASSER_PROCESS_ID'] == '1' and sys.exit('no such word'); time.sleep(1000)"
    )
    assert run_local(dying) == 1
    assert (
        f"Process 1 ended with exit code 1, so the job ends. Its last lines ({tmp_path}/run/logs/worker-1.log):\n"
        "  | no such word\n"
    ) in capfd.readouterr().err


def steps_logged(run: Path) -> int:
    """The number of the last step in the log."""
    file = run / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.startswith("{") and line.endswith("}")]
    return max(steps, default=0)


def newest_checkpoint(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], output: Path, seconds: float = TIMEOUT
) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, output.read_text()[-3000:]
        assert time.monotonic() < until, output.read_text()[-3000:]
        time.sleep(0.02)


def worker_ids(launcher: int) -> list[int]:
    """Process ids of the launcher's workers, in the order of their ranks."""
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.slow
def test_a_dead_worker_ends_the_job_with_its_last_lines(options, begin, tmp_path: Path) -> None:
    process = begin(*options, "--epochs", 500, "--processes", 2)
    wait_for(lambda: steps_logged(tmp_path / "run") > 0, process, tmp_path / "output")
    workers = worker_ids(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    said = (tmp_path / "output").read_text()
    assert "Process 1 was ended by SIGKILL, so the job ends. Its last lines" in said
    log = (tmp_path / "run" / "logs" / "worker-1.log").read_text().splitlines()
    assert said.count("\n  | ") == min(len(log), launch_local.LAST_LINES)
    assert "\n".join(f"  | {line}" for line in log[-launch_local.LAST_LINES :]) in said
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
def test_what_the_user_did_wrong_is_said_once_in_several_processes(options, begin, tmp_path: Path) -> None:
    process = begin(*options, "--batch-size", 3, "--processes", 2)
    assert process.wait(TIMEOUT) == 2
    said = (tmp_path / "output").read_text()
    assert "A batch of 3 cannot be divided evenly over 2 devices" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_stop_saves_and_another_number_of_processes_goes_on(options, begin, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begin(*options, "--epochs", 60, "--processes", 2, "--devices-per-process", 2)
    wait_for(lambda: steps_logged(run) >= 10, process, tmp_path / "output")
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0, (tmp_path / "output").read_text()[-3000:]
    said = (tmp_path / "output").read_text()
    assert "it is saved. The same command goes on." in said
    stopped = newest_checkpoint(run)
    assert stopped >= 10
    assert not (run / "bundle").exists()

    process = begin(*options, "--epochs", 60, "--processes", 1)
    assert process.wait(TIMEOUT) == 0, (tmp_path / "output").read_text()[-3000:]
    assert f"(step {stopped:,})" in (tmp_path / "output").read_text()
    assert (run / "bundle").is_dir()
    assert begin(*options, "--epochs", 60).wait(TIMEOUT) == 0
    assert "is finished; its bundle is" in (tmp_path / "output").read_text()


@pytest.mark.slow
def test_a_killed_job_goes_on_with_other_devices_to_the_same_parameters(options, begin, tmp_path: Path) -> None:
    """The parameters agree up to rounding, as another number of devices sums in another order."""
    job = [*options, "--epochs", 20, "--save-steps", 3]
    four, run = ("--processes", 2, "--devices-per-process", 2), tmp_path / "run"
    process = begin(*job, *four)
    wait_for(lambda: newest_checkpoint(run) >= 20, process, tmp_path / "output")
    os.kill(worker_ids(process.pid)[0], signal.SIGKILL)
    process.wait(60)
    assert not (run / "bundle").exists()
    for words in (["--processes", 1, "--devices-per-process", 2], [*four, "--out", tmp_path / "whole"]):
        assert begin(*job, *words).wait(TIMEOUT) == 0, (tmp_path / "output").read_text()[-3000:]
    assert "Going on after epoch" in (tmp_path / "output").read_text()
    for name, value in weights_of(run).items():
        np.testing.assert_allclose(value, weights_of(tmp_path / "whole")[name], rtol=1e-3, atol=1e-4, err_msg=name)


def weights_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "bundle-float32" / "weights.safetensors")


KILLS = 20
EPOCHS = 100


@pytest.mark.slow
def test_processes_that_share_the_shards_learn_what_one_learns(tiny_encoder: Path, begin, tmp_path: Path) -> None:
    """Two processes with one device each read half of each batch; one process with two devices reads whole batches."""
    words = ["--data", write_shards(tmp_path, tiny_encoder), "--encoder", tiny_encoder, "--max-length", TOY_LENGTH]
    words += ["--batch-size", 32, "--compute-dtype", "float32", "--epochs", 2, "--focus-epochs", 1]
    for name, processes in (("two", ("--processes", 2)), ("one", ("--processes", 1, "--devices-per-process", 2))):
        process = begin(*words, "--out", tmp_path / name, *processes)
        assert process.wait(TIMEOUT) == 0, (tmp_path / "output").read_text()[-3000:]
    ours, theirs = (weights_of(tmp_path / name) for name in ("two", "one"))
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_job_that_is_killed_20_times_ends_with_the_very_same_parameters(
    options, begin, tmp_path: Path, seed: int
) -> None:
    """SIGKILL goes to the launcher or one of its two processes, at random times, also during saves (every 3 steps).

    CLASSER_KILLS sets another number of kills.
    """
    rng, kills = random.Random(seed), int(os.environ.get("CLASSER_KILLS", KILLS))
    job = [*options, "--processes", 2, "--save-steps", 3, "--epochs", EPOCHS]
    run, output, in_saves = tmp_path / "run", tmp_path / "output", 0
    log = run / "metrics.jsonl"
    for number in range(kills):
        before = steps_logged(run)
        process = begin(*job)
        written, saved = (log.stat().st_mtime_ns if log.exists() else 0), newest_checkpoint(run)
        # The log is opened and truncated to the checkpoint after the state is restored and before the first step.
        wait_for(lambda since=written: log.exists() and log.stat().st_mtime_ns > since, process, output)
        if number % 5:  # every fifth kill may come before the first step
            enough = saved + rng.randint(1, 10)
            wait_for(lambda enough=enough: steps_logged(run) >= enough, process, output)
        time.sleep(rng.uniform(0, 0.2))
        victim = rng.choice([process.pid, *worker_ids(process.pid)])
        in_saves += any("tmp" in path.name for path in (run / "checkpoints").glob("*"))
        os.kill(victim, signal.SIGKILL)
        process.wait(60)
        assert not (run / "bundle").exists(), f"it was finished before kill {number + 1}, after step {before}"
    for words in (job, [*job, "--out", tmp_path / "whole"]):
        assert begin(*words).wait(1200) == 0, output.read_text()[-3000:]
    print(
        f"{kills} kills, {in_saves} of them with a save under way; the last after step {before} of {steps_logged(run)}"
    )
    assert in_saves or kills < KILLS, "none of the kills met a save under way"
    ours, theirs = weights_of(run), weights_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, steps[-1] + 1)), "each step stands once in the log"
