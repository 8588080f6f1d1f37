"""What predicts in bulk: a bundle in this process, or a server. Axes: `N` texts, `L` labels of the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from classer.data.errors import InputError
from classer.serve.wire.errors import InternalError, InvalidRequest

from .predictions import Predictions

if TYPE_CHECKING:
    from pathlib import Path

    from classer.serve.client.client import Client
    from classer.serve.client.results import Classification

NOT_FINITE = "The model's scores for this text are not finite numbers."

PrecisionOf = Callable[[int, str | None], str | None]


@dataclasses.dataclass(frozen=True)
class BulkOptions:
    """What to ask of each text.

    Attributes:
      task: the task's name; None where the model has one only.
      threshold: the score from which a label is chosen, instead of the model's own.
      focus: the share of tokens to keep.
      all_scores: whether the scores of all labels are wanted.
    """

    task: str | None = None
    threshold: float | None = None
    focus: str | None = None
    all_scores: bool = False


class BulkModel(Protocol):
    """Predicts chunks of texts.

    Attributes:
      version: a hash of the model.
      multilabel: whether a text may have several labels or none.
      labels: those that `Predictions.probs_NL` has columns of.
    """

    version: str
    multilabel: bool
    labels: tuple[str, ...]

    def prepare(self, texts: Sequence[str]) -> Any:
        """What can be done beside the device, on another thread: tokenising."""
        ...

    def predict(self, prepared: Any) -> Predictions:
        """The predictions of what was prepared."""
        ...

    def close(self) -> None: ...


class BundleModel:
    """A bundle in this process, through Turbine's programs and choice of precision.

    Each bucket's programs are compiled when the first text of that length comes.

    Args:
      path: the bundle.
      options: what to ask.
      precision: one of `VARIANTS`, or "auto" for the bundle's own.
      precision_of: called with a bucket and the precision that was found fastest for it (None before), returns the one
        to use; it lets a run that goes on compute as before.

    Raises:
      InputError: the bundle cannot be used, or has no such task or focus.
    """

    def __init__(
        self,
        path: Path,
        options: BulkOptions,
        precision: str = "auto",
        precision_of: PrecisionOf = lambda bucket, chosen: chosen,
    ) -> None:
        from classer.model.bundle import load_bundle
        from classer.model.focus import Focus
        from classer.model.precision import Precision
        from classer.model.variants import variant_predictor

        bundle = load_bundle(path)
        names = [task.name for task in bundle.taxonomy.tasks]
        if options.task is None and len(names) > 1:
            raise InputError(f"{path} has several tasks; name one with --task: {', '.join(names)}.")
        self._task = bundle.taxonomy.task(options.task or names[0])
        focus = Focus.parse(options.focus or "1", bundle.encoder.num_layers)
        computed = bundle.precision if precision == "auto" else Precision(precision)
        self._predictor = variant_predictor(bundle, computed, None if focus.full else focus)
        self._calibration = bundle.calibration[self._task.name]
        self._columns = bundle.taxonomy.slice_of(self._task.name)
        self._options = options
        self._tokenizer, self._max_length = bundle.tokenizer, bundle.max_length
        self.version = bundle.version
        self.multilabel = not self._task.kind.exclusive
        self.labels = tuple(self._task.label_names)

    def prepare(self, texts: Sequence[str]) -> Any:
        return self._tokenizer.encode(texts, self._max_length)

    def predict(self, prepared: Any) -> Predictions:
        from classer.model.decode import choose_all, probabilities

        logits_NL = self.logits(prepared.ids)
        finite_N = np.asarray(np.isfinite(logits_NL).all(axis=1))
        probs_NL = probabilities(self._task, np.where(finite_N[:, None], logits_NL, 0.0), self._calibration)
        threshold = self._options.threshold
        chosen_NL = choose_all(self._task, probs_NL, self._calibration, threshold)
        if threshold is not None and self._task.leaves_L.all():
            reach_NL = probs_NL >= np.float32(threshold)
            chosen_NL = reach_NL if self.multilabel else chosen_NL & reach_NL
        rank_by_NL = np.where(chosen_NL, probs_NL + 2.0, np.where(self._task.leaves_L, probs_NL, -1.0))
        ranked_NL = np.argsort(-rank_by_NL, axis=1, kind="stable")
        counts_N = chosen_NL.sum(axis=1)
        chosen = [tuple(self.labels[i] for i in ranked_L[:n]) for ranked_L, n in zip(ranked_NL, counts_N, strict=True)]
        scores_N = probs_NL[np.arange(len(probs_NL)), ranked_NL[:, 0]]
        failed = dict.fromkeys(np.flatnonzero(~finite_N).tolist(), NOT_FINITE)
        all_NL = probs_NL if self._options.all_scores else None
        return Predictions(chosen, scores_N, np.asarray(prepared.truncated), all_NL, failed)

    def logits(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """Logits of the task's labels, (N, L), in batches of texts of like length."""
        return self._predictor.logits(ids, columns=self._columns)

    def close(self) -> None:
        """Has nothing to close."""


class ServerModel:
    """A running server.

    Args:
      client: the connection; closed with the model.
      options: what to ask.

    Raises:
      InputError: the server has no such task, or several and none was named.
      ClasserError: the server cannot be asked.
    """

    def __init__(self, client: Client, options: BulkOptions) -> None:
        self._client, self._options = client, options
        tasks = client.tasks()
        found = [task for task in tasks if options.task in (None, task.name)]
        if len(found) != 1:
            names = ", ".join(task.name for task in tasks)
            said = f"has no task '{options.task}'" if not found else "has several tasks"
            raise InputError(f"The server {said}; name one with --task: {names}.")
        self._task = found[0]
        self.version = self._task.model_version
        self.multilabel = self._task.kind == "multilabel"
        self.labels: tuple[str, ...] = ()
        if options.all_scores:
            (answer,) = self._ask([""])
            if not hasattr(answer, "labels"):
                raise answer  # pyright: ignore[reportGeneralTypeIssues]
            self.labels = tuple(sorted(label.label for label in answer.labels))  # pyright: ignore

    def prepare(self, texts: Sequence[str]) -> Any:
        return texts

    def predict(self, prepared: Any) -> Predictions:
        answers = self._ask(prepared)
        count = len(answers)
        chosen: list[tuple[str, ...]] = [()] * count
        scores_N, truncated_N = np.zeros(count, np.float32), np.zeros(count, bool)
        probs_NL = np.zeros((count, len(self.labels)), np.float32) if self._options.all_scores else None
        failed: dict[int, str] = {}
        for i, answer in enumerate(answers):
            if isinstance(answer, InvalidRequest | InternalError):
                failed[i] = str(answer)
            elif isinstance(answer, Exception):
                raise answer
            else:
                chosen[i], scores_N[i], truncated_N[i] = answer.chosen, self._score(answer), answer.truncated
                if probs_NL is not None:
                    scores = {label.label: label.score for label in answer.labels}
                    probs_NL[i] = [scores.get(label, 0.0) for label in self.labels]
        return Predictions(chosen, scores_N, truncated_N, probs_NL, failed)

    def close(self) -> None:
        self._client.close()

    def _score(self, answer: Classification) -> float:
        return next((label.score for label in answer.labels if label.chosen), answer.best.score)

    def _ask(self, texts: Sequence[str]) -> list[Any]:
        options: dict[str, Any] = {"top_k": self._task.num_labels if self._options.all_scores else 1}
        for name in ("threshold", "focus"):
            if (value := getattr(self._options, name)) is not None:
                options[name] = value
        return list(self._client.classify_stream(texts, self._task.name, **options))
