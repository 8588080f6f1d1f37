"""The launcher: what it would run, what it refuses, dead workers, stops, and runs that are killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from classer.data.errors import InputError
from classer.data.taxonomy import TaskKind
from classer.tests.helpers import TOY_LENGTH, write_shards, write_toy_data
from classer.tools import launch_kubernetes, launch_slurm
from classer.tools.launch_job import Launch
from classer.train.place import Place
from classer.train.processes import Pace

from .conftest import LAUNCHER, Classer

TIMEOUT = 280
COMMAND = ("classer", "train", "--data", "my texts.csv", "--out", "runs/x", "--restartable")
KUBERNETES: dict[str, Any] = {"target": "kubernetes", "image": "registry.example/classer:1", "claim": "training"}


# One description


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
    assert Place.from_environment({"SLURM_PROCID": "3"}) is None
    for rank in ("CLASSER_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX"):
        assert Place.from_environment(given | {rank: "3"}) == Place("host:1", 4, 3)
    for wrong in ({}, {"CLASSER_PROCESS_ID": "4"}, {"CLASSER_PROCESS_ID": "-1"}, {"SLURM_PROCID": "first"}):
        with pytest.raises(InputError, match="CLASSER_NUM_PROCESSES must be a number"):
            Place.from_environment(given | wrong)


def test_a_save_is_due_by_steps_and_by_the_clock() -> None:
    now = 0.0
    pace = Pace(5, 1.0, clock=lambda: now)
    due = []
    for step in range(1, 21):
        now = step * 20.0
        due.append(pace.after(step)[0])
    assert [step for step, save in enumerate(due, start=1) if save] == [3, 5, 8, 10, 13, 15, 18, 20]
    assert [Pace(0, 0.0, clock=lambda: 1e9).after(step) for step in (1, 2)] == [(False, False)] * 2


# Slurm and Kubernetes


def test_the_batch_script_asks_for_what_was_said(tmp_path: Path) -> None:
    launch = Launch(target="slurm", processes=3, devices_per_process=8, gpu=True, cpus=4, memory="30G", time_limit="90")
    script = launch_slurm.describe(launch, COMMAND, tmp_path / "out")
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    options = {line.split("=")[0]: line.partition("=")[2] for line in lines}
    assert (options["ntasks"], options["gpus-per-task"], options["cpus-per-task"]) == ("3", "8", "4")
    assert (options["mem-per-cpu"], options["time"], options["signal"]) == ("7680M", "90", "B:USR1@120")
    assert "requeue" in options
    assert "'my texts.csv'" in script
    assert "XLA_FLAGS" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_manifests_are_an_indexed_job_and_its_service() -> None:
    launch = Launch(**KUBERNETES, processes=3, devices_per_process=8, gpu=True, memory="30G", namespace="ml")
    service, job = yaml.safe_load_all(launch_kubernetes.describe(launch, COMMAND, Path("runs/x")))
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"job-name": "x"})
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    container = pod["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["CLASSER_COORDINATOR"] == "x-0.x:8476"
    assert Place.from_environment(variables | {"JOB_COMPLETION_INDEX": "2"}) == Place("x-0.x:8476", 3, 2)
    assert container["command"] == list(COMMAND)
    assert container["resources"]["limits"] == {"memory": "30Gi", "nvidia.com/gpu": "8"}
    assert job["metadata"]["namespace"] == "ml"


def published_schema(kind: str) -> jsonschema.Draft202012Validator:
    """What Kubernetes publishes of a kind; a field that it does not know is an error."""
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
    service, job = yaml.safe_load_all(launch_kubernetes.describe(launch, COMMAND, Path("runs/x")))
    published_schema("io.k8s.api.core.v1.Service").validate(service)
    published_schema("io.k8s.api.batch.v1.Job").validate(job)
    # The schemas do see what is wrong.
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
    """Starts the launcher with options; its output goes to a file."""
    started = []
    cache = str(jax.config.jax_compilation_cache_dir or tmp_path / "programs")  # pyright: ignore

    def begin(*words: object) -> subprocess.Popen[str]:
        with (tmp_path / "output").open("a") as output:
            started.append(
                subprocess.Popen(
                    [*LAUNCHER, *map(str, words)],
                    stdout=output,
                    stderr=output,
                    text=True,
                    env=os.environ
                    | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
                )
            )
        return started[-1]

    yield begin
    for process in started:
        process.kill()  # the kernel ends its workers with it
        process.wait()


def test_a_dry_run_of_each_target_runs_nothing(options: list[str], classer: Classer, tmp_path: Path) -> None:
    for words in (["--processes", 2, "--devices-per-process", 4], ["--target", "slurm"]):
        done = classer(*options, *words, "--dry-run", command=LAUNCHER)
        assert done.returncode == 0, done.stderr
        assert "--restartable" in done.stdout
    assert not (tmp_path / "run").exists()


def steps_logged(run: Path) -> int:
    """The last step in the log."""
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
    """The launcher's processes, in the order of their ranks."""
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


KILLS = 20
EPOCHS = 100


@pytest.mark.slow
def test_processes_that_share_the_shards_learn_what_one_learns(tiny_encoder: Path, begin, tmp_path: Path) -> None:
    """Two processes of a device each read half of each batch; one process of two devices reads all of it."""
    words = ["--data", write_shards(tmp_path, tiny_encoder), "--encoder", tiny_encoder, "--max-length", TOY_LENGTH]
    words += ["--batch-size", 32, "--compute-dtype", "float32", "--epochs", 2, "--focus-epochs", 1]
    for name, processes in (("two", ("--processes", 2)), ("one", ("--processes", 1, "--devices-per-process", 2))):
        process = begin(*words, "--out", tmp_path / name, *processes)
        assert process.wait(TIMEOUT) == 0, (tmp_path / "output").read_text()[-3000:]
    ours, theirs = (load_file(tmp_path / name / "bundle-float32" / "weights.safetensors") for name in ("two", "one"))
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_job_that_is_killed_20_times_ends_with_the_very_same_parameters(
    options, begin, tmp_path: Path, seed: int
) -> None:
    """SIGKILL to the launcher or to either of its two processes, at random moments, in saves too (one each 3 steps).

    Set CLASSER_KILLS for another number of kills.
    """
    rng, kills = random.Random(seed), int(os.environ.get("CLASSER_KILLS", KILLS))
    job = [*options, "--processes", 2, "--save-steps", 3, "--epochs", EPOCHS]
    run, output, in_saves = tmp_path / "run", tmp_path / "output", 0
    log = run / "metrics.jsonl"
    for number in range(kills):
        before = steps_logged(run)
        process = begin(*job)
        written, saved = (log.stat().st_mtime_ns if log.exists() else 0), newest_checkpoint(run)
        # The log is opened, and cut back to the checkpoint, once the state is restored; then a step is done.
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
    ours, theirs = (
        load_file(folder / "bundle-float32" / "weights.safetensors") for folder in (run, tmp_path / "whole")
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, steps[-1] + 1)), "each step stands once in the log"
