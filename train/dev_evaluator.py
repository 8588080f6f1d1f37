"""Evaluation of the dev sets between two epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data.taxonomy import Taxonomy
from ..model.config import EncoderConfig
from ..model.decode import Calibration, probabilities
from ..model.focus import Focus
from ..model.precision import Precision
from ..model.predict import Predictor
from ..model.quantize import Weights
from .calibration import fit_thresholds
from .distributed import shard_of
from .evaluation import measure
from .metrics import Metrics
from .runlog import RunLog
from .tokenized import TokenizedSplit


class DevEvaluator:
    """Evaluates dev sets, logs the metrics, and reduces them to one score.

    Args:
      taxonomy: all tasks.
      encoder: the encoder's config.
      weights: any of the right shapes.
      compute_dtype: of activations.
      dev: the examples, by task.
      focuses: the focuses to evaluate at.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        encoder: EncoderConfig,
        weights: Weights,
        compute_dtype: Precision,
        dev: Mapping[str, TokenizedSplit],
        focuses: Sequence[float],
    ) -> None:
        self._taxonomy, self._dev = taxonomy, dev
        self._predictors = {
            focus: Predictor(
                encoder,
                taxonomy.num_labels,
                weights,
                Precision.float32,
                compute_dtype,
                Focus.pyramid(focus, encoder.num_layers),
            )
            for focus in focuses
        }
        self.sentence = ""

    def __call__(self, weights: Weights, step: int, log: RunLog) -> float:
        """The mean over tasks and focuses of accuracy (multilabel: micro-F1); `sentence` then reports the metrics."""
        said, scores = [], []
        for focus, predictor in self._predictors.items():
            suffix, where = ("", "") if focus == 1 else (f"/focus_{focus:g}", f" at focus {focus:g}")
            by_task = self._measure(predictor.with_weights(weights))
            for name, metrics in by_task.items():
                of_task = f"/{name}" if len(by_task) > 1 else ""
                log.scalars(
                    step,
                    {
                        f"dev{of_task}{suffix}/accuracy": metrics.accuracy,
                        f"dev{of_task}{suffix}/macro_f1": metrics.macro_f1,
                        f"dev{of_task}{suffix}/ece": metrics.ece,
                    },
                )
            scores += [self._score(name, metrics) for name, metrics in by_task.items()]
            if len(by_task) == 1:
                (metrics,) = by_task.values()
                said.append(f"accuracy {metrics.accuracy:.2%} · macro-F1 {metrics.macro_f1:.3f}{where}")
            else:
                each = " · ".join(f"{name} {self._score(name, metrics):.1%}" for name, metrics in by_task.items())
                said.append(f"{each}{where}")
        self.sentence = ", ".join(said)
        return sum(scores) / len(scores)

    def _measure(self, predictor: Predictor) -> dict[str, Metrics]:
        by_task = {}
        for name, split in self._dev.items():
            columns = self._taxonomy.slice_of(name)
            logits_NL = shard_of(lambda ids, columns=columns: predictor.logits(ids, columns=columns), split.ids)
            task, targets_NL = self._taxonomy.task(name), split.targets_NL
            calibration = Calibration()
            if not task.kind.exclusive:  # thresholds are fitted as after the training
                probs_NL = probabilities(task, logits_NL, calibration)
                calibration = Calibration(thresholds=fit_thresholds(probs_NL, targets_NL))
            by_task[name] = measure(task, logits_NL, targets_NL, calibration)
        return by_task

    def _score(self, name: str, metrics: Metrics) -> float:
        return metrics.accuracy if self._taxonomy.task(name).kind.exclusive else metrics.micro_f1
