"""The Python client: `Client` for scripts and threads, `AsyncClient` for asyncio. Loads neither JAX nor TensorFlow.

with Client("localhost:50051") as client:
    print(client.classify("my card has not arrived").best.label)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Self, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ...data.errors import ClasserError
from ..ops.security import Tls, aio_channel, sync_channel
from ..proto import classifier_pb2 as pb
from ..proto.classifier_pb2_grpc import ClassifierStub
from ..wire.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    ServeError,
    Unavailable,
    UnknownTask,
)
from ..wire.status import error_of, error_of_call, from_status
from .requests import ClassifyOptions, batch_requests, chunks, one_request
from .results import (
    Classification,
    EvidenceSpan,
    Outcome,
    ScoredLabel,
    TaskInfo,
    read_classification,
    read_tasks,
)

__all__ = [
    "AsyncClient",
    "Cancelled",
    "ClasserError",
    "Classification",
    "ClassifyOptions",
    "Client",
    "DeadlineExceeded",
    "EvidenceSpan",
    "InternalError",
    "InvalidRequest",
    "Overloaded",
    "ScoredLabel",
    "ServeError",
    "TaskInfo",
    "Tls",
    "Unavailable",
    "UnknownTask",
]

DEFAULT_SERVER = "localhost:50051"
# Texts of one message of a stream: a few batches of the device.
_STREAM_TEXTS = 128
_POLL_SECONDS = 0.1
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # a batch's answers are as long as the task's label names make them
    # A server that is just starting is found within a second, where gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Client:
    """A connection to a Classer server, for any number of threads. Use it as a context manager, or `close` it.

    Every method that asks the server raises a `ServeError`: `Unavailable` if none answers at that address,
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
        self, text: str, task: str | None = None, *, timeout: float = 10.0, **options: Unpack[ClassifyOptions]
    ) -> Classification:
        """Classifies one text.

        Args:
          text: at most 1,000,000 characters; may be empty.
          task: may be left out if the server has one only.
          timeout: seconds.
          options: see `ClassifyOptions`.

        Raises:
          ServeError: one of its kinds, by cause.
        """
        request = one_request(text, task, options)
        with _typed_errors(self.server, timeout):
            return read_classification(self._classifier.Classify(request, timeout=timeout))

    def classify_batch(
        self,
        texts: Sequence[str],
        task: str | None = None,
        *,
        timeout: float = 60.0,
        **options: Unpack[ClassifyOptions],
    ) -> list[Outcome]:
        """Classifies any number of texts, in as few calls as the server's limits allow, one after the other.

        Args:
          texts: as for `classify`.
          task: as for `classify`, for all texts.
          timeout: seconds, for each call.
          options: as for `classify`, for all texts.

        Returns:
          For each text, in order, its answer or the error of its own.

        Raises:
          ServeError: a whole call failed; texts of earlier calls were classified in vain.
        """
        outcomes: list[Outcome] = []
        for request in batch_requests(texts, task, options):
            with _typed_errors(self.server, timeout):
                outcomes += _outcomes(self._classifier.ClassifyBatch(request, timeout=timeout))
        return outcomes

    def classify_stream(
        self,
        texts: Iterable[str],
        task: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Iterator[Outcome]:
        """Classifies texts in bulk: an outcome for each, in order, as they are done.

        They are read only as the server gets work done, so there may be any number of them; what the server would
        refuse because too much waits is waited for.

        Args:
          texts: as for `classify`.
          task: as for `classify`, for all texts.
          timeout: seconds for all of it; None for ever.
          options: as for `classify`, for all texts; the priority is "bulk" if none is given.

        Raises:
          ServeError: the stream ended early; what came before is valid.
        """
        failed: list[Exception] = []

        def requests() -> Iterator[pb.ClassifyBatchRequest]:
            try:
                rest = iter(texts)
                while some := list(itertools.islice(rest, _STREAM_TEXTS)):
                    yield from batch_requests(some, task, options)
            except Exception as error:  # gRPC would only say that there was one
                failed.append(error)
                raise

        with _typed_errors(self.server, timeout, failed):
            for response in self._classifier.ClassifyStream(requests(), timeout=timeout):
                yield from _outcomes(response)

    def tasks(self, model: str | None = None, *, timeout: float = 10.0) -> list[TaskInfo]:
        """What the server can be asked for, of one model or of all."""
        with _typed_errors(self.server, timeout):
            return read_tasks(self._classifier.ListTasks(pb.ListTasksRequest(model=model or ""), timeout=timeout))

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
        self, text: str, task: str | None = None, *, timeout: float = 10.0, **options: Unpack[ClassifyOptions]
    ) -> Classification:
        """`Client.classify`. Cancelling the awaiting task cancels the request in the server too."""
        request = one_request(text, task, options)
        with _typed_errors(self.server, timeout):
            return read_classification(await self._classifier.Classify(request, timeout=timeout))

    async def classify_batch(
        self,
        texts: Sequence[str],
        task: str | None = None,
        *,
        timeout: float = 60.0,
        **options: Unpack[ClassifyOptions],
    ) -> list[Outcome]:
        """`Client.classify_batch`."""
        outcomes: list[Outcome] = []
        for request in batch_requests(texts, task, options):
            with _typed_errors(self.server, timeout):
                outcomes += _outcomes(await self._classifier.ClassifyBatch(request, timeout=timeout))
        return outcomes

    async def classify_stream(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        task: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> AsyncIterator[Outcome]:
        """`Client.classify_stream`, to be iterated with `async for`."""
        failed: list[Exception] = []

        async def requests() -> AsyncIterator[pb.ClassifyBatchRequest]:
            try:
                async for some in chunks(texts, _STREAM_TEXTS):
                    for request in batch_requests(some, task, options):
                        yield request
            except Exception as error:  # gRPC would only log it
                failed.append(error)
                raise

        with _typed_errors(self.server, timeout, failed):
            async for response in self._classifier.ClassifyStream(requests(), timeout=timeout):
                for outcome in _outcomes(response):
                    yield outcome

    async def tasks(self, model: str | None = None, *, timeout: float = 10.0) -> list[TaskInfo]:
        """`Client.tasks`."""
        with _typed_errors(self.server, timeout):
            return read_tasks(await self._classifier.ListTasks(pb.ListTasksRequest(model=model or ""), timeout=timeout))

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


@contextlib.contextmanager
def _typed_errors(server: str, timeout: float | None, failed: Sequence[Exception] = ()) -> Iterator[None]:
    """Turns gRPC's errors into ours: the server's own sentence where it sent one, else one about the connection.

    What `failed` holds by then is what really went wrong, on our side.
    """
    try:
        yield
    except asyncio.CancelledError:  # what gRPC makes of it where it is asynchronous
        if failed:
            raise failed[0] from None
        raise
    except grpc.RpcError as error:
        if failed:
            raise failed[0] from None
        code, details, carried = _what_it_says(error)
        if carried is not None:
            raise carried from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
            details = f"The server at {server} did not answer within {timeout:g} seconds."
        elif code is grpc.StatusCode.CANCELLED:
            details = f"The request to the server at {server} was cancelled."
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            details = f"What answers at {server} is not a Classer server, or one of another version."
        elif code is grpc.StatusCode.UNAVAILABLE and not details.startswith("The server"):
            details = _why_unreachable(server, details)
        raise error_of(code, details) from error


def _why_unreachable(server: str, details: str) -> str:
    """A sentence about a connection that failed, of gRPC's own account of it."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (
            f"The server at {server} shows a certificate of an authority that is not trusted here; give the file of "
            f"that authority as `Tls(ca=…)`, on the command line as --tls-ca."
        )
    if "WRONG_VERSION_NUMBER" in details:
        return f"The server at {server} does not speak TLS; connect to it without TLS, or to its TLS port."
    if "handshake failed" in details.lower() or "peer certificate" in details.lower():
        return f"The TLS handshake with the server at {server} failed; is it the host of its certificate? ({details})"
    if "Socket closed" in details:
        return f"The server at {server} closed the connection; does it stop, or expect TLS? ({details})"
    return f"No server answers at {server}; is it running, and is the address right? ({details})"


def _what_it_says(error: Any) -> tuple[grpc.StatusCode, str, ServeError | None]:
    """Status, sentence, and the server's own error if it sent one.

    Every RpcError that a call raises is itself a call with these methods; the base class does not say so.
    """
    return error.code(), error.details() or "", error_of_call(error)


def _outcomes(response: pb.ClassifyBatchResponse) -> list[Outcome]:
    """Each text's answer, or the error of its own."""
    return [
        from_status(item.error) if item.HasField("error") else read_classification(item.response)
        for item in response.items
    ]


def _health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["Classifier"].full_name)


def _poll_timeout(end: float) -> float:
    return min(1.0, max(end - time.monotonic(), 0.05))


def _never_healthy(server: str, timeout: float) -> Unavailable:
    return Unavailable(f"No healthy server at {server} within {timeout:g} seconds; its own output says what it does.")
