"""Models of bulk prediction: a bundle in this process, or a server. Axes: `N` texts, `L` labels of the task."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
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
    from classer.serve.core.work import Output

# Batches that are started before the first of them is waited for.
IN_FLIGHT = 2

PrecisionOf = Callable[[int, str | None], str | None]


@dataclasses.dataclass(frozen=True)
class BulkOptions:
    """Options of a prediction.

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
      labels: the names of the columns of `Predictions.probs_NL`.
    """

    version: str
    multilabel: bool
    labels: tuple[str, ...]

    def prepare(self, texts: Sequence[str]) -> Any:
        """Work that does not need the device, on another thread: tokenising."""
        ...

    def predict(self, prepared: Any) -> Predictions:
        """The predictions of texts that `prepare` tokenised."""
        ...

    def close(self) -> None: ...


class BundleModel:
    """A bundle in this process, computed by Turbine's programs.

    A program is compiled when a text of its length first needs it: the largest batch of each bucket, in the precision
    that is fastest on this machine.

    Args:
      path: the bundle.
      options: what to ask.
      precision: one of `VARIANTS`; "auto" measures which is fastest for each bucket.
      precision_of: called with a bucket and the precision that was found fastest for it (None before that), returns the
        one to use or None; it makes a run that continues compute as before.

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
        from classer.serve.core.answers import AnswerDecoder
        from classer.serve.core.engine import PROGRAM_LENGTHS
        from classer.serve.core.models import AUTO, ModelSettings, make_engine

        bundle = load_bundle(path)
        names = [task.name for task in bundle.taxonomy.tasks]
        if options.task is None and len(names) > 1:
            raise InputError(f"{path} has several tasks; name one with --task: {', '.join(names)}.")
        self._task = bundle.taxonomy.task(options.task or names[0])
        self._answers = AnswerDecoder(bundle.taxonomy, bundle.calibration, path.name, bundle.version)
        focus = Focus.parse(options.focus or "1", bundle.encoder.num_layers)
        decided = {bucket: precision_of(bucket, None) for bucket in (*PROGRAM_LENGTHS, bundle.max_length)}
        plan = {bucket: found for bucket, found in decided.items() if found is not None}
        # A precision that the user named is used even where it differs from the bundle's own outputs.
        settings = ModelSettings(precision=precision, golden=precision == AUTO)
        self._make_engine = functools.partial(make_engine, bundle, focus, settings, [])
        self._engine = self._make_engine(plan)
        self._options, self._precision_of = options, precision_of
        self._batch_size: dict[int, int] = {}  # by bucket, of those that are ready
        self._tokenizer, self._max_length = bundle.tokenizer, bundle.max_length
        self.version = bundle.version
        self.multilabel = not self._task.kind.exclusive
        self.labels = tuple(self._task.label_names)

    def prepare(self, texts: Sequence[str]) -> Any:
        return self._tokenizer.encode(texts, self._max_length)

    def predict(self, prepared: Any) -> Predictions:
        from classer.serve.core.answers import not_finite
        from classer.serve.core.work import Scored

        if not prepared.ids:
            no_N, no_NL = np.zeros(0, np.float32), np.zeros((0, len(self.labels)), np.float32)
            return Predictions([], no_N, no_N.astype(bool), no_NL if self._options.all_scores else None)
        scored = [Scored(output, 0.0, 0.0) for output in self.outputs(prepared.ids)]
        probs_NL, chosen_NL, finite_N = self._answers.decode(self._task, scored, self._options.threshold)
        rank_by_NL = np.where(chosen_NL, probs_NL + 2.0, np.where(self._task.leaves_L, probs_NL, -1.0))
        ranked_NL = np.argsort(-rank_by_NL, axis=1, kind="stable")
        counts_N = chosen_NL.sum(axis=1)
        chosen = [tuple(self.labels[i] for i in ranked_L[:n]) for ranked_L, n in zip(ranked_NL, counts_N, strict=True)]
        scores_N = probs_NL[np.arange(len(probs_NL)), ranked_NL[:, 0]]
        failed = dict.fromkeys(np.flatnonzero(~finite_N).tolist(), str(not_finite()))
        all_NL = probs_NL if self._options.all_scores else None
        return Predictions(chosen, scores_N, np.asarray(prepared.truncated), all_NL, failed)

    def outputs(self, ids: Sequence[np.ndarray]) -> list[Output]:
        """The device's outputs for N texts, in batches of like length. The next batch starts while one is computed."""
        from classer.data.buckets import bucket_for

        by_bucket: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            by_bucket.setdefault(bucket_for(len(row), self._engine.buckets), []).append(i)
        outputs: dict[int, Output] = {}
        in_flight: collections.deque[tuple[list[int], Callable[[], list[Output]]]] = collections.deque()

        def collect() -> None:
            batch, wait = in_flight.popleft()
            outputs.update(zip(batch, wait(), strict=True))

        for bucket, texts in sorted(by_bucket.items()):
            size = self._batch_size.get(bucket) or self._compile(bucket)
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                in_flight.append((batch, self._engine.launch([ids[i] for i in batch], bucket)))
                if len(in_flight) == IN_FLIGHT:
                    collect()
        while in_flight:
            collect()
        return [outputs[i] for i in range(len(ids))]

    def close(self) -> None:
        """Does nothing: weights and programs are freed with the object."""

    def _compile(self, bucket: int) -> int:
        """Compiles a bucket's largest program, which runs all of its texts; returns its batch size.

        Raises:
          InputError: no precision reproduces the golden outputs, or not the one that this job decided on.
        """
        self._engine.ensure(bucket, sys.maxsize)
        chosen = self._engine.plan[bucket]
        decided = self._precision_of(bucket, chosen)
        if decided not in (None, chosen):  # another process of this job was first
            self._engine = self._make_engine({**self._engine.plan, bucket: decided})
            for ready in (*self._batch_size, bucket):
                self._engine.ensure(ready, sys.maxsize)
            if self._engine.plan[bucket] != decided:
                raise InputError(
                    f"This job computes texts of up to {bucket} tokens in {decided}, which does not reproduce the "
                    "bundle's golden outputs on this machine; give --precision, and another --out."
                )
        self._batch_size[bucket] = self._engine.rows(bucket, sys.maxsize)
        return self._batch_size[bucket]


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
