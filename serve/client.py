"""The Python client: `Client` for scripts and threads, `AsyncClient` for asyncio. Loads neither JAX nor TensorFlow.

with Client("localhost:50051") as client:
    print(client.classify("my card has not arrived").best.name)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

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
from .limits import MAX_MESSAGE_BYTES, MAX_TEXTS
from .proto import classifier_pb2 as pb
from .proto.classifier_pb2_grpc import ClassifierStub
from .security import Tls, aio_channel, sync_channel
from .status import error_of, from_status

__all__ = [
    "AsyncClient",
    "Cancelled",
    "ClasserError",
    "Classification",
    "Client",
    "DeadlineExceeded",
    "EvidenceSpan",
    "InternalError",
    "InvalidRequest",
    "Overloaded",
    "ScoredLabel",
    "Tls",
    "Unavailable",
    "UnknownTask",
]

DEFAULT_SERVER = "localhost:50051"
# Half of what a message may be: leaves room for the rest of it.
_BATCH_BYTES = MAX_MESSAGE_BYTES // 2
_POLL_SECONDS = 0.1
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # a batch's answers are as long as the task's label names make them
    # A server that is just starting is found within a second, where gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredLabel:
    """A label, its calibrated probability (0 … 1), and whether it is (part of) the answer."""

    name: str
    score: float
    chosen: bool


@dataclasses.dataclass(frozen=True, slots=True)
class EvidenceSpan:
    """Characters `start` to `end` (exclusive) of the text that the model read to its last layer, and their share."""

    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """The answer to one text.

    Attributes:
      task: the task that was answered.
      labels: highest score first: the `top_k` best ones, and every chosen one.
      truncated: the text was longer than the model reads, so that its end was not looked at.
      tokens: how many tokens the model read.
      queue_micros: how long the text waited for the device, in microseconds.
      compute_micros: how long the device took over the batch that the text was in, in microseconds.
      model_version: a hash of the bundle that answered.
      evidence: what the model read to its last layer, in the order of the text, if it was asked for.
    """

    task: str
    labels: tuple[ScoredLabel, ...]
    truncated: bool
    tokens: int
    queue_micros: int
    compute_micros: int
    model_version: str
    evidence: tuple[EvidenceSpan, ...] = ()

    @property
    def best(self) -> ScoredLabel:
        """The label of the highest score (of a multilabel task, chosen or not)."""
        return self.labels[0]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the labels that hold: one of an exclusive task, any number (also none) of a multilabel one."""
        return tuple(label.name for label in self.labels if label.chosen)


class Client:
    """A connection to a Classer server, for any number of threads. Use it as a context manager, or `close` it.

    Every method that asks the server raises a `ClasserError`: `Unavailable` if none answers at that address,
    `DeadlineExceeded` after its `timeout` (seconds), and what the server itself refuses.

    Args:
      server: "host:port".
      tls: how to connect with TLS; None connects in the clear.
      key: an API key, sent with every call; only over TLS, or to this machine.
      own_connection: whether not to share a connection with other clients of this process to the same server.

    Raises:
      InputError: a file of `tls` cannot be used.
      InvalidRequest: the key would travel in the clear.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        key: str | None = None,
        own_connection: bool = False,
    ) -> None:
        self.server = server
        self._channel = sync_channel(server, _options(own_connection), tls, key)
        self._classifier = ClassifierStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def classify(
        self, text: str, task: str | None = None, *, top_k: int = 0, evidence: bool = False, timeout: float = 10.0
    ) -> Classification:
        """Classifies one text.

        Args:
          text: at most 1,000,000 characters; may be empty.
          task: may be left out if the model has one only.
          top_k: how many labels to return, best first; 0 leaves it to the server (5). Chosen ones come in any case.
          evidence: whether to say what the model read to its last layer; only a focused server can.
          timeout: seconds.

        Raises:
          ClasserError: one of its kinds, by cause.
        """
        request = _request(text, task, top_k, evidence)
        with _typed_errors(self.server, timeout):
            return _classification(self._classifier.Classify(request, timeout=timeout))

    def classify_batch(
        self,
        texts: Sequence[str],
        task: str | None = None,
        *,
        top_k: int = 0,
        evidence: bool = False,
        timeout: float = 60.0,
    ) -> list[Classification | ClasserError]:
        """Classifies any number of texts, in as few calls as the server's limits allow, one after the other.

        Args:
          texts: as for `classify`.
          task: as for `classify`, for all texts.
          top_k: as for `classify`, for all texts.
          evidence: as for `classify`, for all texts.
          timeout: seconds, for each call.

        Returns:
          For each text, in order, its answer or the error of its own.

        Raises:
          ClasserError: a whole call failed; texts of earlier calls were classified in vain.
        """
        outcomes: list[Classification | ClasserError] = []
        for request in _batch_requests(texts, task, top_k, evidence):
            with _typed_errors(self.server, timeout):
                outcomes += _outcomes(self._classifier.ClassifyBatch(request, timeout=timeout))
        return outcomes

    def healthy(self, *, timeout: float = 1.0) -> bool:
        """Whether a server answers at that address and is ready to classify."""
        try:
            answer = self._health.Check(_health_request(), timeout=timeout)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_healthy(self, timeout: float = 60.0) -> None:
        """Returns as soon as the server is healthy.

        Raises:
          Unavailable: it was not within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while not self.healthy(timeout=_poll_timeout(end)):
            if time.monotonic() >= end:
                raise _never_healthy(self.server, timeout)
            time.sleep(_POLL_SECONDS)


