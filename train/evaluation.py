"""Measuring a classifier on labelled examples: the same in training, after it, and for `classer evaluate`.

Axes: N texts, L labels of one task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.examples import Example
from ..data.taxonomy import Task
from ..data.tokenizer import WordPieceTokenizer
from ..model.decode import Calibration, choose_all, probabilities
from .metrics import Metrics, evaluate
from .report import write_report


@dataclasses.dataclass(frozen=True)
class TokenizedSplit:
    """Examples as the network takes them.

    Attributes:
      ids: N arrays of token ids.
      targets_NL: float32, one-hot or multi-hot.
      truncated: how many texts were longer than the model reads.
    """

    ids: list[np.ndarray]
    targets_NL: np.ndarray
    truncated: int

    def sample(self, count: int, seed: int = 0) -> TokenizedSplit:
        """At most `count` of the examples, drawn at random; `truncated` stays that of all."""
        rows = np.random.default_rng(seed).permutation(len(self.ids))[:count]
        return TokenizedSplit([self.ids[row] for row in rows], self.targets_NL[rows], self.truncated)


def tokenize(task: Task, examples: Sequence[Example], tokenizer: WordPieceTokenizer, max_length: int) -> TokenizedSplit:
    """Token ids and targets, in the order of the examples."""
    tokenized = tokenizer.encode([example.text for example in examples], max_length)
    targets_NL = np.zeros((len(examples), len(task.labels)), np.float32)
    for row, example in enumerate(examples):
        targets_NL[row, [task.index[label] for label in example.labels]] = 1.0
    return TokenizedSplit(tokenized.ids, targets_NL, int(tokenized.truncated.sum()))


def measure(
    task: Task,
    logits_NL: np.ndarray,
    targets_NL: np.ndarray,
    calibration: Calibration,
    *,
    title: str = "",
    results: Path | None = None,
) -> Metrics:
    """Calibrates, decides and scores; writes a report with pictures where `results` names a folder.

    Args:
      task: whose labels the columns are.
      logits_NL: the task's slice of the logits.
      targets_NL: 1 where a label holds.
      calibration: temperature and thresholds to apply.
      title: of the report.
      results: the report's folder.
    """
    probs_NL = probabilities(task, logits_NL, calibration)
    chosen_NL = choose_all(task, probs_NL, calibration)
    metrics = evaluate(task, probs_NL, targets_NL, chosen_NL)
    if results is not None:
        write_report(results, task, metrics, probs_NL, targets_NL, chosen_NL, title)
    return metrics
