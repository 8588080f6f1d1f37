"""JSON bodies of the HTTP gateway, and their translation from and to the service's messages.

Fields have the names of serve/proto/classifier.proto. Enum values are words ("bulk", "int8"), durations are seconds.
The OpenAPI page is generated from these models.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import grpc
from google.rpc import status_pb2
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ...data.limits import MAX_TEXT_CHARS
from ..proto import classifier_pb2 as pb
from ..wire.enums import value_of, word_of
from ..wire.errors import ServeError
from ..wire.limits import DEFAULT_TOP_K, MAX_REQUEST_ID, MAX_TEXTS
from ..wire.status import code_of, from_status

# gRPC's statuses in HTTP, as the comments of google.rpc.Code have them; 499 is nginx's for a caller that has gone.
HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
# Tags of the two kinds of `input`; they occur in pydantic's error locations.
INPUT_TAGS = ("text", "texts")


class ClassifyBody(BaseModel):
    """One text or several, and their options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: Annotated[
        Annotated[Text, Tag(INPUT_TAGS[0])] | Annotated[Texts, Tag(INPUT_TAGS[1])],
        Discriminator(lambda value: INPUT_TAGS[isinstance(value, list)]),
        Field(description=f"One text, or 1 to {MAX_TEXTS} texts with the same options."),
    ]
    task: str = Field("", description="Name of the task; may be left out if there is only one.")
    model: str = Field("", description="Name of the model; needed if several have a task of this name.")
    model_version: str = Field("", description="Version of the model; empty for its default version.")
    top_k: int | None = Field(
        None, ge=1, le=1_000_000, description=f"Number of labels to return, best first; default {DEFAULT_TOP_K}."
    )
    threshold: float | None = Field(None, ge=0, le=1, description="Score from which a label is chosen.")
    focus: str | float = Field("", description="Share of the text that is read to the last layer, such as 0.5.")
    evidence: bool = Field(False, description="Whether to return the spans that were kept to the last layer.")
    priority: Literal["interactive", "bulk"] = Field("interactive", description="Order among waiting requests.")
    request_id: str = Field("", max_length=MAX_REQUEST_ID, description="Returned in the answer.")
    timeout: float = Field(10.0, gt=0, le=600, description="Seconds after which the answer is of no use.")

    def options(self) -> pb.ClassifyOptions:
        """The options as a message."""
        fields: dict[str, Any] = self.model_dump(
            include={"task", "model", "model_version", "top_k", "threshold", "evidence", "request_id"},
            exclude_none=True,
        )
        focus = self.focus if isinstance(self.focus, str) else f"{self.focus:g}"
        return pb.ClassifyOptions(**fields, focus=focus, priority=value_of(pb.Priority, self.priority))


class ScoredLabelOut(BaseModel):
    """A label of an answer."""

    label: str
    score: float = Field(description="Calibrated probability, 0 to 1.")
    chosen: bool = Field(description="Whether the label belongs to the answer.")
    path: list[str] = Field([], description="Labels from the root to this one; empty without a hierarchy.")


class EvidenceSpanOut(BaseModel):
    """A span that the model kept to its last layer."""

    start: int = Field(description="First character, in Unicode code points from 0.")
    end: int = Field(description="One past the last character.")
    score: float = Field(description="Share of the evidence; the shares of a text sum to one.")


class ClassificationOut(BaseModel):
    """The answer to one text."""

    task: str
    model: str
    model_version: str = Field(description="Hash of the bundle's content.")
    labels: list[ScoredLabelOut] = Field(description="Highest score first.")
    truncated: bool = Field(description="Whether the end of the text was dropped.")
    tokens: int = Field(description="Number of tokens read.")
    focus: str
    precision: str = Field(description="Precision of the program that ran: float32, bfloat16 or int8.")
    evidence: list[EvidenceSpanOut]
    queue_duration: float = Field(description="Seconds that the text waited for the device.")
    compute_duration: float = Field(description="Seconds that the device took for the text's batch.")
    request_id: str


class ErrorOut(BaseModel):
    """The reason why there is no answer."""

    code: str = Field(description="gRPC status, such as RESOURCE_EXHAUSTED.")
    reason: str = Field(description="Cause as a word for programs.")
    message: str = Field(description="Cause as a sentence.")
    field: str | None = Field(default=None, description="Field of the request that is at fault, such as `input[3]`.")
    retry_seconds: float | None = Field(default=None, description="Seconds after which another try may succeed.")


