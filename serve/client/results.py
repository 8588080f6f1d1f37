"""Result types: what a model answers, from a server (`Client`) or in this process (`classer.load`).

No gRPC here. The fields are those of the messages in serve/proto/classifier.proto.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

from ..proto import classifier_pb2 as pb
from ..wire.enums import word_of
from ..wire.errors import ServeError


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredLabel:
    """A label of an answer.

    Attributes:
      label: the label's text.
      score: calibrated probability, 0 to 1.
      chosen: whether the label belongs to the answer.
      path: labels from the root of the hierarchy to this one, itself included; empty for a task without a hierarchy.
    """

    label: str
    score: float
    chosen: bool
    path: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class EvidenceSpan:
    """A span of the text that the model kept to its last layer.

    Attributes:
      start: first character, from 0.
      end: one past the last character.
      score: share of the evidence; the shares of a text sum to one.
    """

    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """The answer to one text.

    Attributes:
      task: name of the task.
      labels: the `top_k` best labels and every chosen one, highest score first. Of a hierarchical task these are
        leaves, after the inner label at which the answer stops, if it does.
      truncated: whether the text was longer than the model reads, so that its end was dropped.
      tokens: number of tokens read, the start and end markers included.
      model: name of the model.
      model_version: hash of the bundle's content.
      focus: focus that the text was read with, such as "0.5"; "1" reads every token.
      precision: precision of the program that ran: "float32", "bfloat16" or "int8".
      queue_duration: time that the text waited for the device.
      compute_duration: time that the device took for the batch that held the text.
      evidence: spans kept to the last layer, in the order of the text; empty unless asked for.
      request_id: the request's own.
    """

    task: str
    labels: tuple[ScoredLabel, ...]
    truncated: bool
    tokens: int
    model: str = ""
    model_version: str = ""
    focus: str = ""
    precision: str = ""
    queue_duration: timedelta = timedelta()
    compute_duration: timedelta = timedelta()
    evidence: tuple[EvidenceSpan, ...] = ()
    request_id: str = ""

    @property
    def best(self) -> ScoredLabel:
        """The label of the highest score, chosen or not; of a hierarchical task the chosen one."""
        # A server of another version may list the labels above a leaf first: none of them is less probable.
        return next((label for label in self.labels if label.chosen and label.path), self.labels[0])

    @property
    def chosen(self) -> tuple[str, ...]:
        """The chosen labels, highest score first: one of an exclusive task, any number of a multilabel one."""
        return tuple(label.label for label in self.labels if label.chosen)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them: durations in seconds."""
        fields = dataclasses.asdict(self)
        return {name: v.total_seconds() if isinstance(v, timedelta) else v for name, v in fields.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task that can be asked for.

    Attributes:
      name: value for the argument `task`.
      kind: "binary", "multiclass", "multilabel" or "hierarchical".
      num_labels: number of its labels.
      model: name of the model that answers it.
      model_version: hash of that model's bundle.
    """

    name: str
    kind: str
    num_labels: int
    model: str
    model_version: str


Outcome = Classification | ServeError


def read_classification(response: pb.ClassifyResponse) -> Classification:
    """The answer that a message carries."""
    return Classification(
        task=response.task,
        labels=tuple(
            ScoredLabel(label.label, label.score, label.chosen, tuple(label.path)) for label in response.labels
        ),
        truncated=response.truncated,
        tokens=response.tokens,
        model=response.model,
        model_version=response.model_version,
        focus=response.focus,
        precision=word_of(pb.Precision, response.precision),
        queue_duration=response.queue_duration.ToTimedelta(),
        compute_duration=response.compute_duration.ToTimedelta(),
        evidence=tuple(EvidenceSpan(span.start, span.end, span.score) for span in response.evidence),
        request_id=response.request_id,
    )


def read_tasks(response: pb.ListTasksResponse) -> list[TaskInfo]:
    """The tasks that a message carries."""
    return [
        TaskInfo(one.name, word_of(pb.TaskKind, one.kind), one.num_labels, one.model, one.model_version)
        for one in response.tasks
    ]
