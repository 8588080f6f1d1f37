"""Python clients of a Classer server: `Client` for scripts and threads, `AsyncClient` for asyncio.

with Client("localhost:50051") as client:
    print(client.classify("my card has not arrived").best.label)

Neither loads JAX or TensorFlow.

Time-outs are in seconds and can be given to each call. The client retries nothing; after a connection has broken, the
next call connects again.

method            default time-out   when the server's queue is full
----------------  -----------------  --------------------------------------------------------------
classify          10                 raises Overloaded
classify_batch    60 for each call   the outcome of each text that was refused is Overloaded
classify_stream   none               waits
tasks, models     10                 never refused
healthy           1                  never refused; False instead of an error

Errors are sentences. All are ServeError, which is a ClasserError; a text of a batch or stream has an error of its own.

error             gRPC status          cause                                               another try
----------------  -------------------  --------------------------------------------------  -----------------------
InvalidRequest    INVALID_ARGUMENT     an argument is out of its limits                    fails again
UnknownTask       NOT_FOUND            there is no such task or model                      fails again
Unauthenticated   UNAUTHENTICATED      no API key, or an unknown one                       fails again
Forbidden         PERMISSION_DENIED    the API key does not allow this                     fails again
Overloaded        RESOURCE_EXHAUSTED   the queue is full, or a quota is used up            after `retry_seconds`
DeadlineExceeded  DEADLINE_EXCEEDED    the time-out passed, or cannot be met               with a longer time-out
Unavailable       UNAVAILABLE          no server answers, or it starts, stops or failed    later
Cancelled         CANCELLED            the call was cancelled                              if still wanted
InternalError     INTERNAL             the server failed on this text                      fails again, probably
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

from ...data.errors import ClasserError, InputError
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
from ..wire.limits import DEFAULT_SERVER
from ..wire.status import error_of, error_of_call, from_status
from .requests import ClassifyOptions, batch_requests, lists_of, one_request
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

# Texts of one message of a stream: a few batches of the device.
_STREAM_TEXTS = 128
_POLL_SECONDS = 0.1
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # a batch's answers have no limit: label names may be long
    # A server that has just started is found within a second; gRPC's default pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Client:
    """A connection to a Classer server, for any number of threads. Use it as a context manager, or `close` it.

    Its methods raise the errors in the table of this module. Making a client does not connect; the first call does.

    Args:
      server: address, "host:port".
      tls: certificates for TLS; None connects without TLS.
      key: API key, sent with every call; needs TLS unless the server is on this machine.
      own_connection: whether to open a connection of its own; by default the clients of a process share one for each
        server.

    Raises:
      InputError: the address is no HOST:PORT, or a file of `tls` cannot be used.
      InvalidRequest: the key would be sent without TLS over a network, or holds characters that no key has.
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
        _check_address(server)
        self._channel = sync_channel(server, _options(own_connection), tls, key)
        self._classifier = ClassifierStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Calls in flight raise Cancelled."""
        self._channel.close()

    def classify(
        self, text: str, task: str | None = None, *, timeout: float = 10.0, **options: Unpack[ClassifyOptions]
    ) -> Classification:
        """Classifies one text.

        Args:
          text: at most 1,000,000 characters; may be empty.
          task: name of the task; may be left out if the server has only one.
          timeout: seconds.
          options: see `ClassifyOptions`.

        Raises:
          ServeError: see the table of this module.
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
          For each text, in order, its answer or its error.

        Raises:
          ServeError: a whole call failed; the answers of earlier calls are lost.
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
        """Classifies any number of texts: yields an answer or error for each, in order.

        Texts are read from the iterable only as the server finishes others, so that memory stays flat. A full queue
        delays the stream instead of failing it.

        Args:
          texts: as for `classify`.
          task: as for `classify`, for all texts.
          timeout: seconds for the whole stream; None for no limit.
          options: as for `classify`, for all texts; the priority is "bulk" if none is given.

        Raises:
          ServeError: the stream ended early; the answers before that are valid.
        """
        failed: list[Exception] = []

        def requests() -> Iterator[pb.ClassifyBatchRequest]:
            try:
                rest = iter(texts)
                while some := list(itertools.islice(rest, _STREAM_TEXTS)):
                    yield from batch_requests(some, task, options)
            except Exception as error:  # gRPC drops the error itself
                failed.append(error)
                raise

        with _typed_errors(self.server, timeout, failed):
            for response in self._classifier.ClassifyStream(requests(), timeout=timeout):
                yield from _outcomes(response)

    def tasks(self, model: str | None = None, *, timeout: float = 10.0) -> list[TaskInfo]:
        """Lists the tasks of one model, or of all models."""
        with _typed_errors(self.server, timeout):
            return read_tasks(self._classifier.ListTasks(pb.ListTasksRequest(model=model or ""), timeout=timeout))

    def healthy(self, *, timeout: float = 1.0) -> bool:
        """Whether a server answers at the address and is ready to classify; never raises."""
        try:
            answer = self._health.Check(_health_request(), timeout=timeout)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_healthy(self, timeout: float = 60.0) -> None:
        """Waits until the server is healthy.

        Raises:
          Unavailable: it was not healthy within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while not self.healthy(timeout=_poll_timeout(end)):
            if time.monotonic() >= end:
                raise _never_healthy(self.server, timeout)
            time.sleep(_POLL_SECONDS)


class AsyncClient:
    """`Client` for asyncio: the same methods, arguments and errors. Make it inside the event loop that uses it."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        key: str | None = None,
        own_connection: bool = False,
    ) -> None:
        self.server = server
        _check_address(server)
        self._channel = aio_channel(server, _options(own_connection), tls, key)
        self._classifier = ClassifierStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """`Client.close`."""
        await self._channel.close()

    async def classify(
        self, text: str, task: str | None = None, *, timeout: float = 10.0, **options: Unpack[ClassifyOptions]
    ) -> Classification:
        """`Client.classify`. Cancelling the awaiting task cancels the request in the server."""
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
                async for some in lists_of(texts, _STREAM_TEXTS):
                    for request in batch_requests(some, task, options):
                        yield request
            except Exception as error:  # gRPC only logs it
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


