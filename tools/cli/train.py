"""The command `classer train`; `tools/launch.py` uses its parser. Heavy modules are imported inside functions."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from classer.data.errors import InputError
from classer.data.readers import data_file

from .arguments import check_can_make

if TYPE_CHECKING:
    from classer.model.bundle import Bundle
    from classer.train.config import Recipe, TrainJob
    from classer.train.run import TrainResult


def train(argv: Sequence[str]) -> None:
    """Train a classifier on labelled texts; leaves a bundle to serve in OUT/bundle."""
    job = parse_job(argv, prog="classer train")
    check_can_make(job.out)
    from classer.train import distributed, preemption
    from classer.train.run import run_job

    distributed.join()
    preemption.listen()
    is_primary = distributed.is_primary()  # `run_job` leaves the job at its end
    started = time.monotonic()
    try:
        result = run_job(job)
    except preemption.Stopped as e:
        if is_primary:
            print(f"{e} The same command goes on{'' if job.restartable else ', with --resume'}.", flush=True)
        if code := preemption.end(e):
            sys.exit(code)
        return
    if result is None:
        if is_primary:
            print(f"The run in {job.out} is finished; its bundle is {job.out / 'bundle'}.")
        return
    print_result(result, time.monotonic() - started)
    print(_next_steps(job, result))


def parse_job(argv: Sequence[str], *, prog: str) -> TrainJob:
    """A training job from command-line arguments; `--preset NAME` sets the defaults of the other options.

    Raises:
      InputError: no such preset, or a value out of range.
    """
    from classer.train.config import Recipe, TrainJob

    preset, rest = _take_preset(list(argv))
    recipe = _load_preset(preset) if preset else Recipe()
    default = TrainJob(data=tyro.MISSING, out=tyro.MISSING, recipe=recipe)
    description = (
        "Train, calibrate and quantise a classifier. Data: a CSV, TSV, JSONL or Parquet file with a text and a label "
        f"column, or a folder with task.json. --preset NAME starts from a preset: {', '.join(preset_names())}."
    )
    return tyro.cli(
        TrainJob, prog=prog, args=rest, default=default, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )


def preset_names() -> list[str]:
    from classer.train import presets

    return sorted(module.name for module in pkgutil.iter_modules(presets.__path__))


def print_result(result: TrainResult, seconds: float) -> None:
    """The scores of a run, side by side."""
    if len(result.tasks) == 1:
        _print_task(result)
    else:
        _print_tasks(result)
    print(f"{seconds / 60:.1f} minutes. Reports and pictures: {_path(result.bundle).parent / 'results'}")


def _next_steps(job: TrainJob, result: TrainResult) -> str:
    """Commands that use the bundle, on the examples of the run where `classer predict` reads these."""
    bundle, data = shlex.quote(str(job.out / "bundle")), "FILE"
    with contextlib.suppress(InputError):
        data_file(job.data, "test")
        data = shlex.quote(str(job.data))
    column = "" if job.text_column == "text" else f" --text-column {shlex.quote(job.text_column)}"
    task = "" if len(result.tasks) == 1 else f" --task {shlex.quote(result.tasks[0].task)}"
    out = shlex.quote(str(job.out / "predicted.csv"))
    return "\n".join(
        (
            f'\nAsk it:    classer classify "some text" --bundle {bundle}{task}',
            f"Use it:    classer predict {bundle} --data {data} --out {out} --prefix predicted_{column}{task}",
            f"Serve it:  classer serve {bundle}",
        )
    )


def _print_task(result: TrainResult) -> None:
    (scores,) = result.tasks
    print(f"\nOn {scores.float_metrics.n:,} {scores.split} examples:")
    print(f"  {'':24}{'accuracy':>9} {'macro-F1':>9} {'ECE':>7} {'MB':>7}")
    for name, bundle, metrics in (
        ("Classer, float32", result.float_bundle, scores.float_metrics),
        ("Classer, INT8", result.bundle, scores.int8_metrics),
    ):
        size = _megabytes(bundle)
        print(f"  {name:24}{metrics.accuracy:>9.2%} {metrics.macro_f1:>9.3f} {metrics.ece:>7.3f} {size:>7.1f}")
    if scores.baseline is not None:
        print(f"  {'TF-IDF + linear SVM':24}{scores.baseline.accuracy:>9.2%} {scores.baseline.macro_f1:>9.3f}")


def _print_tasks(result: TrainResult) -> None:
    sizes = f"float32 {_megabytes(result.float_bundle):.1f} MB, INT8 {_megabytes(result.bundle):.1f} MB"
    print(f"\nAccuracy (of multilabel tasks micro-F1) and macro-F1; {sizes}:")
    width = max(len(scores.task) for scores in result.tasks)
    print(f"  {'':{width}} {'split':>5} {'texts':>7} {'float32':>15} {'INT8':>15} {'SVM':>15}")
    for scores in result.tasks:
        three = (scores.float_metrics, scores.int8_metrics, scores.baseline)
        # Where exactly one label holds, micro-F1 is the accuracy.
        cells = ["" if one is None else f"{one.micro_f1:.2%} {one.macro_f1:.3f}" for one in three]
        print(
            f"  {scores.task:{width}} {scores.split:>5} {scores.float_metrics.n:>7,} "
            + " ".join(f"{cell:>15}" for cell in cells)
        )


def _megabytes(bundle: Bundle) -> float:
    return sum(file.stat().st_size for file in _path(bundle).rglob("*") if file.is_file()) / 1e6


def _take_preset(argv: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--preset NAME` or `--preset=NAME` off."""
    for i, argument in enumerate(argv):
        if argument == "--preset":
            if i + 1 == len(argv):
                raise InputError(f"--preset needs a name: {', '.join(preset_names())}.")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset="), argv[:i] + argv[i + 1 :]
    return None, argv


def _load_preset(name: str) -> Recipe:
    if name not in preset_names():
        raise InputError(f"There is no preset '{name}'; there are: {', '.join(preset_names())}.")
    return importlib.import_module(f"classer.train.presets.{name}").RECIPE


def _path(bundle: Any) -> Path:
    return bundle.path
