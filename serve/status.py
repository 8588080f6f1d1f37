"""Which gRPC status each error is on the wire; the one table that the server writes by and the client reads by."""

from __future__ import annotations

import grpc
from google.rpc import status_pb2

from .errors import (
    Cancelled,
    ClasserError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UnknownTask,
)

_CODES: dict[type[ClasserError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownTask: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    InternalError: grpc.StatusCode.INTERNAL,
}
_ERRORS = {code: error for error, code in _CODES.items()}
_NUMBERS = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: ClasserError) -> grpc.StatusCode:
    """The status code of an error."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def error_of(code: grpc.StatusCode, sentence: str) -> ClasserError:
    """The error of a status code; a code that no Classer server sends is an InternalError."""
    return _ERRORS.get(code, InternalError)(sentence)


def to_status(error: ClasserError) -> status_pb2.Status:
    """An error as the google.rpc.Status of one text of a batch."""
    return status_pb2.Status(code=code_of(error).value[0], message=str(error))


def from_status(status: status_pb2.Status) -> ClasserError:
    """The error of one text of a batch; the reverse of `to_status`."""
    return error_of(_NUMBERS.get(status.code, grpc.StatusCode.INTERNAL), status.message)
