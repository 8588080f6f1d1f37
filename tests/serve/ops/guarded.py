"""A guarded gRPC server whose service computes nothing, and certificates for it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from classer.serve.ops.operations import Operations, OperationsConfig
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import (
    ClassifierServicer,
    ModelAdminServicer,
    add_ClassifierServicer_to_server,
    add_ModelAdminServicer_to_server,
)
from classer.serve.rpc.lifecycle import Lifecycle
from classer.serve.wire.errors import Overloaded, UnknownTask
from classer.serve.wire.status import to_status

TIMEOUT = 30.0


class Null(ClassifierServicer, ModelAdminServicer):
    """Answers at once, unless the text says otherwise: "hold" waits, "full" is refused, "bug" raises."""

    def __init__(self) -> None:
        self.calls = Lifecycle(ready=True)
        self.release = asyncio.Event()
        self.seen: list[str] = []

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        with self.calls.call():
            self.seen.append(request.text)
            if request.options.task == "none":
                raise UnknownTask("This model has no task of the name given; it has: topic.")
            if request.text == "hold":
                await self.release.wait()
            if request.text == "full":
                raise Overloaded("Full.", retry_seconds=0.7)
        if request.text.startswith("bug"):
            raise ValueError(request.text)
        return response()

    async def ClassifyBatch(self, request: pb.ClassifyBatchRequest, context: Any) -> pb.ClassifyBatchResponse:
        items = [
            pb.ClassifyBatchItem(error=to_status(Overloaded("Full.", retry_seconds=0.7)))
            if text == "full"
            else pb.ClassifyBatchItem(response=response())
            for text in request.text_batch.texts or [one.text for one in request.request_batch.requests]
        ]
        return pb.ClassifyBatchResponse(items=items)

    async def ClassifyStream(
        self, requests: AsyncIterator[pb.ClassifyBatchRequest], context: Any
    ) -> AsyncIterator[pb.ClassifyBatchResponse]:
        async for request in requests:
            yield await self.ClassifyBatch(request, context)

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        task = pb.Task(name="topic", kind=pb.TASK_KIND_MULTICLASS, num_labels=2, model="null", model_version="v1")
        return pb.ListTasksResponse(tasks=[task])

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[model()])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        return model()

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        return pb.UnloadModelResponse()


def model() -> pb.Model:
    return pb.Model(
        name="null",
        version="v1",
        is_default=True,
        state=pb.MODEL_STATE_READY,
        precision=pb.PRECISION_INT8,
        max_length=64,
        focuses=["1"],
        tasks=[pb.Task(name="topic", kind=pb.TASK_KIND_MULTICLASS, num_labels=1, labels=[pb.TaskLabel(label="sport")])],
        programs=[pb.Program(bucket=16, batch_size=1, run_duration=datetime.timedelta(milliseconds=3))],
        load_time=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    )


def response() -> pb.ClassifyResponse:
    return pb.ClassifyResponse(
        task="topic",
        labels=[pb.ScoredLabel(label="sport", score=0.75, chosen=True), pb.ScoredLabel(label="food", score=0.25)],
        tokens=5,
        queue_duration=datetime.timedelta(milliseconds=2),
        compute_duration=datetime.timedelta(milliseconds=1),
        model_version="v1",
        focus="0.5",
        precision=pb.PRECISION_INT8,
    )


class Guarded:
    """A running one.

    Attributes:
      address: of both its services.
      null: what answers.
      operations: what guards it.
    """

    def __init__(self, config: OperationsConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self.call(self._start(config))
        except BaseException:
            self._end()
            raise

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT)

    async def _start(self, config: OperationsConfig) -> None:
        self.operations = Operations(config)
        self._server = self.operations.make_server()
        self.address = f"localhost:{self.operations.add_port(self._server, 'localhost:0')}"
        self.null, self.health = Null(), health_aio.HealthServicer()
        add_ClassifierServicer_to_server(self.null, self._server)
        add_ModelAdminServicer_to_server(self.null, self._server)
        add_HealthServicer_to_server(self.health, self._server)
        await self.say_ready(True)
        await self._server.start()

    async def say_ready(self, ready: bool) -> None:
        status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        await self.health.set("classer.v1.Classifier", status)

    def stop(self) -> None:
        self.call(self._server.stop(0))
        self.operations.close()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()


@contextlib.contextmanager
def guarded(**fields: Any) -> Iterator[Guarded]:
    """Starts one with these fields of `OperationsConfig`."""
    running = Guarded(OperationsConfig(**fields))
    try:
        yield running
    finally:
        running.stop()


def write_certificates(folder: Path) -> None:
    """Writes ca.pem; server.pem for localhost, client.pem for "team-a"; each with its NAME.key; and stranger.pem, of
    another authority."""
    authority, authority_key = _certificate("test authority", None, None)
    other, other_key = _certificate("another authority", None, None)
    _write(folder / "ca.pem", authority, authority_key)
    for name, subject, signer in (
        ("server", "localhost", (authority, authority_key)),
        ("client", "team-a", (authority, authority_key)),
        ("stranger", "team-a", (other, other_key)),
    ):
        _write(folder / f"{name}.pem", *_certificate(subject, *signer))


def _certificate(subject: str, issuer: x509.Certificate | None, issuer_key: Any) -> tuple[x509.Certificate, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(key if issuer_key is None else issuer_key, hashes.SHA256())
    )
    return certificate, key


def _write(path: Path, certificate: x509.Certificate, key: Any) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
