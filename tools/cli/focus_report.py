"""The command `classer focus-report`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

from classer.data.errors import InputError
from classer.model.precision import ComputeDtype, Precision

from .arguments import parse
from .measured import MeasureArguments, load_measured


@dataclasses.dataclass(frozen=True)
class FocusReportArguments(MeasureArguments):
    """
    Attributes:
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
    compute_dtype: ComputeDtype = Precision.bfloat16

    def __post_init__(self) -> None:
        for name, low in (("texts", 0), ("timed_texts", 1), ("rounds", 1)):
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")


def focus_report(argv: Sequence[str]) -> None:
    """Measure a bundle at several focus budgets: accuracy, speed, latency."""
    a = parse(FocusReportArguments, argv, "classer focus-report", focus_report.__doc__)
    bundle, task, split = load_measured(a)
    from classer.model.focus import Focus
    from classer.train.focus_report import focus_report as measure_focuses
    from classer.train.focus_report import focus_table, write_focus_report

    split = split.sample(a.texts) if a.texts else split
    with contextlib.redirect_stdout(sys.stderr):  # stdout gets the result alone
        rows = measure_focuses(
            bundle,
            task,
            split,
            [Focus.parse(focus, bundle.encoder.num_layers) for focus in a.focuses],
            compute_dtype=a.compute_dtype,
            timed_texts=a.timed_texts,
            rounds=a.rounds,
        )
    title = f"{task.name}, {len(split.ids):,} texts, {bundle.precision} weights, {a.compute_dtype}"
    print(f"\n{title}\n\n{focus_table(rows)}")
    if a.out is not None:
        write_focus_report(a.out, title, rows)
        print(f"\nTable and picture: {a.out}")
