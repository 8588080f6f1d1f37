"""A front end: a light process that accepts and checks calls, and forwards them to the engine's process in batches.

It speaks the same protocol on both sides, so that it may also run on another machine. A unary call is forwarded at once
if no batch is under way; else the calls of two milliseconds are forwarded together. Loads neither JAX nor TensorFlow.

`python -m classer.serve.rpc.frontend JSON` with the fields of `FrontEndConfig`; it ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_health.v1.health_pb2 import HealthCheckResponse as Health
from grpc_reflection.v1alpha import reflection

from ...data.errors import InputError
from ..core.tokenizing import length_error
from ..ops.listening import bind_server, run_loop
from ..ops.log import configure_logging
from ..ops.operations import Operations, OperationsConfig
from ..ops.security import Tls, aio_channel
from ..proto import classifier_pb2 as pb
from ..wire.errors import Overloaded, ServeError
from ..wire.limits import MAX_TEXTS, RETRY_SECONDS
from ..wire.status import error_of, error_of_call, from_status
from .lifecycle import Lifecycle, stop_signal

CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"]
# While a batch is in flight, unary calls are gathered up to this time or number: a call between processes costs as much
# as several requests in one call.
GATHER_SECONDS = 0.002
GATHER_REQUESTS = 64
# Bytes of queued requests at most; more are refused.
MAX_WAITING_BYTES = 64 << 20
# Bytes at which a batch is full. With the largest request (4 MB of text) on top it is still below the message limit.
MAX_BATCH_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class FrontEndConfig:
    """How to run a front end.

    Attributes:
      engine: the address of the engine's process: HOST:PORT, or unix:PATH.
      host: the address to listen on; the default is reachable from this machine only.
      port: the port to listen on; 0 picks a free one. The line printed names it.
      drain_seconds: seconds that requests in flight may take after SIGTERM or SIGINT.
      shared: whether other front ends listen on the same port.
      share: this front end's share of each key's rate and quota, above 0 and at most 1.
      engine_tls_ca: connect to the engine with TLS, trusting these authorities, PEM.
      engine_tls_cert: a certificate to present to the engine, PEM; for mutual TLS.
      engine_tls_key: the private key of --engine-tls-cert, PEM.
      engine_key_env: the environment variable with this front end's own API key, for an engine that requires one.
        Callers' keys are not forwarded; the front end checks them against --keys.
      operations: TLS, API keys, limits, metrics and logs of the front end.
    """

    engine: str
    host: str = "127.0.0.1"
    port: int = 50051
    drain_seconds: float = 30.0
    shared: bool = False
    share: float = 1.0
    engine_tls_ca: Path | None = None
    engine_tls_cert: Path | None = None
    engine_tls_key: Path | None = None
    engine_key_env: str | None = None
    operations: OperationsConfig = dataclasses.field(default_factory=OperationsConfig)

    @property
    def engine_key(self) -> str | None:
        """The API key for the engine; None without `engine_key_env`. Raises InputError if the variable is not set."""
        if self.engine_key_env is None:
            return None
        if not (key := os.environ.get(self.engine_key_env)):
            raise InputError(f"--engine-key-env is {self.engine_key_env}, an environment variable that is not set.")
        return key

    @classmethod
    def from_json(cls, text: str) -> FrontEndConfig:
        """The reverse of `json.dumps(dataclasses.asdict(config), default=str)`."""
        fields = json.loads(text)
        for name in ("engine_tls_ca", "engine_tls_cert", "engine_tls_key"):
            fields[name] = Path(fields[name]) if fields.get(name) else None
        return cls(**{**fields, "operations": OperationsConfig.from_fields(fields.get("operations", {}))})


class Coalescer:
    """Gathers single requests into batches.

    Args:
      send: classifies a batch, each item with its own outcome; an exception of it fails every item.
    """

    def __init__(self, send: Callable[[pb.ClassifyBatchRequest], Awaitable[pb.ClassifyBatchResponse]]) -> None:
        self._send = send
        self._waiting: collections.deque[tuple[pb.ClassifyRequest, int, asyncio.Future[pb.ClassifyBatchItem]]] = (
            collections.deque()
        )
        self._waiting_bytes = 0
        self._batches: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    async def classify(self, request: pb.ClassifyRequest) -> pb.ClassifyBatchItem:
        """The outcome of one request.

        If it is cancelled before its batch is sent, it is left out; later, its batch is cancelled once all its requests
        are.

        Raises:
          Overloaded: too many bytes are queued already.
        """
        size = request.ByteSize()
        if self._waiting_bytes + size > MAX_WAITING_BYTES:
            raise Overloaded(
                f"The server has {self._waiting_bytes} bytes of requests waiting and takes on {MAX_WAITING_BYTES} at "
                "most; try again in a moment.",
                retry_seconds=RETRY_SECONDS,
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[pb.ClassifyBatchItem] = loop.create_future()
        self._waiting.append((request, size, future))
        self._waiting_bytes += size
        if len(self._waiting) >= GATHER_REQUESTS:
            self._flush()
        elif self._timer is None:
            # At the soonest after this turn of the event loop, so that all its calls go together.
            later = loop.call_later(GATHER_SECONDS, self._flush) if self._batches else loop.call_soon(self._flush)
            self._timer = later
        return await future

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            task = asyncio.get_running_loop().create_task(self._run(*self._take()))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    def _take(self) -> tuple[list[pb.ClassifyRequest], list[asyncio.Future[pb.ClassifyBatchItem]]]:
        requests: list[pb.ClassifyRequest] = []
        futures: list[asyncio.Future[pb.ClassifyBatchItem]] = []
        taken = 0
        while self._waiting and len(requests) < MAX_TEXTS and (not requests or taken < MAX_BATCH_BYTES):
            request, size, future = self._waiting.popleft()
            self._waiting_bytes -= size
            if not future.done():  # else the call was cancelled
                requests.append(request)
                futures.append(future)
                taken += size
        return requests, futures

    async def _run(
        self, requests: list[pb.ClassifyRequest], futures: list[asyncio.Future[pb.ClassifyBatchItem]]
    ) -> None:
        if not requests:
            return
        batch, wanted = asyncio.current_task(), len(futures)

        def done(future: asyncio.Future[pb.ClassifyBatchItem]) -> None:
            nonlocal wanted
            wanted -= future.cancelled()
            if not wanted and batch is not None:
                batch.cancel()

        for future in futures:
            future.add_done_callback(done)
        try:
            message = pb.ClassifyBatchRequest()
            message.request_batch.requests.extend(requests)
            items = (await self._send(message)).items
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, item in zip(futures, items, strict=True):
            if not future.done():
                future.set_result(item)


class FrontEnd:
    """One front end. Made and used on one running event loop.

    Raises:
      InputError: the address cannot be bound, or a file or environment variable cannot be used.
      InvalidRequest: the engine's API key would be sent unencrypted.

    Attributes:
      address: the real "host:port".
    """

    def __init__(self, config: FrontEndConfig) -> None:
        self._config = config
        self._operations = Operations(config.operations, share=config.share)
        self._server = self._operations.make_server(reuse_port=config.shared)
        self.address = bind_server(self._server, config.host, config.port, "--port", add_port=self._operations.add_port)
        tls = Tls.of_files(config.engine_tls_cert, config.engine_tls_key, config.engine_tls_ca)
        # Windows that grow with the traffic would buffer megabytes for a caller that reads no responses.
        options = [("grpc.max_receive_message_length", -1), ("grpc.http2.bdp_probe", 0)]
        self._channel = aio_channel(config.engine, options, tls, config.engine_key)
        batch = self._channel.unary_unary(
            f"/{CLASSIFIER.full_name}/ClassifyBatch",
            request_serializer=pb.ClassifyBatchRequest.SerializeToString,
            response_deserializer=pb.ClassifyBatchResponse.FromString,
        )
        self._coalescer = Coalescer(batch)
        self._health = health_aio.HealthServicer()
        self._calls = Lifecycle(ready=True)
        self._watching: asyncio.Task[None] | None = None
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((CLASSIFIER.full_name, HEALTH_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Starts to listen, and to copy the engine's health."""
        await self._say(Health.NOT_SERVING)
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Refuses new calls, and lets those in flight finish, at most `drain_seconds`."""
        if self._watching is not None:
            self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        await self._calls.stop([self._server], self._config.drain_seconds)
        await self._channel.close()
        self._operations.close()

    def _handlers(self) -> grpc.GenericRpcHandler:
        """The handlers: Classify is gathered, all other methods pass through as bytes."""
        handlers = {}
        for method in CLASSIFIER.methods:
            if method.name == "Classify":
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                    self._classify,
                    request_deserializer=pb.ClassifyRequest.FromString,
                    response_serializer=_serialize,
                )
            elif method.name == "ClassifyStream":
                call = self._channel.stream_stream(f"/{CLASSIFIER.full_name}/{method.name}")
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._stream(call))
            else:
                call = self._channel.unary_unary(f"/{CLASSIFIER.full_name}/{method.name}")
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(self._unary(call))
        return grpc.method_handlers_generic_handler(CLASSIFIER.full_name, handlers)

    async def _classify(self, request: pb.ClassifyRequest, context: grpc.aio.ServicerContext) -> pb.ClassifyResponse:
        with self._calls.call(), _engine_errors():
            if (error := length_error(request.text)) is not None:
                raise error
            if (seconds := context.time_remaining()) is not None:
                options = request.options
                own = options.timeout.ToNanoseconds() / 1e9 if options.HasField("timeout") else math.inf
                options.timeout.FromNanoseconds(max(int(min(own, seconds) * 1e9), 1) if own > 0 else 0)
            item = await self._coalescer.classify(request)
            if item.HasField("error"):
                raise from_status(item.error)
            return item.response

    def _unary(self, call: Any) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]:
        async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            with self._calls.call(), _engine_errors():
                return await call(request, timeout=context.time_remaining())

        return handle

    def _stream(self, call: Any) -> Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext], AsyncIterator[bytes]]:
        async def handle(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            with self._calls.call(), _engine_errors():
                answers = call(requests, timeout=context.time_remaining())
                try:
                    async for response in answers:
                        yield response
                finally:
                    answers.cancel()  # if the caller has gone before the end

        return handle

    async def _watch(self) -> None:
        """Copies the engine's health; NOT_SERVING while the engine does not answer."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    await self._say(answer.status)
            await self._say(Health.NOT_SERVING)
            await asyncio.sleep(RETRY_SECONDS)

    async def _say(self, status: Health.ServingStatus) -> None:
        for name in ("", CLASSIFIER.full_name):
            await self._health.set(name, status)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Re-raises a failed call to the engine as the engine's error."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _error_of(error) from None