def _check_address(server: str) -> None:
    if ":" not in server:
        raise InputError(f"The server's address is '{server}'; it must be HOST:PORT, such as {DEFAULT_SERVER}.")


def _options(own_connection: bool) -> list[tuple[str, int]]:
    # Channels to one address share their connections unless they keep a pool of their own.
    return [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)] if own_connection else _OPTIONS


@contextlib.contextmanager
def _typed_errors(server: str, timeout: float | None, failed: Sequence[Exception] = ()) -> Iterator[None]:
    """Turns gRPC's errors into ServeError, with the server's sentence if it sent one, else with one on the connection.

    Args:
      failed: errors of the caller's own iterable; the first one is raised in place of gRPC's.
    """
    try:
        yield
    except asyncio.CancelledError:  # gRPC's asyncio API cancels a call whose iterator raises
        if failed:
            raise failed[0] from None
        raise
    except grpc.RpcError as error:
        if failed:
            raise failed[0] from None
        code, details, carried = _read_error(error)
        if carried is not None:
            raise carried from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
            details = f"The server at {server} did not answer within {timeout:g} seconds."
        elif code is grpc.StatusCode.CANCELLED:
            details = f"The request to the server at {server} was cancelled."
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            details = f"The server at {server} is not a Classer server, or has another version."
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


def _read_error(error: Any) -> tuple[grpc.StatusCode, str, ServeError | None]:
    """Status and sentence of an RpcError, and the server's own error if it sent one.

    An RpcError that a call raises has the methods of a call, although its base class does not.
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
    return Unavailable(f"No healthy server at {server} within {timeout:g} seconds; see the server's output.")