class AsyncClient:
    """`Client` for asyncio: the same methods, arguments and errors, to be awaited. Make it inside the event loop."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        key: str | None = None,
        own_connection: bool = False,
    ) -> None:
        self.server = server
        self._channel = aio_channel(server, _options(own_connection), tls, key)
        self._classifier = ClassifierStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def classify(
        self, text: str, task: str | None = None, *, top_k: int = 0, evidence: bool = False, timeout: float = 10.0
    ) -> Classification:
        """`Client.classify`. Cancelling the awaiting task cancels the request in the server too."""
        request = _request(text, task, top_k, evidence)
        with _typed_errors(self.server, timeout):
            return _classification(await self._classifier.Classify(request, timeout=timeout))

    async def classify_batch(
        self,
        texts: Sequence[str],
        task: str | None = None,
        *,
        top_k: int = 0,
        evidence: bool = False,
        timeout: float = 60.0,
    ) -> list[Classification | ClasserError]:
        """`Client.classify_batch`."""
        outcomes: list[Classification | ClasserError] = []
        for request in _batch_requests(texts, task, top_k, evidence):
            with _typed_errors(self.server, timeout):
                outcomes += _outcomes(await self._classifier.ClassifyBatch(request, timeout=timeout))
        return outcomes

    async def healthy(self, *, timeout: float = 1.0) -> bool:
        """`Client.healthy`."""
        try:
            answer = await self._health.Check(_health_request(), timeout=timeout)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_until_healthy(self, timeout: float = 60.0) -> None:
        """`Client.wait_until_healthy`."""
        end = time.monotonic() + timeout
        while not await self.healthy(timeout=_poll_timeout(end)):
            if time.monotonic() >= end:
                raise _never_healthy(self.server, timeout)
            await asyncio.sleep(_POLL_SECONDS)


def _options(own_connection: bool) -> list[tuple[str, int]]:
    # Channels to one address share their connections unless they keep a pool of their own.
    return [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)] if own_connection else _OPTIONS


def _request(text: str, task: str | None, top_k: int, evidence: bool) -> pb.ClassifyRequest:
    with _unsendable():
        request = pb.ClassifyRequest(text=text, task=task or "", top_k=top_k, evidence=evidence)
    _check_bytes(request.ByteSize())
    return request


def _batch_requests(
    texts: Sequence[str], task: str | None, top_k: int, evidence: bool
) -> Iterator[pb.ClassifyBatchRequest]:
    """Cuts the texts into calls that the server takes."""
    if isinstance(texts, str):
        raise InvalidRequest("classify_batch takes a list of texts; for one text use classify.")
    if not texts:
        raise InvalidRequest("classify_batch was given no texts; give it at least one.")
    with _unsendable():
        sizes = [len(text.encode()) for text in texts]
        pb.ClassifyBatchRequest(task=task or "", top_k=top_k, evidence=evidence)
    start = 0
    while start < len(texts):
        end, total = start + 1, sizes[start]
        while end < len(texts) and end - start < MAX_TEXTS and total + sizes[end] <= _BATCH_BYTES:
            total += sizes[end]
            end += 1
        request = pb.ClassifyBatchRequest(texts=texts[start:end], task=task or "", top_k=top_k, evidence=evidence)
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
        raise InvalidRequest(f"The text and the task must be strings and top_k a number from 0: {error}.") from None


def _check_bytes(size: int) -> None:
    # Beyond this gRPC itself would refuse, as if the server were overloaded.
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"The request has {size} bytes; the server takes {MAX_MESSAGE_BYTES} at most.")


def _classification(response: pb.ClassifyResponse) -> Classification:
    return Classification(
        task=response.task,
        labels=tuple(ScoredLabel(label.name, label.score, label.chosen) for label in response.labels),
        truncated=response.truncated,
        tokens=response.tokens,
        queue_micros=response.queue_micros,
        compute_micros=response.compute_micros,
        model_version=response.model_version,
        evidence=tuple(EvidenceSpan(span.start, span.end, span.score) for span in response.evidence),
    )


def _outcomes(response: pb.ClassifyBatchResponse) -> list[Classification | ClasserError]:
    return [
        from_status(item.error) if item.HasField("error") else _classification(item.response) for item in response.items
    ]


@contextlib.contextmanager
def _typed_errors(server: str, timeout: float) -> Iterator[None]:
    """Turns gRPC's errors into ours: the server's own sentence where it sent one, else one about the connection."""
    try:
        yield
    except grpc.RpcError as error:
        code, details = _code_and_details(error)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"The server at {server} did not answer within {timeout:g} seconds."
        elif code is grpc.StatusCode.CANCELLED:
            details = f"The request to the server at {server} was cancelled."
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            details = f"What answers at {server} is not a Classer server, or one of another version."
        elif code is grpc.StatusCode.UNAVAILABLE and not details.startswith("The server"):
            details = f"No server answers at {server}; is it running, and is the address right? ({details})"
        raise error_of(code, details) from error


def _code_and_details(error: Any) -> tuple[grpc.StatusCode, str]:
    """Every RpcError that a call raises is itself a call with these methods; the base class does not say so."""
    return error.code(), error.details() or ""


def _health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["Classifier"].full_name)


def _poll_timeout(end: float) -> float:
    return min(1.0, max(end - time.monotonic(), 0.05))


def _never_healthy(server: str, timeout: float) -> Unavailable:
    return Unavailable(f"No healthy server at {server} within {timeout:g} seconds; its own output says what it does.")
