"""Requests of the Python client: their options, and the messages that carry them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import Literal, TypedDict

from ..proto import classifier_pb2 as pb
from ..wire.enums import value_of
from ..wire.errors import InvalidRequest
from ..wire.limits import MAX_MESSAGE_BYTES, MAX_TEXTS

# Half of what a message may be: leaves room for the rest of it.
_BATCH_BYTES = MAX_MESSAGE_BYTES // 2


class ClassifyOptions(TypedDict, total=False):
    """Options of a request, beside its task and time-out.

    Attributes:
      top_k: number of labels to return, best first; at least 1, default 5. Chosen labels are returned in any case.
      threshold: score from which a label is chosen, 0 to 1, in place of the model's own thresholds.
      focus: share of the text that the model reads to its last layer: one that the server was started with, such as
        0.5.
      evidence: whether to return the spans that the model kept to its last layer; needs a focus below 1.
      model: name of the model; needed where several have the task.
      model_version: version of the model; default: its default version.
      priority: "interactive" if someone waits for the answer, else "bulk".
      request_id: the caller's own name for the request, returned in the answer; at most 128 characters of printable
        ASCII.
    """

    top_k: int
    threshold: float
    focus: float | str
    evidence: bool
    model: str
    model_version: str
    priority: Literal["interactive", "bulk"]
    request_id: str


async def lists_of(texts: Iterable[str] | AsyncIterable[str], size: int) -> AsyncIterator[list[str]]:
    """Lists of at most `size` texts."""
    some: list[str] = []
    if isinstance(texts, AsyncIterable):
        async for text in texts:
            some.append(text)
            if len(some) == size:
                yield some
                some = []
    else:
        rest = iter(texts)
        while len(some := list(itertools.islice(rest, size))) == size:
            yield some
    if some:
        yield some


def _message(task: str | None, options: ClassifyOptions) -> pb.ClassifyOptions:
    """The options as a message. Raises TypeError: an unknown option. Raises InvalidRequest: a wrong value."""
    known = ClassifyOptions.__annotations__
    if unknown := options.keys() - known.keys():
        raise TypeError(f"There is no option '{min(unknown)}'; there are: {', '.join(known)}.")
    fields = {**options, "task": task or ""}
    if "priority" in fields:
        if fields["priority"] not in ("interactive", "bulk"):
            raise InvalidRequest(
                f"priority is {fields['priority']!r}; it must be 'interactive' or 'bulk'.", field="priority"
            )
        fields["priority"] = value_of(pb.Priority, fields["priority"])
    with _unsendable():
        focus = fields.get("focus", "")
        fields["focus"] = focus if isinstance(focus, str) else f"{focus:g}"
        return pb.ClassifyOptions(**fields)


def one_request(text: str, task: str | None, options: ClassifyOptions) -> pb.ClassifyRequest:
    """The request for one text.

    Raises:
      InvalidRequest: an argument has the wrong type, or the message is larger than a server takes.
      TypeError: there is no option of that name.
    """
    message = _message(task, options)
    with _unsendable():
        request = pb.ClassifyRequest(text=text, options=message)
    _check_bytes(request.ByteSize())
    return request


def batch_requests(
    texts: Sequence[str], task: str | None, options: ClassifyOptions
) -> Iterator[pb.ClassifyBatchRequest]:
    """The requests for any number of texts, each within a server's limits. Raises as `one_request`."""
    if isinstance(texts, str):
        raise InvalidRequest("classify_batch takes a list of texts; for one text use classify.", field="texts")
    if not texts:
        raise InvalidRequest("classify_batch was given no texts; give it at least one.", field="texts")
    message = _message(task, options)
    with _unsendable():
        sizes = [len(text.encode()) for text in texts]
    start = 0
    while start < len(texts):
        end, total = start + 1, sizes[start]
        while end < len(texts) and end - start < MAX_TEXTS and total + sizes[end] <= _BATCH_BYTES:
            total += sizes[end]
            end += 1
        request = pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=texts[start:end], options=message))
        _check_bytes(request.ByteSize())
        yield request
        start = end


@contextlib.contextmanager
def _unsendable() -> Iterator[None]:
    """Turns protobuf's errors into InvalidRequest."""
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidRequest("The text holds a lone surrogate, which UTF-8 cannot carry; decode it properly.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(
            f"The text and the task must be strings, top_k a number from 1, every option of its own type: {error}."
        ) from None


def _check_bytes(size: int) -> None:
    # gRPC itself would refuse a larger one with the status of an overloaded server.
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"The request has {size} bytes; the server takes {MAX_MESSAGE_BYTES} at most.")
