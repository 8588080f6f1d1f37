"""One training run from its data to its bundles: what `classer train` and `tools/launch.py` both call."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.errors import InputError
from ..data.examples import Example
from ..data.files import atomic_write
from ..data.soft_labels import read_teachers
from ..data.taxonomy import Task
from ..model.bundle import Bundle, quantize_bundle, save_bundle
from ..model.focus import is_gate
from ..model.precision import Precision
from ..model.quantize import Weights
from ..model.sharding import make_layout
from .baseline import BaselineScore, tfidf_svm
from .calibration import fit_calibration, without_thresholds
from .config import TrainJob, read_curriculum
from .curriculum import stages_for
from .distributed import is_primary, leave, on_primary, primary_first, say
from .evaluation import measure
from .fit import fit
from .inputs import Inputs, load_inputs, open_data
from .metrics import Metrics
from .phases import ExecutionConfig, FitResult, TrainContext
from .process_info import LOGS
from .start import Start, choose_start

CARD_LABELS = 200  # labels that the model card lists of a task
JOB_FILE = "job.json"
UNFINISHED = f"{JOB_FILE}.part"


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """The finished model's scores at one task.

    Attributes:
      task: its name.
      split: the split that was measured: "test", or "dev" where no test examples were given.
      float_metrics, int8_metrics: of the two bundles on that split.
      baseline: TF-IDF + linear SVM on the same split, if the job asked for it.
    """

    task: str
    split: str
    float_metrics: Metrics
    int8_metrics: Metrics
    baseline: BaselineScore | None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
      bundle: the INT8 bundle, to serve.
      float_bundle: the same classifier in float32.
      tasks: the scores, in the order of the taxonomy.
    """

    bundle: Bundle
    float_bundle: Bundle
    tasks: tuple[TaskScores, ...]


def train(job: TrainJob) -> TrainResult:
    """Runs a job in one process; see `run_job`."""
    result = run_job(job)
    assert result is not None
    return result


def run_job(
    job: TrainJob, examples: Mapping[str, Sequence[Example]] | None = None, task: Task | None = None
) -> TrainResult | None:
    """Runs a job: trains, calibrates on dev, quantises, measures, and writes bundles and reports under `job.out`.

    `job.out` then holds `bundle` (INT8), `bundle-float32`, `results` (INT8) and `results-float32` (of several tasks one
    folder each in them), `checkpoints`, `metrics.jsonl`, `tensorboard` (of a curriculum in `stages`) and `job.json`.

    In a job of several processes (see `distributed`) all call it; only the primary writes, and returns a result.

    Args:
      job: what to train on, how, and where to write.
      examples: those of the splits "train" and, optional, "dev" and "test", in place of files; `job.data` is then only
        a name for messages, and the task's.
      task: the task of those examples, with the name of `job.data`; None infers it from their labels.

    Returns:
      The result; None in the other processes, and where the run had been finished before.

    Raises:
      InputError: the data, the encoder or the folder cannot be used; nothing that stood there before is touched.
      Stopped: SIGTERM came, and the progress is saved; after `preemption.listen`.
    """
    if job.curriculum is not None:
        stages = read_curriculum(job.curriculum)
        job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, curriculum=stages))
    if job.restartable and on_primary((job.out / "bundle").exists):
        return None
    job = dataclasses.replace(job, resume=on_primary(lambda: _check_out(job)))
    layout = make_layout(fsdp=job.fsdp, tensor=job.tensor)
    if layout.mesh.size > 1:
        say(f"{layout.mesh.size} devices: " + ", ".join(f"{axis} {n}" for axis, n in layout.mesh.shape.items()) + ".")
    data = open_data(job, examples, task)
    start = primary_first(lambda: choose_start(job.recipe.encoder))
    encoder = dataclasses.replace(start.encoder, gated=job.recipe.focus_epochs > 0)
    if job.recipe.max_length > encoder.max_positions:
        raise InputError(
            f"max_length is {job.recipe.max_length}, but the encoder has only {encoder.max_positions} positions."
        )
    if not start.weights:
        say(f"{job.recipe.encoder} begins with random weights; a pretrained or converted one learns from far fewer.")
    inputs = load_inputs(job, data, start.tokenizer)
    for task in inputs.taxonomy.tasks:
        if sentence := without_thresholds(task, inputs.splits["dev"][task.name].targets):
            say(sentence)
    weights = _begin_with(job, start, inputs)
    on_primary(lambda: _write_job(job))
    execution = ExecutionConfig(layout, job.save_steps, job.save_minutes, _job_json(job))
    recipe = job.recipe
    if job.curriculum is None:
        recipe = dataclasses.replace(recipe, curriculum=stages_for(recipe.curriculum, inputs.taxonomy))
    context = TrainContext(
        recipe,
        inputs.taxonomy,
        encoder,
        inputs.splits["train"],
        inputs.splits["dev"],
        start.tokenizer.pad_id,
        job.out,
        execution,
        inputs.shards,
    )
    fitted = fit(context, weights)
    first = is_primary()
    leave()
    if not first:
        return None

    trained = Bundle(
        encoder=encoder,
        taxonomy=inputs.taxonomy,
        tokenizer=start.tokenizer,
        weights=fitted.weights,
        precision=Precision.float32,
        calibration={},
        max_length=job.recipe.max_length,
        golden_texts=(*inputs.golden_texts, ""),
        card="",
        licences=start.licences,
    )
    if job.resume:  # a run that was stopped between its two bundles
        shutil.rmtree(job.out / "bundle-float32", ignore_errors=True)
    float_bundle, float_metrics = _finish(job, inputs, fitted, trained, "-float32")
    int8_bundle, int8_metrics = _finish(job, inputs, fitted, quantize_bundle(trained), "")
    scores = []
    for task in inputs.taxonomy.tasks:
        name, dataset = task.name, inputs.dataset
        baseline = None
        if job.baseline and dataset is not None:
            baseline = tfidf_svm(dataset.train[name], dataset.test.get(name) or dataset.dev[name], task)
        scores.append(TaskScores(name, inputs.measured(name), float_metrics[name], int8_metrics[name], baseline))
    return TrainResult(int8_bundle, float_bundle, tuple(scores))


