"""What can go wrong with a request: one class a cause, each with a sentence, the same in the server and in the client.

No gRPC here; `serve/status.py` says which status each of them is on the wire.
"""


class ClasserError(Exception):
    """A request that got no answer. The message is a whole sentence for the caller, and never holds the text sent."""


class InvalidRequest(ClasserError):
    """Something in the request is out of its limits; the same request will never succeed."""


class UnknownTask(ClasserError):
    """The model has no task of that name; the message names those it has."""


class Overloaded(ClasserError):
    """The server has as much waiting as it takes on; nothing was computed, and a later try may succeed."""


class Unavailable(ClasserError):
    """No server answers there, or it is starting, stopping or without its device."""


class DeadlineExceeded(ClasserError):
    """The deadline passed before there was an answer."""


class Cancelled(ClasserError):
    """The caller, or the server on its way down, gave the request up."""


class InternalError(ClasserError):
    """The server failed on this request; its log says why."""
