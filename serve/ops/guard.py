"""The gRPC interceptor in front of the services: API keys, admission control, statuses, logs, metrics and traces.

It is one interceptor, so that a call passes one wrapper. It also turns what a service raises into the call's status. It
never reads a text, and logs neither texts nor keys. Health and reflection need no key and are not counted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..proto import classifier_pb2 as pb
from ..wire.errors import Forbidden, InternalError, InvalidRequest, Overloaded, ServeError
from ..wire.limits import RETRY_SECONDS
from ..wire.status import code_of, text_outcomes, trailing_metadata
from .keys import Allowance, KeyRing
from .log import access_logger, audit_logger, log_failure, log_fields
from .metrics import CallMetrics, Stages
from .security import KEY_HEADER, KEY_SCHEME
from .tracing import Tracing, end_span, trace_id

if TYPE_CHECKING:
    from .tracing import Span

OUR_PACKAGE = "classer."
ADMIN_SERVICE = "ModelAdmin"
MAX_IN_FLIGHT_CALLS = 4096
MAX_IN_FLIGHT_BYTES = 256 * 1024 * 1024
# A stream whose key would have to wait longer for its rate is refused instead.
_PATIENCE_SECONDS = 60.0
# Methods whose messages hold several texts.
_BATCHES = ("ClassifyBatch", "ClassifyStream")
# The audit fields of the admin call that runs (see `audit`).
_about: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("about")


@dataclasses.dataclass
class _Call:
    """One call while it runs."""

    method: str
    peer: str
    identity: str
    allowance: Allowance | None
    span: Span | None
    started: float
    admin: bool
    bytes: int = 0
    texts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    about: dict[str, str] = dataclasses.field(default_factory=dict)
    stages: Stages | None = None
    failure: ServeError | None = None

    @property
    def key(self) -> str:
        return "" if self.allowance is None else self.allowance.entry.name


class Guard(grpc.aio.ServerInterceptor):
    """Guards the services of one server, on its event loop.

    Args:
      keys: the API keys that may call; None lets everyone.
      metrics: counts the calls; None for none.
      tracing: makes a span for each call; None for none.
      max_calls, max_bytes: the calls, and bytes of their requests, that may be in flight. More are refused as
        RESOURCE_EXHAUSTED before they are tokenised; beyond `max_calls`, before they are read.
    """

    def __init__(
        self,
        *,
        keys: KeyRing | None = None,
        metrics: CallMetrics | None = None,
        tracing: Tracing | None = None,
        max_calls: int = MAX_IN_FLIGHT_CALLS,
        max_bytes: int = MAX_IN_FLIGHT_BYTES,
    ) -> None:
        self._keys, self._metrics, self._tracing = keys, metrics, tracing
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls = self._bytes = 0
        if metrics is not None:
            metrics.in_flight_calls.set_function(lambda: self._calls)
            metrics.in_flight_bytes.set_function(lambda: self._bytes)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        if handler is None or not service.startswith(OUR_PACKAGE):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        admin = service.endswith(ADMIN_SERVICE)
        allowance: Allowance | None = None
        refusal: ServeError | None = None
        try:
            if self._keys is not None:
                allowance = self._keys.find(_presented(metadata))
                if admin and not allowance.entry.admin:
                    raise Forbidden(
                        "This API key may not change models; `classer keys new --admin` makes one that may."
                    )
            if self._calls >= self._max_calls:
                raise Overloaded(
                    f"The server works on {self._max_calls} calls at a time; try again in a moment.",
                    retry_seconds=RETRY_SECONDS,
                    reason="TOO_MANY_CALLS",
                )
        except ServeError as error:
            refusal = error

        def begin(context: Any) -> _Call:
            span = None if self._tracing is None else self._tracing.start(f"{service}/{method}", metadata, {})
            return _Call(method, context.peer(), _identity(context), allowance, span, time.perf_counter(), admin)

        if refusal is not None:
            return _refusing(self._in_call, begin, refusal)
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._guard_stream(handler.stream_stream, begin),
                request_deserializer=_tolerant(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.request_streaming or handler.response_streaming:
            raise NotImplementedError(f"{method} streams one way; the guard knows unary calls and two-way streams.")
        return grpc.unary_unary_rpc_method_handler(
            self._guard_unary(handler.unary_unary, begin),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guard_unary(self, inner: Callable[..., Awaitable[Any]], begin: Callable[[Any], _Call]) -> Callable[..., Any]:
        async def guarded(request: Any, context: Any) -> Any:
            call = begin(context)
            _about.set(call.about)
            async with self._in_call(call, context):
                if isinstance(request, DecodeError):
                    raise _no_message(call.method)
                self._take_bytes(call, _size(request))
                if call.allowance is not None and (texts := _count(call.method, request)):
                    call.allowance.take(texts)
                response = await inner(request, context)
                self._note(call, response)
                return response
            _fail(context, call)
            return None

        return guarded

    def _guard_stream(self, inner: Callable[..., Any], begin: Callable[[Any], _Call]) -> Callable[..., Any]:
        # Not a generator: gRPC would not close one whose caller has gone.
        async def guarded(requests: AsyncIterator[Any], context: Any) -> None:
            call = begin(context)
            sizes: collections.deque[int] = collections.deque()  # of the messages without a response yet
            refused: list[ServeError] = []

            async def admitted() -> AsyncIterator[Any]:
                try:
                    async for request in requests:
                        if isinstance(request, DecodeError):
                            raise _no_message(call.method)
                        if call.allowance is not None:
                            await _take_patiently(call.allowance, _count(call.method, request))
                        size = _size(request)
                        self._take_bytes(call, size)
                        sizes.append(size)
                        yield request
                except ServeError as error:
                    refused.append(error)
                    raise

            async with self._in_call(call, context):
                try:
                    async with contextlib.aclosing(inner(admitted(), context)) as responses:
                        async for response in responses:
                            self._note(call, response)
                            await context.write(response)
                            size = sizes.popleft()
                            call.bytes -= size
                            self._bytes -= size
                except asyncio.CancelledError:  # in a front end, whose call to the engine has ended
                    if refused:
                        raise refused[0] from None
                    raise
            _fail(context, call)

        return guarded

    @contextlib.asynccontextmanager
    async def _in_call(self, call: _Call, context: Any) -> AsyncIterator[None]:
        """Counts a call while it runs; keeps its error as `failure`; logs and measures its end."""
        self._calls += 1
        code, reason = "OK", ""
        try:
            yield
        except ServeError as error:
            call.failure = error.with_traceback(None)  # whose frames hold the call: see `Scheduler._enqueue`
        except (asyncio.CancelledError, GeneratorExit, grpc.aio.InternalError) as error:
            left = context.time_remaining()
            code = reason = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
            if isinstance(error, grpc.aio.InternalError):  # the caller has gone
                raise asyncio.CancelledError from None
            raise
        except Exception as error:
            log_failure("A request failed", error)
            call.failure = InternalError("The server failed on this request; its log says why.")
        finally:
            if call.failure is not None:
                code, reason = code_of(call.failure).name, call.failure.reason
            self._calls -= 1
            self._bytes -= call.bytes
            self._write_down(call, code, reason)

    def _take_bytes(self, call: _Call, size: int) -> None:
        if self._bytes + size > self._max_bytes:
            raise Overloaded(
                f"The requests in flight have {self._bytes} bytes, and the server takes on {self._max_bytes}; try "
                "again in a moment.",
                retry_seconds=RETRY_SECONDS,
                reason="TOO_MANY_BYTES",
            )
        call.bytes += size
        self._bytes += size

    def _note(self, call: _Call, response: Any) -> None:
        """Counts the texts of a response by status; takes the stages of the text that was queued longest."""
        if self._metrics is None and self._tracing is None and not access_logger.isEnabledFor(logging.INFO):
            return
        if isinstance(response, bytes) and call.method in _BATCHES and self._metrics is not None:
            response = pb.ClassifyBatchResponse.FromString(response)
        if isinstance(response, pb.ClassifyResponse):
            call.texts["OK"] += 1
            call.stages = _stages(response)
        elif isinstance(response, pb.ClassifyBatchResponse):
            codes, reasons = text_outcomes(response.items)
            call.texts.update(codes)
            call.refused.update(reasons)
            answered = (item.response for item in response.items if item.HasField("response"))
            longest = max(answered, key=lambda one: one.queue_duration.ToNanoseconds(), default=None)
            if longest is not None:
                call.stages = _stages(longest)

    def _write_down(self, call: _Call, code: str, reason: str) -> None:
        seconds = time.perf_counter() - call.started
        texts = dict(call.texts)
        if self._metrics is not None:
            self._metrics.ended(call.method, code, seconds, reason, call.key, texts, call.refused)
            if call.stages is not None:
                self._metrics.staged(seconds, call.stages)
        if call.span is not None:
            staged = (
                {}
                if call.stages is None
                else {"classer.queue": call.stages.queue, "classer.compute": call.stages.compute}
            )
            end_span(call.span, code, {"classer.texts": sum(texts.values()), **staged})
        fields = {"method": call.method, "code": code, "ms": round(seconds * 1e3, 2), "peer": call.peer}
        for name, value in (
            ("reason", reason),
            ("key", call.key),
            ("identity", call.identity),
            ("trace", "" if call.span is None else trace_id(call.span)),
        ):
            if value:
                fields[name] = value
        if call.admin:
            log_fields(audit_logger, "admin", **fields, **call.about)
        elif access_logger.isEnabledFor(logging.INFO):
            log_fields(access_logger, "call", **fields, texts=sum(texts.values()))


def audit(**fields: str) -> None:
    """Adds fields to the audit line of the admin call that runs. Pass only names that the server knows."""
    if (about := _about.get(None)) is not None:
        about.update(fields)


def _fail(context: Any, call: _Call) -> None:
    """Sets the status of a failed call. `context.abort` raises again, and would cost half as much again."""
    if call.failure is not None:
        context.set_code(code_of(call.failure))
        context.set_details(str(call.failure))
        context.set_trailing_metadata(trailing_metadata(call.failure))


def _refusing(in_call: Callable[..., Any], begin: Callable[[Any], _Call], error: ServeError) -> Any:
    """A handler that fails each call with an error, without reading its message."""

    async def refuse(_: Any, context: Any) -> None:
        call = begin(context)
        async with in_call(call, context):
            raise error
        _fail(context, call)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _take_patiently(allowance: Allowance, texts: int) -> None:
    """Spends a stream's texts, waiting for its key's rate. Raises Overloaded if that would take too long."""
    while True:
        try:
            allowance.take(texts)
            return
        except Overloaded as error:
            if (error.retry_seconds or 0.0) > _PATIENCE_SECONDS:
                raise
            await asyncio.sleep(error.retry_seconds or RETRY_SECONDS)


def _presented(metadata: dict[str, Any]) -> str | None:
    value = metadata.get(KEY_HEADER)
    return value.removeprefix(KEY_SCHEME).strip() if isinstance(value, str) else None


def _identity(context: Any) -> str:
    """The common name of the client's certificate (mutual TLS); empty if there is none."""
    names = context.auth_context().get("x509_common_name") or ()
    return next((name.decode("utf-8", "replace") for name in names), "")


def _tolerant(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserialiser that returns its error. gRPC would log a raised one and make it UNKNOWN."""
    if deserializer is None:
        return None

    def deserialize(message: bytes) -> Any:
        try:
            return deserializer(message)
        except DecodeError as error:
            return error

    return deserialize


def _no_message(method: str) -> InvalidRequest:
    return InvalidRequest(f"The bytes sent are no request of {method} as Protocol Buffers write it.")


def _stages(response: pb.ClassifyResponse) -> Stages:
    return Stages(response.queue_duration.ToNanoseconds() / 1e9, response.compute_duration.ToNanoseconds() / 1e9)


def _size(request: Any) -> int:
    return len(request) if isinstance(request, bytes) else request.ByteSize()


def _count(method: str, request: Any) -> int:
    """How many texts a request has. Front ends pass batches as bytes; raises InvalidRequest if these are no message."""
    if isinstance(request, bytes) and method in _BATCHES:
        try:
            request = pb.ClassifyBatchRequest.FromString(request)
        except DecodeError:
            raise _no_message(method) from None
    if isinstance(request, pb.ClassifyRequest):
        return 1
    if isinstance(request, pb.ClassifyBatchRequest):
        return len(request.request_batch.requests) or len(request.text_batch.texts)
    return 0
