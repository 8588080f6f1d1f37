"""What the Python client asks: its options, and the messages that carry them. Loads neither JAX nor TensorFlow."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Literal, TypedDict

from ..proto import classifier_pb2 as pb
from ..wire.errors import InvalidRequest
from ..wire.limits import MAX_MESSAGE_BYTES, MAX_TEXTS

# Half of what a message may be: leaves room for the rest of it.
_BATCH_BYTES = MAX_MESSAGE_BYTES // 2


class Options(TypedDict, total=False):
    """What a request may ask for beside its text and its task.

    Attributes:
      top_k: how many labels to return, best first; 0 leaves it to the server (5). Chosen ones come in any case.
      threshold: the score from which a label is chosen, 0 to 1, instead of the model's own.
      focus: how much of the text is read: one of those that the server was started with, such as 0.5.
      evidence: whether to say what the model read to its last layer; only a focused server can.
      model: which model, where several have the task.
      model_version: which version of it; its default one if left out.
      priority: "interactive" if someone waits for the answer, "bulk" if nobody does.
      request_id: the caller's own name for the request, which comes back; at most 128 characters of printable ASCII.
    """

    top_k: int
    threshold: float
    focus: float | str
    evidence: bool
    model: str
    model_version: str
    priority: Literal["interactive", "bulk"]
    request_id: str


async def chunks(texts: Iterable[str] | AsyncIterable[str], size: int) -> AsyncIterator[list[str]]:
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


def _fields(task: str | None, options: Options) -> dict[str, Any]:
    """A request's fields but for its texts."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"There is no option '{min(unknown)}'; there are: {', '.join(Options.__annotations__)}.")
    fields: dict[str, Any] = {"task": task or "", **options}
    if "focus" in fields:
        fields["focus"] = str(fields["focus"])
    if "priority" in fields:
        if fields["priority"] not in ("interactive", "bulk"):
            raise InvalidRequest(f"priority is {fields['priority']!r}; it is 'interactive' or 'bulk'.")
        fields["priority"] = fields["priority"].upper()
    return fields


def one_request(text: str, task: str | None, options: Options) -> pb.ClassifyRequest:
    """Raises InvalidRequest: gRPC could not carry it, or the server would refuse it whatever the model."""
    fields = _fields(task, options)
    with _unsendable():
        request = pb.ClassifyRequest(text=text, **fields)
    _check_bytes(request.ByteSize())
    return request


def batch_requests(texts: Sequence[str], task: str | None, options: Options) -> Iterator[pb.ClassifyBatchRequest]:
    """Cuts the texts into calls that the server takes. Raises as `one_request`."""
    if isinstance(texts, str):
        raise InvalidRequest("classify_batch takes a list of texts; for one text use classify.")
    if not texts:
        raise InvalidRequest("classify_batch was given no texts; give it at least one.")
    fields = _fields(task, options)
    with _unsendable():
        sizes = [len(text.encode()) for text in texts]
        pb.ClassifyBatchRequest(**fields)
    start = 0
    while start < len(texts):
        end, total = start + 1, sizes[start]
        while end < len(texts) and end - start < MAX_TEXTS and total + sizes[end] <= _BATCH_BYTES:
            total += sizes[end]
            end += 1
        request = pb.ClassifyBatchRequest(texts=texts[start:end], **fields)
        _check_bytes(request.ByteSize())
        yield request
        start = end


@contextlib.contextmanager
def _unsendable() -> Iterator[None]:
    """Refuses what protobuf cannot carry with a sentence instead of its own error."""
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidRequest("The text holds a lone surrogate, which UTF-8 cannot carry; decode it properly.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(
            f"The text and the task must be strings, top_k a number from 0, every option of its own type: {error}."
        ) from None


def _check_bytes(size: int) -> None:
    # Beyond this gRPC itself would refuse, as if the server were overloaded.
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"The request has {size} bytes; the server takes {MAX_MESSAGE_BYTES} at most.")
