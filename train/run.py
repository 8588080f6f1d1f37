"""One training run from its data to its bundles: what `classer train` and `tools/launch.py` both call."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.errors import InputError
from ..data.taxonomy import Taxonomy
from ..data.tokenizer import WordPieceTokenizer
from ..model.bundle import Bundle, quantize, save_bundle
from ..model.pretrained import choose_encoder
from .baseline import BaselineScore, tfidf_svm
from .calibration import fit_calibration
from .config import TrainJob
from .datasets import Dataset, load_dataset
from .evaluation import TokenizedSplit, measure, tokenize
from .loop import Fitted, fit
from .metrics import Metrics

GOLDEN_TEXTS = 8
JOB_FILE = "job.json"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Attributes:
      bundle: the INT8 bundle, to serve.
      float_bundle: the same classifier in float32.
      split: the name of the split that the metrics are of: "test", or "dev" where no test examples were given.
      float_metrics, int8_metrics: of the two bundles on that split.
      baseline: TF-IDF + linear SVM on the same split, if the job asked for it.
    """

    bundle: Bundle
    float_bundle: Bundle
    split: str
    float_metrics: Metrics
    int8_metrics: Metrics
    baseline: BaselineScore | None


def train(job: TrainJob) -> TrainResult:
    """Runs a job: trains, calibrates on dev, quantises, measures, and writes bundles and reports under `job.out`.

    `job.out` then holds `bundle` (INT8), `bundle-float32`, `results` (INT8) and `results-float32`, `checkpoints`,
    `metrics.jsonl`, `tensorboard` and `job.json`.

    Raises:
      InputError: the data, the encoder or the folder cannot be used; nothing that stood there before is touched.
    """
    _check_out(job)
    dataset = load_dataset(job, print)
    encoder_folder, encoder, weights = choose_encoder(job.recipe.encoder)
    encoder = dataclasses.replace(encoder, gated=job.recipe.focus_epochs > 0)
    if job.recipe.max_length > encoder.max_positions:
        raise InputError(
            f"max_length is {job.recipe.max_length}, but the encoder has only {encoder.max_positions} positions."
        )
    if not weights:
        print(
            f"{job.recipe.encoder} begins with random weights; a pretrained or upcycled encoder learns from far fewer."
        )
    tokenizer = WordPieceTokenizer.from_folder(encoder_folder)
    if tokenizer.vocab_size > encoder.vocab_size:
        raise InputError(
            f"{encoder_folder}: vocab.txt has {tokenizer.vocab_size:,} tokens, but the encoder only "
            f"{encoder.vocab_size:,}; they do not belong together."
        )
    splits = {
        name: tokenize(dataset.task, examples, tokenizer, job.recipe.max_length)
        for name, examples in (("train", dataset.train), ("dev", dataset.dev), ("test", dataset.test))
    }
    if cut := splits["train"].truncated:
        share = cut / len(dataset.train)
        print(f"{cut:,} training texts ({share:.0%}) are longer than {job.recipe.max_length} tokens and are cut there.")
    _write_job(job)
    fitted = fit(
        job.recipe,
        dataset.task,
        encoder,
        weights,
        splits["train"],
        splits["dev"],
        pad_id=tokenizer.pad_id,
        out=job.out,
    )

    trained = Bundle(
        encoder=encoder,
        taxonomy=Taxonomy((dataset.task,)),
        tokenizer=tokenizer,
        weights=fitted.weights,
        precision="float32",
        calibration={},
        max_length=job.recipe.max_length,
        golden_texts=(*(example.text for example in dataset.dev[:GOLDEN_TEXTS]), ""),
        card="",
        licences=tuple(file for file in (encoder_folder / "LICENSE", encoder_folder / "NOTICE") if file.is_file()),
    )
    if job.resume:  # a run that was stopped between its two bundles
        shutil.rmtree(job.out / "bundle-float32", ignore_errors=True)
    float_bundle, float_metrics = _finish(job, dataset, splits, fitted, trained, "-float32")
    int8_bundle, int8_metrics = _finish(job, dataset, splits, fitted, quantize(trained), "")
    baseline = tfidf_svm(dataset.train, dataset.test or dataset.dev, dataset.task) if job.baseline else None
    return TrainResult(int8_bundle, float_bundle, dataset.measured, float_metrics, int8_metrics, baseline)


