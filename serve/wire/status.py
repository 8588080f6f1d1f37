"""Translation between errors and gRPC statuses with google.rpc details, for server and client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from ..proto import classifier_pb2 as pb
from .errors import (
    Cancelled,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotPossible,
    Overloaded,
    ServeError,
    Unauthenticated,
    Unavailable,
    UnknownTask,
)
from .limits import RETRY_SECONDS

CODES: dict[type[ServeError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownTask: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    InternalError: grpc.StatusCode.INTERNAL,
    NotPossible: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
}
_ERRORS = {code: error for error, code in CODES.items()}
_NUMBERS = {code.value[0]: code for code in grpc.StatusCode}
# Metadata key under which gRPC carries a google.rpc.Status.
_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "classer"
# Details of the INTERNAL status by which grpc.aio reports a connection that broke while a message was sent.
_BROKEN = "Internal error from Core"


def code_of(error: ServeError) -> grpc.StatusCode:
    """The status code of an error."""
    return CODES.get(type(error), grpc.StatusCode.INTERNAL)


def error_of(
    code: grpc.StatusCode,
    sentence: str,
    *,
    field: str = "",
    retry_seconds: float | None = None,
    reason: str | None = None,
) -> ServeError:
    """The error of a status code; InternalError for a code that no Classer server sends."""
    kind = _ERRORS.get(code, InternalError)
    return kind(sentence, field=field, retry_seconds=retry_seconds, reason=reason)


def to_status(error: ServeError) -> status_pb2.Status:
    """An error as a google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo if it has a field or retry time."""
    status = status_pb2.Status(code=code_of(error).value[0], message=str(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_seconds * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_status(status: status_pb2.Status) -> ServeError:
    """The error that `to_status` was given."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for known in (info, bad, retry):
            detail.Unpack(known)  # does nothing for a detail of another type
    return error_of(
        _NUMBERS.get(status.code, grpc.StatusCode.INTERNAL),
        status.message,
        field=bad.field_violations[0].field if bad.field_violations else "",
        retry_seconds=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        reason=info.reason or None,
    )


def text_outcomes(items: Sequence[pb.ClassifyBatchItem]) -> tuple[Counter[str], Counter[str]]:
    """Number of a batch's texts by status, and of its failed texts by reason."""
    # Texts that were refused together have equal errors; each distinct one is parsed once.
    failed = Counter(item.error.SerializeToString() for item in items if item.HasField("error"))
    codes, reasons = Counter({"OK": len(items) - failed.total()}), Counter[str]()
    for status, count in failed.items():
        error = from_status(status_pb2.Status.FromString(status))
        codes[code_of(error).name] += count
        reasons[error.reason] += count
    return codes, reasons


def trailing_metadata(error: ServeError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata of a failed call, with the error's details."""
    return ((_DETAILS_KEY, to_status(error).SerializeToString()),)


def error_in(metadata: Any) -> ServeError | None:
    """The error in a failed call's trailing metadata; None if a Classer server did not set it."""
    for key, value in metadata or ():
        if key == _DETAILS_KEY:
            return from_status(status_pb2.Status.FromString(value))
    return None


def error_of_call(call: Any) -> ServeError | None:
    """The error of a failed call, where gRPC's code and details do not express it.

    These are errors that the server sent, and two of gRPC's own: a call that was refused unread because too many wait
    (see `listening.make_server`; it arrives as CANCELLED without details), and a connection that broke while a message
    was sent.

    Args:
      call: a gRPC error that a call raised.

    Returns:
      None if gRPC's code and details express the error.
    """
    if (carried := error_in(call.trailing_metadata())) is not None:
        return carried
    if call.code() is grpc.StatusCode.CANCELLED and call.details() == grpc.StatusCode.CANCELLED.name:
        sentence = "More calls wait to be read than the server lets wait; try again in a moment."
        return Overloaded(sentence, retry_seconds=RETRY_SECONDS, reason="TOO_MANY_PENDING")
    if call.code() is grpc.StatusCode.INTERNAL and call.details() == _BROKEN:
        return Unavailable("The connection to the server broke while a message was being sent; try again.")
    return None
