"""The command `classer focus-plan`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

from classer.model.precision import ComputeDtype, Precision

from .arguments import parse
from .measured import MeasureArguments, load_measured


@dataclasses.dataclass(frozen=True)
class FocusPlanArguments(MeasureArguments):
    """
    Attributes:
      split: which split of a folder.
      max_loss: points of accuracy that may be lost; the plan is the fastest within them.
      speedup: how many times as fast as the dense classifier the plan is to be, instead of `max_loss`.
      texts: at most so many texts of the split, drawn at random; 0 is all.
      compute_dtype: of activations, between the products.
    """

    split: str = dataclasses.field(default="dev", kw_only=True)
    max_loss: float | None = None
    speedup: float | None = None
    texts: int = 2000
    compute_dtype: ComputeDtype = Precision.bfloat16


def focus_plan(argv: Sequence[str]) -> None:
    """Find the share that each layer keeps, for --max-loss or --speedup."""
    a = parse(FocusPlanArguments, argv, "classer focus-plan", focus_plan.__doc__)
    bundle, task, split = load_measured(a)
    from classer.train.focus_plan import plan_focus

    with contextlib.redirect_stdout(sys.stderr):  # stdout gets the result alone
        plan = plan_focus(
            bundle,
            task,
            split.sample(a.texts) if a.texts else split,
            max_loss=a.max_loss,
            speedup=a.speedup,
            compute_dtype=a.compute_dtype,
        )
    print(f"--focus {plan.focus}")
    print(
        f"about {plan.speedup:.1f} times as fast as the dense classifier, accuracy {plan.accuracy:.2%} instead of "
        f"{plan.dense_accuracy:.2%}; `classer focus-report` measures both"
    )