def _begin_with(job: TrainJob, start: Start, inputs: Inputs) -> Weights:
    """The initial weights: without the head of other labels, and without gates where the recipe has no focus."""
    weights = dict(start.weights)
    if not job.recipe.focus_epochs:
        weights = {name: value for name, value in weights.items() if not is_gate(name)}
    same = start.taxonomy is not None and start.taxonomy.to_json() == inputs.taxonomy.to_json()
    if start.taxonomy is not None and not same:
        say(f"{job.recipe.encoder} has other tasks or labels; training begins with its encoder alone.")
        weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    if not job.recipe.epochs and not job.recipe.curriculum and not same:
        raise InputError(
            f"epochs is 0, which only a trained classifier can begin with, and {job.recipe.encoder} is none of these "
            "tasks and labels; give at least 1."
        )
    return weights


def _finish(
    job: TrainJob,
    inputs: Inputs,
    fitted: FitResult,
    bundle: Bundle,
    suffix: str,
) -> tuple[Bundle, dict[str, Metrics]]:
    """Calibrates, measures and writes one precision of the trained classifier; also its metrics by task."""
    predictor = bundle.predictor()
    tasks = inputs.taxonomy.tasks
    calibration, metrics = {}, {}
    for task in tasks:
        columns = inputs.taxonomy.slice_of(task.name)
        dev = inputs.splits["dev"][task.name]
        dev_logits_NL = predictor.logits(dev.ids, columns=columns)
        calibration[task.name] = fit_calibration(task, dev_logits_NL, dev.targets_NL)
        measured = inputs.splits[inputs.measured(task.name)][task.name]
        logits_NL = dev_logits_NL if measured is dev else predictor.logits(measured.ids, columns=columns)
        title = f"{task.name}, {inputs.measured(task.name)}, {bundle.precision}"
        results = job.out / f"results{suffix}"
        metrics[task.name] = measure(
            task,
            logits_NL,
            measured.targets_NL,
            calibration[task.name],
            title=title,
            results=results / task.name if len(tasks) > 1 else results,
        )
    finished = dataclasses.replace(bundle, calibration=calibration)
    finished = dataclasses.replace(finished, card=_model_card(job, inputs, fitted, finished, metrics))
    return save_bundle(finished, job.out / f"bundle{suffix}"), metrics


