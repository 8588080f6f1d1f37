"""The command `classer evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arguments import parse
from .measured import MeasureArguments, load_measured

if TYPE_CHECKING:
    from classer.train.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class EvaluateArguments(MeasureArguments):
    """
    Attributes:
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all. The bundle must have been trained with --focus-epochs.
      threshold: hierarchical tasks: an answer that is less probable than this stops at a label above; 0 never does.
    """

    focus: str = "1"
    threshold: float = 0.0


def evaluate(argv: Sequence[str]) -> None:
    """Measure a bundle on labelled texts."""
    a = parse(EvaluateArguments, argv, "classer evaluate", evaluate.__doc__)
    bundle, task, split = load_measured(a)
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


def _print_metrics(metrics: Metrics, truncated: int) -> None:
    print(f"{metrics.n:,} examples, {truncated:,} of them cut to the maximum length")
    print(
        f"accuracy {metrics.accuracy:.2%} · macro-F1 {metrics.macro_f1:.3f} · micro-F1 {metrics.micro_f1:.3f}", end=" "
    )
    print(f"· expected calibration error {metrics.ece:.3f}")
    worst = sorted((label for label in metrics.labels if label.support), key=lambda label: label.f1)[:5]
    for label in worst:
        print(f"  F1 {label.f1:.3f} (precision {label.precision:.3f}, recall {label.recall:.3f})  {label.name}")
