"""Scores of logits against labels: the same during training, after it, and in `classer evaluate`.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.taxonomy import Task
from ..model.decode import Calibration, choose_all, probabilities
from .metrics import Metrics, evaluate
from .report import write_report


def measure(
    task: Task,
    logits_NL: np.ndarray,
    targets_NL: np.ndarray,
    calibration: Calibration,
    *,
    title: str = "",
    results: Path | None = None,
    threshold: float | None = None,
) -> Metrics:
    """Calibrates, decides and scores; writes a report with pictures where `results` names a folder.

    Args:
      task: whose labels the columns are.
      logits_NL: the task's slice of the logits.
      targets_NL: 1 where a label holds.
      calibration: temperature and thresholds to apply.
      title: of the report.
      results: the report's folder.
      threshold: see `decode.choose`.
    """
    probs_NL = probabilities(task, logits_NL, calibration)
    chosen_NL = choose_all(task, probs_NL, calibration, threshold)
    metrics = evaluate(task, probs_NL, targets_NL, chosen_NL)
    if results is not None:
        write_report(results, task, metrics, probs_NL, targets_NL, chosen_NL, title)
    return metrics