def _check_out(job: TrainJob) -> bool:
    """Whether the folder holds a run to resume; raises InputError where it holds anything else."""
    if job.resume or (job.restartable and (job.out / JOB_FILE).is_file()):
        if not (job.out / JOB_FILE).is_file():
            raise InputError(f"There is no run to resume in {job.out}: it holds no {JOB_FILE}.")
        _check_same_job(job)
        if (job.out / "bundle").exists():
            raise InputError(f"The run in {job.out} is finished; its bundle is {job.out / 'bundle'}.")
        return True
    ours = {UNFINISHED, LOGS} if job.restartable else {UNFINISHED}
    if job.out.exists() and (not job.out.is_dir() or any(file.name not in ours for file in job.out.iterdir())):
        raise InputError(
            f"{job.out} exists and is not empty; nothing in it was touched. Name a new folder with --out, "
            f"or go on with the run in it with --resume."
        )
    return False


def _check_same_job(job: TrainJob) -> None:
    try:
        before = json.loads((job.out / JOB_FILE).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{job.out / JOB_FILE} is damaged ({e}); begin a new run.") from None
    # As they read once written, lists for tuples; the usual is what a version without an option did.
    now, usual = (json.loads(json.dumps(_job_json(told))) for told in (job, TrainJob(job.data, job.out)))
    changed = [
        (name, was, value)
        for section in ("recipe", "job")
        for name, value in now[section].items()
        if (was := before.get(section, {}).get(name, usual[section][name])) != value
    ]
    if changed:
        raise InputError(
            f"The run in {job.out} began with "
            + ", ".join(f"{name} = {was!r}, not {value!r}" for name, was, value in changed)
            + f"; resume it with {'that' if len(changed) == 1 else 'those'}."
        )


def _job_json(job: TrainJob) -> dict[str, Any]:
    fields = ("data", "dev", "test", "text_column", "label_column", "soft_labels", "texts", "held_out_texts")
    values = {name: getattr(job, name) for name in fields}
    return {
        "classer_version": __version__,
        "recipe": dataclasses.asdict(job.recipe),
        "job": {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in values.items()},
    }


def _write_job(job: TrainJob) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    told = _job_json(job)
    if job.soft_labels is not None:
        told["teachers"] = list(map(dataclasses.asdict, read_teachers(job.soft_labels)))
    with atomic_write(job.out / JOB_FILE) as part:
        part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _model_card(job: TrainJob, inputs: Inputs, fitted: FitResult, bundle: Bundle, metrics: dict[str, Metrics]) -> str:
    tasks = inputs.taxonomy.tasks
    licence = " (its licence stands beside this file)" if bundle.licences else ""
    lines = [
        f"# {', '.join(task.name for task in tasks)}",
        "",
        f"A classifier of {len(tasks)} task{'s' * (len(tasks) > 1)}, {bundle.precision}, by Classer {__version__}.",
        "",
        f"- Trained from {job.recipe.encoder}{licence} on {inputs.num_train:,} "
        f"examples: epoch {fitted.kept_epoch} of {fitted.epochs}, seed {job.recipe.seed}."
        if fitted.epochs
        else f"- The weights are those of {job.recipe.encoder}{licence}{', their mean' * (',' in job.recipe.encoder)}; "
        "nothing was trained.",
        f"- Texts are read up to {bundle.max_length} tokens.",
        "",
    ]
    for task in tasks:
        measured = metrics[task.name]
        names = ", ".join(task.label_names[:CARD_LABELS])
        more = len(task.labels) - CARD_LABELS
        lines += [
            f"## {task.name}",
            "",
            f"- {task.kind.capitalize()}, {len(task.labels):,} labels: {names}{f' and {more:,} more' * (more > 0)}.",
            f"- On {measured.n:,} {inputs.measured(task.name)} examples: accuracy {measured.accuracy:.2%}, "
            f"macro-F1 {measured.macro_f1:.3f}, expected calibration error {measured.ece:.3f}.",
            f"- Temperature {bundle.calibration[task.name].temperature:.3f}.",
            "",
        ]
    return "\n".join(lines)
