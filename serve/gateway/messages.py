"""What the HTTP gateway takes and gives as JSON, and how that stands for the service's messages."""

from __future__ import annotations

from typing import Annotated, Any

import grpc
from google.rpc import status_pb2
from pydantic import BaseModel, ConfigDict, Field

from ...data.readers import MAX_TEXT_CHARS
from ..proto import classifier_pb2 as pb
from ..wire.limits import MAX_REQUEST_ID, MAX_TEXTS
from ..wire.status import from_status

# gRPC's statuses as HTTP has them (google.rpc.Code's own table; 499 is nginx's for a caller that has gone).
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


class Options(BaseModel):
    """What may be said beside the texts; each field as in classifier.proto."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str = Field("", description="Name of the task; may be left out if there is only one.")
    model: str = Field("", description="Name of the model, if several have a task of this name.")
    model_version: str = Field("", description="Version of the model; its default one if left out.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="How many labels to return; 0 means 5.")
    threshold: float | None = Field(None, ge=0, le=1, description="Score from which a label is chosen.")
    focus: str = Field("", description='How much of the text is read, such as "0.5".')
    evidence: bool = Field(False, description="Whether to return what the model read to the end.")
    bulk: bool = Field(False, description="Whether nobody waits for the answer, so that others go first.")
    request_id: str = Field("", max_length=MAX_REQUEST_ID, description="Comes back in the response.")
    timeout_ms: int = Field(10_000, ge=1, le=600_000, description="After how long the answer is of no more use.")

    def fields(self) -> dict[str, Any]:
        """As the service's request has them."""
        fields = self.model_dump(
            include={"task", "model", "model_version", "top_k", "threshold", "focus", "evidence", "request_id"}
        )
        return {**fields, "priority": pb.BULK if self.bulk else pb.INTERACTIVE}


class ClassifyBody(Options):
    """One text."""

    text: Text


class ClassifyBatchBody(Options):
    """Several texts with the same options."""

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class LabelOut(BaseModel):
    name: str
    score: float = Field(description="Calibrated probability, 0 to 1.")
    chosen: bool
    path: list[str] = Field([], description="From the root to this label, where the task has a hierarchy.")


class SpanOut(BaseModel):
    start: int
    end: int
    score: float


class Classified(BaseModel):
    """The answer to one text."""

    task: str
    labels: list[LabelOut] = Field(description="Highest score first.")
    truncated: bool = Field(description="Whether the end of the text was not read.")
    tokens: int
    queue_micros: int
    compute_micros: int
    model: str
    model_version: str
    request_id: str
    evidence: list[SpanOut]


class ErrorOut(BaseModel):
    """Why there is no answer."""

    code: str = Field(description="The gRPC status, such as RESOURCE_EXHAUSTED.")
    reason: str = Field(description="The cause as a word for programs.")
    message: str
    retry_seconds: float | None = None


class Failure(BaseModel):
    error: ErrorOut


class Item(BaseModel):
    """One text's answer, or its error."""

    response: Classified | None = None
    error: ErrorOut | None = None


class BatchOut(BaseModel):
    items: list[Item] = Field(description="One for each text, in their order.")


class TaskOut(BaseModel):
    name: str
    kind: str
    num_labels: int
    model: str
    model_version: str


class TasksOut(BaseModel):
    tasks: list[TaskOut]


def classified(response: pb.ClassifyResponse) -> Classified:
    return Classified(
        task=response.task,
        labels=[
            LabelOut(name=label.name, score=label.score, chosen=label.chosen, path=list(label.path))
            for label in response.labels
        ],
        truncated=response.truncated,
        tokens=response.tokens,
        queue_micros=response.queue_micros,
        compute_micros=response.compute_micros,
        model=response.model,
        model_version=response.model_version,
        request_id=response.request_id,
        evidence=[SpanOut(start=span.start, end=span.end, score=span.score) for span in response.evidence],
    )


def item(one: pb.ClassifyBatchItem) -> Item:
    return Item(error=error_out(one.error)) if one.HasField("error") else Item(response=classified(one.response))


def error_out(status: status_pb2.Status) -> ErrorOut:
    error = from_status(status)
    return ErrorOut(
        code=_CODE_NAMES.get(status.code, "INTERNAL"),
        reason=error.reason,
        message=str(error),
        retry_seconds=error.retry_seconds,
    )


def task_out(task: pb.Task) -> TaskOut:
    return TaskOut(
        name=task.name,
        kind=task.kind,
        num_labels=task.num_labels,
        model=task.model,
        model_version=task.model_version,
    )