def _error_of(failure: grpc.aio.AioRpcError) -> ServeError:
    """The engine's error, or that of the connection to it."""
    if (said := error_of_call(failure)) is not None:
        return said
    code, details = failure.code(), failure.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and not details.startswith("The server"):
        details = "The server's engine does not answer; it is starting, or has ended."
    return error_of(code, details)


def run_front_end(config: FrontEndConfig, *, orphaned: bool = False) -> None:
    """Runs until SIGTERM or SIGINT, then drains and returns. Call it from the main thread.

    Args:
      config: its configuration.
      orphaned: whether to end also when standard input does, which happens when the parent process ends.

    Raises:
      InputError: the address cannot be bound.
    """
    configure_logging(config.operations.log_format, access=config.operations.access_log)
    run_loop(_run(config, orphaned))


async def _run(config: FrontEndConfig, orphaned: bool) -> None:
    stop = stop_signal()
    loop = asyncio.get_running_loop()
    if orphaned:
        loop.add_reader(sys.stdin.fileno(), lambda: stop.set() if not os.read(sys.stdin.fileno(), 1024) else None)
    front_end = FrontEnd(config)
    await front_end.start()
    print(f"Front end of {config.engine} on {front_end.address}", flush=True)
    await stop.wait()
    if orphaned:
        loop.remove_reader(sys.stdin.fileno())
    await front_end.stop()


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


if __name__ == "__main__":
    run_front_end(FrontEndConfig.from_json(sys.argv[1]), orphaned=True)
