"""Fixtures with the real command in real processes: one tiny training run and one server for all tests here."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from classer.data.taxonomy import TaskKind
from classer.tests.helpers import write_toy_data
from classer.tests.processes import Process

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "classer.tools.cli.main")
LAUNCHER = (sys.executable, str(ROOT / "tools" / "launch.py"))
TIMEOUT = 180

Classer = Callable[..., subprocess.CompletedProcess[str]]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The inputs and outputs of a `classer train`.

    Attributes:
      out: the run's folder.
      data, test: files of training and test examples.
      options: the options except --out.
      output, errors: stdout and stderr.
    """

    out: Path
    data: Path
    test: Path
    options: tuple[str, ...]
    output: str
    errors: str

    @property
    def bundle(self) -> Path:
        return self.out / "bundle"


@pytest.fixture(scope="session")
def classer() -> Classer:
    """A function that runs `classer ARGUMENTS…` in a new process."""

    def run(
        *arguments: object, command: tuple[str, ...] = COMMAND, stdin: str | bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=TIMEOUT,
            env={**os.environ, **environment},
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def tiny_options(tiny_encoder: Path) -> tuple[str, ...]:
    """Options for a training run of a few seconds."""
    return ("--encoder", str(tiny_encoder), "--epochs", "1", "--max-length", "16", "--batch-size", "16")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, classer: Classer, tiny_options: tuple[str, ...]) -> Trained:
    """A multiclass classifier that has learnt the toy texts; tests must not write to its folder."""
    folder = tmp_path_factory.mktemp("trained")
    data = to_csv(write_toy_data(folder / "topics.jsonl", TaskKind.MULTICLASS, 300))
    test = to_csv(write_toy_data(folder / "held_out.jsonl", TaskKind.MULTICLASS, 60, seed=1))
    options = ("--data", str(data), "--test", str(test), *tiny_options, "--epochs", "4", "--learning-rate", "0.003")
    done = classer("train", *options, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return Trained(folder / "run", data, test, options, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def server(trained: Trained) -> Iterator[str]:
    """The address of a `classer serve` with the bundle of `trained`."""
    command = [*COMMAND, "serve", str(trained.bundle), "--port", "0"]
    with Process(command) as process:
        yield process.stdout.line("Serving").split()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0


def to_csv(jsonl: Path) -> Path:
    """Writes the examples of a JSON Lines file, with one label each, as CSV beside it; returns the new file."""
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    with jsonl.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return jsonl.with_suffix(".csv")
