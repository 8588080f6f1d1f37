"""What the Python client gives its callers, and how it is read from messages. Loads neither JAX nor TensorFlow."""

from __future__ import annotations

import dataclasses

from ..proto import classifier_pb2 as pb
from ..wire.errors import ServeError


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredLabel:
    """A label, its calibrated probability (0 … 1), and whether it is (part of) the answer.

    `path` names the labels from the root of its tree to this one; empty where the task has no tree.
    """

    name: str
    score: float
    chosen: bool
    path: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class EvidenceSpan:
    """Characters `start` to `end` (exclusive) of the text that the model read to its last layer, and their share."""

    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """The answer to one text.

    Attributes:
      task: the task that was answered.
      labels: highest score first: the `top_k` best ones, and every chosen one; of a tree these are leaves, before them
        the inner label at which the answer stops, if it does.
      truncated: the text was longer than the model reads, so that its end was not looked at.
      tokens: how many tokens the model read.
      queue_micros: how long the text waited for the device, in microseconds.
      compute_micros: how long the device took over the batch that the text was in, in microseconds.
      model_version: a hash of the bundle that answered.
      evidence: what the model read to its last layer, in the order of the text, if it was asked for.
      model: the name of the model that answered.
      request_id: the request's own.
    """

    task: str
    labels: tuple[ScoredLabel, ...]
    truncated: bool
    tokens: int
    queue_micros: int
    compute_micros: int
    model_version: str
    evidence: tuple[EvidenceSpan, ...] = ()
    model: str = ""
    request_id: str = ""

    @property
    def best(self) -> ScoredLabel:
        """The label of the highest score (of a multilabel task, chosen or not); of a tree the chosen one."""
        # Other servers may rank the labels above a leaf too, none of which is less probable.
        return next((label for label in self.labels if label.chosen and label.path), self.labels[0])

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the labels that hold: one of an exclusive task, any number (also none) of a multilabel one."""
        return tuple(label.name for label in self.labels if label.chosen)


@dataclasses.dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task that a server answers.

    Attributes:
      name: what `classify` takes.
      kind: "binary", "multiclass", "multilabel" or "hierarchical".
      num_labels: how many labels it has.
      model: the model that answers it, which `classify` takes too.
      model_version: a hash of that model's bundle.
    """

    name: str
    kind: str
    num_labels: int
    model: str
    model_version: str


Outcome = Classification | ServeError


def read_classification(response: pb.ClassifyResponse) -> Classification:
    return Classification(
        task=response.task,
        labels=tuple(
            ScoredLabel(label.name, label.score, label.chosen, tuple(label.path)) for label in response.labels
        ),
        truncated=response.truncated,
        tokens=response.tokens,
        queue_micros=response.queue_micros,
        compute_micros=response.compute_micros,
        model_version=response.model_version,
        evidence=tuple(EvidenceSpan(span.start, span.end, span.score) for span in response.evidence),
        model=response.model,
        request_id=response.request_id,
    )


def read_outcomes(response: pb.ClassifyBatchResponse) -> list[Outcome]:
    """Each text's answer, or the error of its own."""
    from ..wire.status import from_status  # here, so that a model in this process loads no gRPC

    return [
        from_status(item.error) if item.HasField("error") else read_classification(item.response)
        for item in response.items
    ]


def read_tasks(response: pb.ListTasksResponse) -> list[TaskInfo]:
    return [TaskInfo(one.name, one.kind, one.num_labels, one.model, one.model_version) for one in response.tasks]
