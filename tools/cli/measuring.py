"""`classer evaluate`, `focus-report` and `focus-plan`. Heavy modules are imported where they are needed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from classer.data.errors import InputError
from classer.model.config import ComputeDtype

from .arguments import BundleArgument, check_can_make, parse

if TYPE_CHECKING:
    from classer.data.taxonomy import Task
    from classer.model.bundle import Bundle
    from classer.train.evaluation import TokenizedSplit
    from classer.train.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class MeasureArguments:
    """
    Attributes:
      bundle: the bundle to measure.
      data: a file of labelled texts, or a folder with task.json.
      split: which split of the folder.
      task: name of the bundle's task; needed only if it has several.
      out: a new folder for the report and its pictures.
      text_column: the column of the texts.
      label_column: the column of the labels; by default `label` or `labels`.
      max_length: tokens that a text is cut to; by default what the bundle was trained with.
    """

    bundle: BundleArgument
    data: Path
    split: str = "test"
    task: str | None = None
    out: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    max_length: int | None = None


@dataclasses.dataclass(frozen=True)
class EvaluateArguments(MeasureArguments):
    __doc__ = f"""{MeasureArguments.__doc__}
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all. The bundle must have been trained with --focus-epochs.
      threshold: hierarchical tasks: an answer that is less probable than this stops at a label above; 0 never does.
    """

    focus: str = "1"
    threshold: float = 0.0


def evaluate(argv: Sequence[str]) -> None:
    """Measure a bundle on labelled texts."""
    a = parse(EvaluateArguments, argv, "classer evaluate", evaluate.__doc__)
    bundle, task, split = _load_measured(a)
    from classer.model.focus import Focus
    from classer.train.evaluation import measure

    predictor = bundle.predictor(focus=Focus.parse(a.focus, bundle.encoder.num_layers))
    logits_NL = predictor.logits(split.ids, columns=bundle.taxonomy.slice_of(task.name))
    title = f"{task.name}, {a.data.name}, {bundle.precision}"
    calibration = bundle.calibration[task.name]
    metrics = measure(task, logits_NL, split.targets_NL, calibration, title=title, results=a.out, threshold=a.threshold)
    _print_metrics(metrics, split.truncated)
    if a.out is not None:
        print(f"Report and pictures: {a.out}")


@dataclasses.dataclass(frozen=True)
class FocusReportArguments(MeasureArguments):
    __doc__ = f"""{MeasureArguments.__doc__}
      focuses: the budgets to measure beside the dense classifier, each as `classer evaluate --focus` takes it.
      texts: at most so many texts of the split, drawn at random, are measured; 0 is all.
      timed_texts: how many of them the time is measured on.
      rounds: how often.
      compute_dtype: of activations, between the products.
    """

    focuses: tuple[str, ...] = ("0.75", "0.6", "0.5", "0.4", "0.33", "0.27", "0.22", "0.18")
    texts: int = 0
    timed_texts: int = 512
    rounds: int = 5
    compute_dtype: ComputeDtype = "bfloat16"

    def __post_init__(self) -> None:
        for name, low in (("texts", 0), ("timed_texts", 1), ("rounds", 1)):
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")


def focus_report(argv: Sequence[str]) -> None:
    """Measure a bundle at several budgets: accuracy, speed and latency, as a table and a picture."""
    a = parse(FocusReportArguments, argv, "classer focus-report", focus_report.__doc__)
    bundle, task, split = _load_measured(a)
    from classer.model.focus import Focus
    from classer.train.focus_report import focus_report as measure_focuses
    from classer.train.focus_report import focus_table, write_focus_report

    split = split.sample(a.texts) if a.texts else split
    rows = measure_focuses(
        bundle,
        task,
        split,
        [Focus.parse(focus, bundle.encoder.num_layers) for focus in a.focuses],
        compute_dtype=a.compute_dtype,
        timed_texts=a.timed_texts,
        rounds=a.rounds,
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    title = f"{task.name}, {len(split.ids):,} texts, {bundle.precision} weights, {a.compute_dtype}"
    print(f"\n{title}\n\n{focus_table(rows)}")
    if a.out is not None:
        write_focus_report(a.out, title, rows)
        print(f"\nTable and picture: {a.out}")


@dataclasses.dataclass(frozen=True)
class FocusPlanArguments(MeasureArguments):
    __doc__ = f"""{MeasureArguments.__doc__}
      max_loss: points of accuracy that may be lost; the plan is the fastest within them.
      speedup: how many times as fast as the dense classifier the plan is to be, instead of `max_loss`.
      texts: at most so many texts of the split, drawn at random; 0 is all.
      compute_dtype: of activations, between the products.
    """

    split: str = "dev"
    max_loss: float | None = None
    speedup: float | None = None
    texts: int = 2000
    compute_dtype: ComputeDtype = "bfloat16"


def focus_plan(argv: Sequence[str]) -> None:
    """Find what each layer should keep, for a loss of accuracy or a speed; prints it as --focus takes it."""
    a = parse(FocusPlanArguments, argv, "classer focus-plan", focus_plan.__doc__)
    bundle, task, split = _load_measured(a)
    from classer.train.focus_plan import plan_focus

    plan = plan_focus(
        bundle,
        task,
        split.sample(a.texts) if a.texts else split,
        max_loss=a.max_loss,
        speedup=a.speedup,
        compute_dtype=a.compute_dtype,
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    print(f"--focus {plan.focus}")
    print(
        f"about {plan.speedup:.1f} times as fast as the dense classifier, accuracy {plan.accuracy:.2%} instead of "
        f"{plan.dense_accuracy:.2%}; `classer focus-report` measures both"
    )


def _load_measured(a: MeasureArguments) -> tuple[Bundle, Task, TokenizedSplit]:
    """The bundle, its task, and the texts that are to be measured."""
    from classer.data.readers import check_labels, read_examples, read_task_folder
    from classer.model.bundle import load_bundle
    from classer.train.evaluation import tokenize

    if a.out is not None:
        check_can_make(a.out, new=True)
    bundle = load_bundle(a.bundle)
    names = [task.name for task in bundle.taxonomy.tasks]
    if a.task is None and len(names) > 1:
        raise InputError(f"The bundle has several tasks; name one with --task: {', '.join(names)}.")
    task = bundle.taxonomy.task(names[0] if a.task is None else a.task)
    max_length = bundle.max_length if a.max_length is None else a.max_length
    if not 2 <= max_length <= bundle.max_length:
        raise InputError(f"--max-length is {max_length}; this bundle reads 2 to {bundle.max_length} tokens.")
    if a.data.is_dir():
        folder = read_task_folder(a.data, (a.split,))
        if a.split not in folder.splits:
            raise InputError(f"{a.data} has no split '{a.split}'; it has {', '.join(sorted(folder.there))}.")
        examples = folder.splits[a.split]
    else:
        examples = read_examples(a.data, text_column=a.text_column, label_column=a.label_column, task=task.name)
    check_labels(task, examples)
    return bundle, task, tokenize(task, examples, bundle.tokenizer, max_length)


def _print_metrics(metrics: Metrics, truncated: int) -> None:
    print(f"{metrics.n:,} examples, {truncated:,} of them cut to the maximum length")
    print(
        f"accuracy {metrics.accuracy:.2%} · macro-F1 {metrics.macro_f1:.3f} · micro-F1 {metrics.micro_f1:.3f}", end=" "
    )
    print(f"· expected calibration error {metrics.ece:.3f}")
    worst = sorted((label for label in metrics.labels if label.support), key=lambda label: label.f1)[:5]
    for label in worst:
        print(f"  F1 {label.f1:.3f} (precision {label.precision:.3f}, recall {label.recall:.3f})  {label.name}")