def _finish(
    job: TrainJob, dataset: Dataset, splits: dict[str, TokenizedSplit], fitted: Fitted, bundle: Bundle, suffix: str
) -> tuple[Bundle, Metrics]:
    """Calibrates, measures and writes one precision of the trained classifier."""
    task, dev = dataset.task, splits["dev"]
    predictor = bundle.predictor()
    dev_logits_NL = predictor.logits(dev.ids)
    calibration = fit_calibration(task, dev_logits_NL, dev.targets_NL)
    logits_NL = predictor.logits(splits["test"].ids) if dataset.test else dev_logits_NL
    targets_NL = splits[dataset.measured].targets_NL
    title = f"{task.name}, {dataset.measured}, {bundle.precision}"
    results = job.out / f"results{suffix}"
    metrics = measure(task, logits_NL, targets_NL, calibration, title=title, results=results)
    finished = dataclasses.replace(bundle, calibration={task.name: calibration})
    finished = dataclasses.replace(finished, card=_model_card(job, dataset, fitted, finished, metrics))
    return save_bundle(finished, job.out / f"bundle{suffix}"), metrics


def _check_out(job: TrainJob) -> None:
    if job.resume:
        if not (job.out / JOB_FILE).is_file():
            raise InputError(f"There is no run to resume in {job.out}: it holds no {JOB_FILE}.")
        _check_same_job(job)
        if (job.out / "bundle").exists():
            raise InputError(f"The run in {job.out} is finished; its bundle is {job.out / 'bundle'}.")
    elif job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise InputError(
            f"{job.out} exists and is not empty; nothing in it was touched. Name a new folder with --out, "
            f"or go on with the run in it with --resume."
        )


def _check_same_job(job: TrainJob) -> None:
    try:
        before = json.loads((job.out / JOB_FILE).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{job.out / JOB_FILE} is damaged ({e}); begin a new run.") from None
    now = _job_json(job)
    for section, values in (("recipe", now["recipe"]), ("job", now["job"])):
        for name, value in values.items():
            was = before.get(section, {}).get(name)
            if was != value:
                raise InputError(
                    f"The run in {job.out} began with {name} = {was!r}, not {value!r}; resume it with that."
                )


def _job_json(job: TrainJob) -> dict[str, Any]:
    fields = ("data", "dev", "test", "text_column", "label_column", "texts")
    values = {name: getattr(job, name) for name in fields}
    return {
        "classer_version": __version__,
        "recipe": dataclasses.asdict(job.recipe),
        "job": {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in values.items()},
    }


def _write_job(job: TrainJob) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    whole = job.out / f"{JOB_FILE}.part"
    whole.write_text(json.dumps(_job_json(job), indent=1) + "\n", encoding="utf-8")
    whole.rename(job.out / JOB_FILE)


def _model_card(job: TrainJob, dataset: Dataset, fitted: Fitted, bundle: Bundle, metrics: Metrics) -> str:
    task = dataset.task
    calibration = bundle.calibration[task.name]
    licence = " (its licence stands beside this file)" if bundle.licences else ""
    return "\n".join(
        [
            f"# {task.name}",
            "",
            f"A {task.kind} classifier over {len(task.labels)} labels, {bundle.precision}, by Classer {__version__}.",
            "",
            f"- Trained from {job.recipe.encoder}{licence} on {len(dataset.train):,} "
            f"examples: {fitted.best_epoch} of {fitted.epochs} epochs, seed {job.recipe.seed}.",
            f"- On {metrics.n:,} {dataset.measured} examples: accuracy {metrics.accuracy:.2%}, "
            f"macro-F1 {metrics.macro_f1:.3f}, expected calibration error {metrics.ece:.3f}.",
            f"- Texts are read up to {bundle.max_length} tokens. Temperature {calibration.temperature:.3f}.",
            f"- Labels: {', '.join(task.label_names)}.",
            "",
        ]
    )
