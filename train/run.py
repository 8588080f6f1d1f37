"""One training run from its data to its bundles: what `classer train` and `tools/launch.py` both call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..data.errors import InputError
from ..data.examples import Example
from ..data.taxonomy import Taxonomy
from ..data.tokenizer import WordPieceTokenizer
from ..model.bundle import Bundle, save_bundle
from ..model.classifier import TextClassifier
from ..model.pretrained import fetch_encoder, load_encoder
from ..model.quantize import Quantization, convert
from .baseline import BaselineScore, tfidf_svm
from .calibration import fit_calibration
from .config import TrainJob
from .datasets import Dataset, load_dataset, tokenize
from .loop import Fitted, TokenizedSplit, fit, predict_task
from .metrics import Metrics, evaluate
from .report import write_report

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
    encoder_folder = fetch_encoder(job.recipe.encoder)
    encoder, weights = load_encoder(encoder_folder)
    if job.recipe.max_length > encoder.max_positions:
        raise InputError(
            f"max_length is {job.recipe.max_length}, but the encoder has only {encoder.max_positions} positions."
        )
    tokenizer = WordPieceTokenizer.from_folder(encoder_folder)
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

    unsaved = Bundle(
        encoder=encoder,
        taxonomy=Taxonomy((dataset.task,)),
        tokenizer=tokenizer,
        weights=fitted.weights,
        precision="float32",
        calibration={},
        max_length=job.recipe.max_length,
    )
    licences = [file for file in (encoder_folder / "LICENSE", encoder_folder / "NOTICE") if file.is_file()]
    finish = _Finish(job, dataset, splits, fitted, licences)
    float_bundle, float_metrics = finish(unsaved, "bundle-float32", "results-float32")
    int8_bundle, int8_metrics = finish(quantize(unsaved), "bundle", "results")
    baseline = tfidf_svm(dataset.train, dataset.test or dataset.dev, dataset.task) if job.baseline else None
    return TrainResult(int8_bundle, float_bundle, finish.split, float_metrics, int8_metrics, baseline)


def quantize(bundle: Bundle) -> Bundle:
    """The INT8 version of a float32 bundle, not yet saved.

    Raises:
      InputError: it is INT8 already.
    """
    if bundle.precision == "int8":
        raise InputError(f"{bundle.path} is INT8 already; quantise a float32 bundle.")
    model = TextClassifier(bundle.encoder, bundle.taxonomy.num_labels, quantization=Quantization.CONVERT)
    return dataclasses.replace(
        bundle, weights=convert(model, bundle.weights), precision="int8", version="", path=None
    )


@dataclasses.dataclass
class _Finish:
    """Calibrates, measures and writes one precision of the trained classifier."""

    job: TrainJob
    dataset: Dataset
    splits: dict[str, TokenizedSplit]
    fitted: Fitted
    licences: Sequence[Path]

    @property
    def split(self) -> str:
        return "test" if self.dataset.test else "dev"

    def __call__(self, bundle: Bundle, name: str, results: str) -> tuple[Bundle, Metrics]:
        task = self.dataset.task
        predictor = bundle.predictor()
        dev = self.splits["dev"]
        dev_logits_NL = predictor.logits(dev.ids)
        calibration = fit_calibration(task, dev_logits_NL, dev.targets_NL)
        bundle = dataclasses.replace(bundle, calibration={task.name: calibration})

        measured = self.splits[self.split]
        logits_NL = dev_logits_NL if self.split == "dev" else predictor.logits(measured.ids)
        probs_NL, chosen_NL = predict_task(task, logits_NL, calibration)
        metrics = evaluate(task, probs_NL, measured.targets_NL, chosen_NL)
        title = f"{task.name}, {self.split}, {bundle.precision}"
        write_report(self.job.out / results, task, metrics, probs_NL, measured.targets_NL, chosen_NL, title)

        card = _model_card(self.job, self.dataset, self.fitted, bundle, self.split, metrics)
        golden = [example.text for example in self.dataset.dev[:GOLDEN_TEXTS]]
        saved = save_bundle(bundle, self.job.out / name, golden_texts=[*golden, ""], card=card, licences=self.licences)
        return saved, metrics


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
    before = json.loads((job.out / JOB_FILE).read_text(encoding="utf-8"))
    now = _job_json(job)
    for section, values in (("recipe", now["recipe"]), ("job", now["job"])):
        for name, value in values.items():
            was = before.get(section, {}).get(name)
            if was != value:
                raise InputError(f"The run in {job.out} began with {name} = {was!r}, not {value!r}; resume it with that.")


def _job_json(job: TrainJob) -> dict[str, Any]:
    fields = ("data", "dev", "test", "text_column", "label_column")
    values = {name: getattr(job, name) for name in fields}
    return {
        "classer_version": __version__,
        "recipe": dataclasses.asdict(job.recipe),
        "job": {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in values.items()},
    }


def _write_job(job: TrainJob) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / JOB_FILE).write_text(json.dumps(_job_json(job), indent=1) + "\n", encoding="utf-8")


def _model_card(
    job: TrainJob, dataset: Dataset, fitted: Fitted, bundle: Bundle, split: str, metrics: Metrics
) -> str:
    task = dataset.task
    calibration = bundle.calibration[task.name]
    return "\n".join(
        [
            f"# {task.name}",
            "",
            f"A {task.kind} classifier over {len(task.labels)} labels, {bundle.precision}, by Classer {__version__}.",
            "",
            f"- Fine-tuned from {job.recipe.encoder} (its licence stands beside this file) on {len(dataset.train):,} "
            f"examples: {fitted.best_epoch} of {fitted.epochs} epochs, seed {job.recipe.seed}.",
            f"- On {metrics.n:,} {split} examples: accuracy {metrics.accuracy:.2%}, macro-F1 {metrics.macro_f1:.3f}, "
            f"expected calibration error {metrics.ece:.3f}.",
            f"- Texts are read up to {bundle.max_length} tokens. Temperature {calibration.temperature:.3f}.",
            f"- Labels: {', '.join(task.label_names)}.",
            "",
        ]
    )
