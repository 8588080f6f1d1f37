"""Errors of requests, one class for each cause, shared by server and client.

No gRPC here; `serve/wire/status.py` maps them to gRPC statuses.
"""

from __future__ import annotations

from ...data.errors import ClasserError


class ServeError(ClasserError):
    """Root of the errors of requests. The message is a sentence and never repeats the text.

    Attributes:
      reason: cause as a word for programs, stable over versions.
      field: path of the request's field that is at fault; empty if none is.
      retry_seconds: seconds after which another try may succeed; None if not known.
    """

    reason = "ERROR"

    def __init__(
        self, sentence: str, *, field: str = "", retry_seconds: float | None = None, reason: str | None = None
    ) -> None:
        super().__init__(sentence)
        if reason is not None:
            self.reason = reason
        self.field = field
        self.retry_seconds = retry_seconds


class InvalidRequest(ServeError):
    """A field of the request is out of its limits; the same request fails again."""

    reason = "INVALID_REQUEST"


class UnknownTask(ServeError):
    """No task or model has the name given; the message names those there are."""

    reason = "UNKNOWN_TASK"


class Overloaded(ServeError):
    """The server's queue is full or a quota is used up; nothing was computed, and a later try may succeed."""

    reason = "OVERLOADED"


class Unavailable(ServeError):
    """No server answers at the address, or it is starting, stopping or has lost its device."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(ServeError):
    """The deadline passed before the answer, or cannot be met."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(ServeError):
    """The caller cancelled the request, or the server stopped."""

    reason = "CANCELLED"


class InternalError(ServeError):
    """The server failed on this request; its log says why."""

    reason = "INTERNAL"


class NotPossible(ServeError):
    """The state of the models does not allow the change: a bundle is broken, or a version is in use."""

    reason = "NOT_POSSIBLE"


class Unauthenticated(ServeError):
    """The call has no API key, or one that the server does not know."""

    reason = "UNAUTHENTICATED"


class Forbidden(ServeError):
    """The API key does not allow this call."""

    reason = "FORBIDDEN"