class Failure(BaseModel):
    """Body of every status other than 200."""

    error: ErrorOut


class ItemOut(BaseModel):
    """The answer to one text of several, or its error."""

    response: ClassificationOut | None = None
    error: ErrorOut | None = None


class BatchOut(BaseModel):
    """The results of a list of texts."""

    items: list[ItemOut] = Field(description="One for each text, in their order.")


class TaskLabelOut(BaseModel):
    """A label that a task can answer with."""

    label: str
    description: str
    path: list[str]


class TaskOut(BaseModel):
    """A task that can be asked for."""

    name: str
    kind: str = Field(description="binary, multiclass, multilabel or hierarchical.")
    num_labels: int
    model: str
    model_version: str
    labels: list[TaskLabelOut] = Field([], description="Only in the answer for one model.")


class TasksOut(BaseModel):
    """The tasks of the models."""

    tasks: list[TaskOut]


class ProgramOut(BaseModel):
    """An executable for one shape."""

    bucket: int = Field(description="Row length in tokens.")
    batch_size: int
    precision: str
    focus: str
    run_duration: float = Field(description="Seconds that a full batch took at warm-up.")


class ModelOut(BaseModel):
    """One version of a model."""

    name: str
    version: str = Field(description="Hash of the bundle's content.")
    is_default: bool
    state: str = Field(description="loading, ready or retiring.")
    precision: str = Field(description="Precision of the bundle's weights.")
    max_length: int = Field(description="Maximum length of a text in tokens.")
    focuses: list[str] = Field(description="Values for `focus`; the first one is the default.")
    tasks: list[TaskOut]
    programs: list[ProgramOut]
    in_flight: int
    load_time: datetime


class ModelsOut(BaseModel):
    """Versions of the models."""

    models: list[ModelOut]


def classification_out(response: pb.ClassifyResponse) -> ClassificationOut:
    """The JSON of an answer."""
    return ClassificationOut(
        task=response.task,
        model=response.model,
        model_version=response.model_version,
        labels=[
            ScoredLabelOut(label=label.label, score=label.score, chosen=label.chosen, path=list(label.path))
            for label in response.labels
        ],
        truncated=response.truncated,
        tokens=response.tokens,
        focus=response.focus,
        precision=word_of(pb.Precision, response.precision),
        evidence=[EvidenceSpanOut(start=span.start, end=span.end, score=span.score) for span in response.evidence],
        queue_duration=response.queue_duration.ToNanoseconds() / 1e9,
        compute_duration=response.compute_duration.ToNanoseconds() / 1e9,
        request_id=response.request_id,
    )


def item_out(item: pb.ClassifyBatchItem) -> ItemOut:
    """The JSON of one text's answer or error."""
    if item.HasField("error"):
        return ItemOut(error=_status_out(item.error))
    return ItemOut(response=classification_out(item.response))


def error_out(error: ServeError) -> ErrorOut:
    """The JSON of an error."""
    return ErrorOut(
        code=code_of(error).name,
        reason=error.reason,
        message=str(error),
        field={"text": "input"}.get(error.field, error.field) or None,
        retry_seconds=error.retry_seconds,
    )


def _status_out(status: status_pb2.Status) -> ErrorOut:
    out = error_out(from_status(status))
    return out.model_copy(update={"code": _CODE_NAMES.get(status.code, "INTERNAL")})


def task_out(task: pb.Task) -> TaskOut:
    """The JSON of a task."""
    return TaskOut(
        name=task.name,
        kind=word_of(pb.TaskKind, task.kind),
        num_labels=task.num_labels,
        model=task.model,
        model_version=task.model_version,
        labels=[TaskLabelOut(label=one.label, description=one.description, path=list(one.path)) for one in task.labels],
    )


def model_out(model: pb.Model) -> ModelOut:
    """The JSON of a model."""
    return ModelOut(
        name=model.name,
        version=model.version,
        is_default=model.is_default,
        state=word_of(pb.ModelState, model.state),
        precision=word_of(pb.Precision, model.precision),
        max_length=model.max_length,
        focuses=list(model.focuses),
        tasks=[task_out(task) for task in model.tasks],
        programs=[
            ProgramOut(
                bucket=one.bucket,
                batch_size=one.batch_size,
                precision=word_of(pb.Precision, one.precision),
                focus=one.focus,
                run_duration=one.run_duration.ToNanoseconds() / 1e9,
            )
            for one in model.programs
        ],
        in_flight=model.in_flight,
        load_time=model.load_time.ToDatetime(UTC),
    )
