"""Errors of requests: one class a cause, each with a sentence, the same in the server and in the client.

No gRPC here; `serve/wire/status.py` says which status each of them is on the wire.
"""

from __future__ import annotations

from ...data.errors import ClasserError


class ServeError(ClasserError):
    """A request that got no answer. The message never holds the text sent.

    Attributes:
      reason: the cause as a word for programs, stable over versions.
      field: the field of the request that is at fault, if one is.
      retry_seconds: after how long another try may succeed; None where that is not known.
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
    """Something in the request is out of its limits; the same request will never succeed."""

    reason = "INVALID_REQUEST"


class UnknownTask(ServeError):
    """There is no task or model of that name; the message names those there are."""

    reason = "UNKNOWN_TASK"


class Overloaded(ServeError):
    """The server has as much waiting as it takes on; nothing was computed, and a later try may succeed."""

    reason = "OVERLOADED"


class Unavailable(ServeError):
    """No server answers there, or it is starting, stopping or without its device."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(ServeError):
    """The deadline passed before there was an answer, or could not be met."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(ServeError):
    """The caller, or the server on its way down, gave the request up."""

    reason = "CANCELLED"


class InternalError(ServeError):
    """The server failed on this request; its log says why."""

    reason = "INTERNAL"


class NotPossible(ServeError):
    """What was asked of a server's models cannot be done as they are: a bundle is broken, a version is in use."""

    reason = "NOT_POSSIBLE"


class Unauthenticated(ServeError):
    """The caller showed no API key, or none that the server knows."""

    reason = "UNAUTHENTICATED"


class Forbidden(ServeError):
    """The caller's API key is known, but not for this."""

    reason = "FORBIDDEN"
