"""The gateway's FastAPI application. Imported only where FastAPI is installed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import grpc
import grpc.aio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ... import __version__
from ..ops.guard import MAX_IN_FLIGHT_BYTES, MAX_IN_FLIGHT_CALLS
from ..ops.log import log_failure
from ..ops.metrics import CallMetrics, new_registry
from ..ops.security import KEY_HEADER, KEY_SCHEME, Tls, aio_channel, is_this_machine
from ..ops.tracing import Tracing, end_span, parent_of
from ..proto import classifier_pb2 as pb
from ..proto.classifier_pb2_grpc import ClassifierStub
from ..wire.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    Overloaded,
    ServeError,
    Unauthenticated,
    Unavailable,
)
from ..wire.limits import MAX_MESSAGE_BYTES, RETRY_SECONDS
from ..wire.status import code_of, error_of, error_of_call, text_outcomes
from .messages import (
    HTTP_STATUS,
    INPUT_TAGS,
    BatchOut,
    ClassificationOut,
    ClassifyBody,
    ErrorOut,
    Failure,
    ModelOut,
    ModelsOut,
    TasksOut,
    classification_out,
    error_out,
    item_out,
    model_out,
    task_out,
)

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_reconnect_backoff_ms", 1000)]
_HEALTH_SECONDS = 1.0
_LIST_SECONDS = 10.0
_API_KEY_HEADER = "x-api-key"
_CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
_FIELDS = ClassifyBody.model_fields.keys()
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure} for status in sorted({*HTTP_STATUS.values(), 413})
}

Scope = MutableMapping[str, Any]
T = TypeVar("T")


def make_app(
    server: str,
    tls: Tls | None = None,
    tracing: Tracing | None = None,
    *,
    max_calls: int = MAX_IN_FLIGHT_CALLS,
    max_bytes: int = MAX_IN_FLIGHT_BYTES,
) -> FastAPI:
    """The application: /v1/classify, /v1/models, /v1/tasks; /healthz, /readyz, /metrics; /docs, /openapi.json.

    Args:
      server: address of the gRPC server, "host:port".
      tls: TLS toward the server; None without TLS.
      tracing: exporter of spans; None passes a caller's `traceparent` on to the server unchanged.
      max_calls: calls in flight at most; more are refused with status 429.
      max_bytes: bytes of bodies in flight at most; more are refused with status 429.
    """
    upstream = _Upstream(server, tls, tracing)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        upstream.connect()
        yield
        await upstream.close()

    app = FastAPI(
        title="Classer", version=__version__, summary="Text classification.", lifespan=lifespan, responses=_FAILURES
    )
    app.add_middleware(_Limit, metrics=upstream.metrics, max_calls=max_calls, max_bytes=max_bytes)
    app.add_exception_handler(ServeError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)

    @app.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request) -> ClassificationOut | BatchOut:
        """Classifies one text, or each of a list of texts.

        The answer to a text is an object; the answer to a list has an item for each text: its answer, or its error.
        """
        with _sendable():
            options = body.options()
            if isinstance(body.input, str):
                message = pb.ClassifyRequest(text=body.input, options=options)
            else:
                message = pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=body.input, options=options))
        if isinstance(message, pb.ClassifyRequest):
            return classification_out(await upstream.call("Classify", request, message, body.timeout, texts=1))
        call = upstream.call("ClassifyBatch", request, message, body.timeout, texts=len(body.input))
        return BatchOut(items=[item_out(item) for item in (await call).items])

    @app.get("/v1/models")
    async def models(request: Request) -> ModelsOut:
        """Lists the versions of the models."""
        found = await upstream.call("ListModels", request, pb.ListModelsRequest(), _LIST_SECONDS, texts=0)
        return ModelsOut(models=[model_out(model) for model in found.models])

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str, version: str = "") -> ModelOut:
        """Gets one model: its tasks with all their labels, and its programs."""
        with _sendable():
            message = pb.GetModelRequest(name=name, version=version)
        return model_out(await upstream.call("GetModel", request, message, _LIST_SECONDS, texts=0))

    @app.get("/v1/tasks")
    async def tasks(request: Request, model: str = "") -> TasksOut:
        """Lists the tasks that can be asked for."""
        with _sendable():
            message = pb.ListTasksRequest(model=model)
        found = await upstream.call("ListTasks", request, message, _LIST_SECONDS, texts=0)
        return TasksOut(tasks=[task_out(task) for task in found.tasks])

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Liveness of the gateway."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> Response:
        """Readiness of the server behind the gateway."""
        ready = await upstream.ready()
        return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of the gateway; the server has its own port for its metrics."""
        return Response(generate_latest(upstream.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Upstream:
    """The gRPC server behind the gateway."""

    def __init__(self, server: str, tls: Tls | None, tracing: Tracing | None) -> None:
        self._server, self._tls, self._tracing = server, tls, tracing
        self.registry = new_registry()
        self.metrics = CallMetrics(self.registry)

    def connect(self) -> None:
        """Opens the channel, on the event loop that makes the calls."""
        self._channel = aio_channel(self._server, _OPTIONS, self._tls)
        self._classifier = ClassifierStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def ready(self) -> bool:
        try:
            request = health_pb2.HealthCheckRequest(service=_CLASSIFIER)
            answer = await self._health.Check(request, timeout=_HEALTH_SECONDS)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def call(self, method: str, request: Request, message: Any, seconds: float, *, texts: int) -> Any:
        """Makes a call with the caller's API key and trace context, and counts it.

        A caller that disconnects cancels its call.

        Raises:
          ServeError: the server refused the call, or cannot be reached.
        """
        started = time.perf_counter()
        span = None if self._tracing is None else self._tracing.start(f"HTTP {method}", request.headers, {})
        code, reason = "OK", ""
        counts: Mapping[str, int] = {}
        refused: Mapping[str, int] = {}
        try:
            metadata = [*self._key_of(request), *(_parent_in(request) if span is None else parent_of(span))]
            rpc = getattr(self._classifier, method)(message, timeout=seconds, metadata=metadata)
            response = await _while_there(request, _typed(rpc))
            counts = {code: texts}
            if method == "ClassifyBatch":
                counts, refused = text_outcomes(response.items)
            return response
        except ServeError as error:
            code, reason = code_of(error).name, error.reason
            counts = {code: texts}
            raise
        finally:
            elapsed = time.perf_counter() - started
            self.metrics.ended(f"HTTP {method}", code, elapsed, reason, "", counts, refused)
            if span is not None:
                end_span(span, code, {"classer.texts": texts})

    def _key_of(self, request: Request) -> list[tuple[str, str]]:
        value = request.headers.get(KEY_HEADER)
        if value is None and (key := request.headers.get(_API_KEY_HEADER)) is not None:
            value = KEY_SCHEME + key
        if value is None:
            return []
        if not value.isascii() or not value.isprintable():
            raise Unauthenticated("The API key is not one that this server knows; it may have been revoked.")
        if self._tls is None and not is_this_machine(self._server):
            raise Unavailable("The gateway would send the API key on in the clear; connect it to its server with TLS.")
        return [(KEY_HEADER, value)]


async def _typed(rpc: Awaitable[T]) -> T:
    """The call's response. Raises ServeError, with the server's sentence if it sent one."""
    try:
        return await rpc
    except grpc.aio.AioRpcError as failure:
        if (said := error_of_call(failure)) is not None:
            raise said from None
        # gRPC's own details name internal addresses.
        sentence = {
            grpc.StatusCode.DEADLINE_EXCEEDED: "The deadline passed before there was an answer.",
            grpc.StatusCode.UNAVAILABLE: "The gateway does not reach its server; try again in a moment.",
            grpc.StatusCode.RESOURCE_EXHAUSTED: "The request is larger than the server takes.",
        }.get(failure.code(), "The server failed on this request; its log says why.")
        raise error_of(failure.code(), sentence) from None


async def _while_there(request: Request, call: Awaitable[T]) -> T:
    """The call's response; cancels the call and raises Cancelled if the HTTP caller disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(call), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("The caller has gone.")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _parent_in(request: Request) -> list[tuple[str, str]]:
    names = ("traceparent", "tracestate")
    return [(name, request.headers[name]) for name in names if request.headers.get(name, "\n").isprintable()]


@contextlib.contextmanager
def _sendable() -> Any:
    """Turns protobuf's errors into InvalidRequest."""
    try:
        yield
    except (UnicodeEncodeError, ValueError):
        raise InvalidRequest(
            "A field holds a character that UTF-8 cannot carry, or a number out of its range."
        ) from None


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return _error_response(error)


def _error_response(error: ServeError) -> Response:
    body = error_out(error)
    headers = {}
    if error.retry_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_seconds)))
    if body.code == "UNAUTHENTICATED":
        headers["www-authenticate"] = KEY_SCHEME.strip()
    return JSONResponse(Failure(error=body).model_dump(), HTTP_STATUS.get(body.code, 500), headers)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Names the path of the wrong field and what it must be; repeats neither its value nor an unknown field's name."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = ""
    for part in first["loc"][1:]:
        if part not in INPUT_TAGS:
            path += f"[{part}]" if isinstance(part, int) else str(part) if part in _FIELDS else "(unknown)"
    if first["type"] == "json_invalid":
        sentence, path = "The body is not valid JSON.", ""
    elif first["type"] == "extra_forbidden":
        sentence, path = f"The body has an unknown field; the fields are: {', '.join(sorted(_FIELDS))}.", ""
    elif first["type"] == "missing":
        sentence = f"The field `{path or 'body'}` is missing."
    else:
        said = str(first["msg"])
        sentence = f"The field `{path or 'body'}` is wrong: {said[:1].lower()}{said[1:]}."
    return await _answer_error(request, InvalidRequest(sentence, field=path))


async def _answer_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        400: "The body cannot be read as JSON in UTF-8.",
        404: "No route has this path; /docs lists the routes.",
        405: "This route does not take this method.",
    }
    code = {404: "NOT_FOUND", 405: "UNIMPLEMENTED"}.get(error.status_code, "INVALID_ARGUMENT")
    body = ErrorOut(
        code=code,
        reason=code,
        message=known.get(error.status_code, "The request is not valid."),
    )
    return JSONResponse(Failure(error=body).model_dump(), error.status_code, error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    log_failure("The gateway failed on a request", error)
    return await _answer_error(request, InternalError("The gateway failed on this request; its log says why."))


class _Limit:
    """Middleware that bounds the calls and bytes in flight, and the size of a body.

    Bytes are counted as they are read, whatever the headers say. Health and metrics are always answered.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], metrics: CallMetrics, max_calls: int, max_bytes: int
    ) -> None:
        self._app, self._metrics = app, metrics
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls = self._bytes = 0
        metrics.in_flight_calls.set_function(lambda: self._calls)
        metrics.in_flight_bytes.set_function(lambda: self._bytes)

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        read = 0
        started = False

        async def counted() -> Scope:
            nonlocal read
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            self._bytes += size
            if read > MAX_MESSAGE_BYTES:
                raise _Refused(_too_large())
            if self._bytes > self._max_bytes:
                raise self._too_much(f"bodies of {self._max_bytes} bytes", "TOO_MANY_BYTES")
            return message

        async def sent(message: Scope) -> None:
            nonlocal started
            started = True
            await send(message)

        self._calls += 1
        try:
            if self._calls > self._max_calls:
                raise self._too_much(f"{self._max_calls} calls", "TOO_MANY_CALLS")
            declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
            if declared.isdigit() and int(declared) > MAX_MESSAGE_BYTES:
                raise _Refused(_too_large())
            await self._app(scope, counted, sent)
        except _Refused as refused:
            if started:
                raise
            await refused.response(scope, receive, send)
        finally:
            self._calls -= 1
            self._bytes -= read

    def _too_much(self, what: str, reason: str) -> _Refused:
        error = Overloaded(
            f"The gateway has its limit of {what} in flight; try again in a moment.",
            retry_seconds=RETRY_SECONDS,
            reason=reason,
        )
        self._metrics.ended("HTTP", code_of(error).name, 0.0, reason, "", {}, {})
        return _Refused(_error_response(error))


def _too_large() -> Response:
    sentence = f"The body is larger than {MAX_MESSAGE_BYTES} bytes, the limit of a request."
    error = ErrorOut(code="INVALID_ARGUMENT", reason="TOO_LARGE", message=sentence)
    return JSONResponse(Failure(error=error).model_dump(), 413, {"connection": "close"})


class _Refused(BaseException):
    """Carries a refusal past the exception handlers; not an Exception, so that none of them answers it."""

    def __init__(self, response: Response) -> None:
        self.response = response
