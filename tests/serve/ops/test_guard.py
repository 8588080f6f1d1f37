"""The guard on a real port: TLS, keys, limits, logs, metrics and traces; the service behind it computes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import json
import logging
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest

from classer.data.errors import ClasserError, InputError
from classer.serve.client.client import (
    AsyncClient,
    Client,
    InternalError,
    InvalidRequest,
    Overloaded,
    Tls,
    Unavailable,
    UnknownTask,
)
from classer.serve.ops import guard as guard_module
from classer.serve.ops.guard import Guard
from classer.serve.ops.keys import make_key, write_keys
from classer.serve.ops.log import JsonFormatter, access_logger, audit_logger
from classer.serve.ops.operations import OperationsConfig
from classer.serve.ops.security import aio_channel, sync_channel
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub, ModelAdminStub, add_ModelAdminServicer_to_server
from classer.serve.rpc.frontend import FrontEnd, FrontEndConfig
from classer.serve.wire.errors import Forbidden, Unauthenticated
from classer.serve.wire.status import error_of, error_of_call
from classer.tests.processes import Process

from .guarded import TIMEOUT, Guarded, guarded, write_certificates

SECRET_TEXT = "my mother's maiden name"


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def metrics_of(running: Guarded) -> dict[str, float]:
    assert running.operations.metrics_port is not None
    return metrics_at(running.operations.metrics_port)


def metrics_at(port: int) -> dict[str, float]:
    """Every sample by its name with labels, as Prometheus would read it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_a_refused_call_leaves_nothing_to_the_garbage_collector() -> None:
    with guarded() as running, Client(running.address) as client:
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(Overloaded, match="Full"):
                    client.classify("full")
            assert eventually(lambda: not any(isinstance(one, guard_module._Call) for one in gc.get_objects()))
        finally:
            gc.enable()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    for name in ("server.pem", "server.key"):
        lines = (folder / name).read_text().splitlines()
        damaged = [lines[0], *lines[2:-3], lines[-1]]
        (folder / name.replace("server", "damaged")).write_text("\n".join(damaged) + "\n")
    locked = (folder / "server.key").read_text().replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    (folder / "locked.key").write_text(locked)
    return folder


def test_tls_answers_those_who_trust_it_and_nobody_in_the_clear(certificates: Path) -> None:
    files = {"tls_cert": certificates / "server.pem", "tls_key": certificates / "server.key"}
    with guarded(**files) as running:
        with Client(running.address, tls=Tls(ca=certificates / "ca.pem")) as client:
            assert client.classify("a").best.label == "sport"
            assert client.healthy()

        async def ask() -> str:
            async with AsyncClient(running.address, tls=Tls(ca=certificates / "ca.pem")) as client:
                return (await client.classify("a")).best.label

        assert asyncio.run(ask()) == "sport"
        for tls, says in (
            (None, "expect TLS"),
            (Tls(ca=certificates / "stranger.pem"), "authority that is not trusted here.*--tls-ca"),
        ):
            with Client(running.address, tls=tls) as client, pytest.raises(Unavailable, match=says):
                client.classify("a", timeout=3)


def test_a_tls_client_of_a_server_without_tls_is_told(certificates: Path) -> None:
    trusting = Tls(ca=certificates / "ca.pem")
    with guarded() as running, Client(running.address, tls=trusting) as client:
        with pytest.raises(Unavailable) as error:
            client.classify("a", timeout=3)
        assert "does not speak TLS" in str(error.value)


def test_mutual_tls_answers_certified_clients_only(certificates: Path, caplog) -> None:
    names = ("server.pem", "server.key", "ca.pem")
    files = dict(zip(("tls_cert", "tls_key", "tls_client_ca"), (certificates / name for name in names), strict=True))
    ca = certificates / "ca.pem"
    with guarded(**files) as running, caplog.at_level(logging.INFO, access_logger.name):
        with Client(running.address, tls=Tls(certificates / "client.pem", certificates / "client.key", ca)) as client:
            assert client.classify("a").best.label == "sport"
        assert caplog.records[-1].__dict__["fields"]["identity"] == "team-a"
        for tls in (Tls(ca=ca), Tls(certificates / "stranger.pem", certificates / "stranger.key", ca)):
            with Client(running.address, tls=tls) as client, pytest.raises(Unavailable):
                client.classify("a", timeout=3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tls_cert": "server.pem"}, "without its private key"),
        ({"tls_client_ca": "ca.pem"}, "needs --tls-cert"),
        ({"tls_cert": "server.pem", "tls_key": "server.pem"}, "holds no private key"),
        ({"tls_cert": "none.pem", "tls_key": "server.key"}, "none.pem cannot be read"),
        ({"tls_cert": "server.pem", "tls_key": "client.key"}, "client.key is not the private key of .*server.pem"),
        ({"tls_cert": "damaged.pem", "tls_key": "server.key"}, "damaged.pem holds a certificate that cannot be read"),
        ({"tls_cert": "server.pem", "tls_key": "damaged.key"}, "damaged.key holds a private key that cannot be read"),
        ({"tls_cert": "server.pem", "tls_key": "locked.key"}, "locked.key is encrypted"),
        ({"keys": "server.pem"}, "not valid JSON"),
    ],
)
def test_bad_files_are_refused_with_a_sentence(certificates: Path, fields: dict[str, str], says: str) -> None:
    config = OperationsConfig(**{name: certificates / file for name, file in fields.items()})  # pyright: ignore
    with pytest.raises(InputError, match=says):
        Guarded(config).stop()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ca": "none.pem"}, "none.pem cannot be read"),
        ({"ca": "damaged.pem"}, "damaged.pem holds a certificate that cannot be read"),
        ({"ca": "server.key"}, "holds no certificate"),
        ({"cert": "client.pem"}, "without its private key"),
        ({"cert": "client.pem", "key": "server.key"}, "server.key is not the private key of .*client.pem"),
    ],
)
def test_a_clients_bad_tls_files_are_refused_with_a_sentence(
    certificates: Path, fields: dict[str, str], says: str
) -> None:
    files = {name: certificates / file for name, file in fields.items()}
    with pytest.raises(ClasserError, match=says):
        Client(tls=Tls(**files))

    async def connect() -> None:
        AsyncClient(tls=Tls(**files))

    with pytest.raises(ClasserError, match=says):
        asyncio.run(connect())


# Keys


@pytest.fixture
def key_file(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A key file, and its keys by name."""
    made = {"any": make_key("any"), "slow": make_key("slow", rate=3), "root": make_key("root", admin=True)}
    write_keys(tmp_path / "keys.json", [entry for entry, _ in made.values()])
    return tmp_path / "keys.json", {name: key for name, (_, key) in made.items()}


def test_only_keys_open_the_service_and_health_needs_none(key_file) -> None:
    path, keys = key_file
    with guarded(keys=path) as running:
        with Client(running.address, key=keys["any"]) as client:
            assert client.classify("a").best.label == "sport"
            assert len(client.classify_batch(["a", "b"])) == 2

        async def ask() -> str:
            async with AsyncClient(running.address, key=keys["any"]) as client:
                return (await client.classify("a")).best.label

        assert asyncio.run(ask()) == "sport"
        asked = len(running.null.seen)
        for key in (None, keys["any"][:-1] + "?"):
            with Client(running.address, key=key) as client:
                assert client.healthy()
                with pytest.raises(Unauthenticated) as refused:
                    client.classify("a" * 5_000_000)
                assert "authorization" in str(refused.value) if key is None else "revoked" in str(refused.value)
        assert len(running.null.seen) == asked


def test_a_key_s_rate_refuses_calls_and_slows_streams(key_file) -> None:
    path, keys = key_file
    with guarded(keys=path, metrics_port=0) as running, sync_channel(running.address, [], key=keys["slow"]) as channel:
        stub = ClassifierStub(channel)
        stub.ClassifyBatch(pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a"] * 4)), timeout=TIMEOUT)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Classify(pb.ClassifyRequest(text="a"), timeout=TIMEOUT)
        error: Any = refused.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 texts a second" in error.details()
        refusals = 'classer_refusals_total{reason="RATE_LIMITED"}'
        assert eventually(lambda: metrics_of(running).get(refusals) == 1)
        with Client(running.address, key=keys["slow"]) as client, pytest.raises(Overloaded) as limited:
            client.classify("a")
        assert limited.value.reason == "RATE_LIMITED"
        assert limited.value.retry_seconds is not None
        # A stream is not refused: it is read as fast as its key may ask.
        requests = [pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a"]))] * 3
        assert len(list(stub.ClassifyStream(iter(requests), timeout=TIMEOUT))) == 3
        assert metrics_of(running)['classer_key_texts_total{key="slow"}'] == 7


def test_models_are_changed_by_admin_keys_only_and_each_try_is_audited(key_file, caplog) -> None:
    path, keys = key_file
    request = pb.UnloadModelRequest(name=SECRET_TEXT, version="1")
    with guarded(keys=path) as running, caplog.at_level(logging.INFO, audit_logger.name):
        for name, code in (("root", None), ("any", grpc.StatusCode.PERMISSION_DENIED)):
            with sync_channel(running.address, [], key=keys[name]) as channel:
                if code is None:
                    ModelAdminStub(channel).UnloadModel(request, timeout=TIMEOUT)
                    continue
                with pytest.raises(grpc.RpcError) as refused:
                    ModelAdminStub(channel).UnloadModel(request, timeout=TIMEOUT)
                error: Any = refused.value
                assert isinstance(error_of(error.code(), error.details()), Forbidden)
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == audit_logger.name]
    assert [(line["key"], line["method"], line["code"]) for line in lines] == [
        ("root", "UnloadModel", "OK"),
        ("any", "UnloadModel", "PERMISSION_DENIED"),
    ]
    assert all(line["peer"] for line in lines)


def test_the_audit_line_names_what_was_changed_and_repeats_nothing_else(monkeypatch, caplog) -> None:
    from classer.serve.rpc import admin

    class Models:
        """Two bundles; of `tickets` version v1 is loaded, and v2 is what loading gives."""

        folders: ClassVar = {"tickets": Path("a"), "intents": Path("b")}

        def __iter__(self) -> Iterator[Any]:
            return iter([SimpleNamespace(name="tickets", version="v1")])

        async def load(self, bundle: str, name: str, **_: Any) -> Any:
            if bundle not in self.folders:
                raise UnknownTask("There is no bundle of the name given; there are: intents, tickets.")
            return SimpleNamespace(name=name or bundle, version="v2")

        def unload(self, name: str, version: str) -> None: ...

        def set_default(self, name: str, version: str) -> None: ...

    async def change() -> None:
        service = admin.ModelAdminService(Models())  # pyright: ignore[reportArgumentType]
        service.calls.ready = True
        server = grpc.aio.server(interceptors=[Guard()])
        add_ModelAdminServicer_to_server(service, server)
        port = server.add_insecure_port("localhost:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
            stub: Any = ModelAdminStub(channel)
            await stub.LoadModel(pb.LoadModelRequest(bundle="intents", name="tickets"))
            await stub.LoadModel(pb.LoadModelRequest(bundle="intents"))
            with pytest.raises(grpc.RpcError, match="no bundle of the name"):
                await stub.LoadModel(pb.LoadModelRequest(bundle=SECRET_TEXT, name="tickets"))
            await stub.SetDefaultVersion(pb.SetDefaultVersionRequest(name="tickets", version="v1"))
            await stub.UnloadModel(pb.UnloadModelRequest(name=SECRET_TEXT, version=SECRET_TEXT))
            await stub.ListBundles(pb.ListBundlesRequest())
        await server.stop(0)

    monkeypatch.setattr(admin, "model_message", lambda *_, **__: pb.Model())
    with caplog.at_level(logging.INFO, audit_logger.name):
        asyncio.run(change())
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == audit_logger.name]
    names = ("bundle", "model", "version")
    assert [(line["method"], *(line.get(name) for name in names)) for line in lines] == [
        ("LoadModel", "intents", "tickets", "v2"),
        ("LoadModel", "intents", "intents", "v2"),
        ("LoadModel", "unknown", "tickets", None),
        ("SetDefaultVersion", None, "tickets", "v1"),
        ("UnloadModel", None, "unknown", "unknown"),
        ("ListBundles", None, None, None),
    ]
    assert SECRET_TEXT not in str(lines)


def test_a_key_does_not_leave_the_machine_in_the_clear() -> None:
    for make in (sync_channel, aio_channel):
        with pytest.raises(InvalidRequest, match="in the clear"):
            make("classer.example.org:50051", [], key="ck_a_b")
    with pytest.raises(InvalidRequest, match="no key has"):
        Client("localhost:1", key="a\nb")


# Limits


def test_calls_beyond_what_may_be_in_flight_are_refused_unread(tmp_path: Path) -> None:
    with guarded(max_in_flight=2, metrics_port=0) as running, Client(running.address) as client:
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(client.classify, "hold", timeout=TIMEOUT) for _ in range(2)]
            assert eventually(lambda: running.null.seen == ["hold", "hold"])
            assert metrics_of(running)["classer_in_flight_calls"] == 2
            with pytest.raises(Overloaded, match="2 calls at a time"):
                client.classify("a")
            assert client.healthy()
            running._loop.call_soon_threadsafe(running.null.release.set)
            assert [one.result(TIMEOUT).best.label for one in held] == ["sport", "sport"]
        assert client.classify("a")
        assert running.null.seen == ["hold", "hold", "a"]
        assert metrics_of(running)["classer_in_flight_calls"] == 0
        assert metrics_of(running)["classer_in_flight_bytes"] == 0


def test_calls_beyond_what_may_wait_to_be_read_are_refused_meanwhile() -> None:
    """By gRPC, for the event loop does nothing then."""
    with guarded(max_pending=4) as running, Client(running.address) as client, ThreadPoolExecutor(20) as pool:
        assert client.classify("a")
        done = threading.Event()
        running._loop.call_soon_threadsafe(done.wait)
        calls = [pool.submit(client.classify, f"{i}", timeout=TIMEOUT) for i in range(20)]
        refused = eventually(lambda: sum(call.done() for call in calls) >= 15)
        done.set()  # before anything can fail: nothing else ends the wait
        assert refused
        errors = [error for call in calls if (error := call.exception(TIMEOUT)) is not None]
        assert 15 <= len(errors) < 20
        for error in errors:
            assert isinstance(error, Overloaded)
            assert (error.reason, error.retry_seconds) == ("TOO_MANY_PENDING", 0.1)
            assert "wait to be read" in str(error)
        assert len(running.null.seen) == 1 + 20 - len(errors)
        assert client.classify("a")


def test_bytes_beyond_what_may_be_in_flight_are_refused() -> None:
    with guarded(max_in_flight_mb=1.0) as running, Client(running.address) as client:
        assert client.classify("a" * 900_000)
        with pytest.raises(Overloaded, match="takes on 1000000"):
            client.classify("a" * 1_100_000)
        with sync_channel(running.address, []) as channel:  # a stream's messages count while they are not answered
            requests = [pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a" * 600_000]))] * 4
            assert len(list(ClassifierStub(channel).ClassifyStream(iter(requests), timeout=TIMEOUT))) == 4
        assert client.classify("a" * 900_000)


def test_cancelled_calls_give_their_place_back() -> None:
    with guarded(max_in_flight=3, metrics_port=0) as running, Client(running.address) as client:
        for _ in range(5):
            with pytest.raises(Exception, match="did not answer within"):
                client.classify("hold", timeout=0.05)
        assert eventually(lambda: metrics_of(running)["classer_in_flight_calls"] == 0)
        samples = metrics_of(running)
        ended = [
            samples.get(f'classer_calls_total{{code="{c}",method="Classify"}}', 0)
            for c in ("CANCELLED", "DEADLINE_EXCEEDED")
        ]
        assert sum(ended) == 5


def test_a_connection_that_breaks_in_the_middle_of_a_message_is_unavailable() -> None:
    """As grpc.aio has it, from a channel whose front end was killed."""
    broken = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details="Internal error from Core"
    )
    assert isinstance(error_of_call(broken), Unavailable)
    said = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details="A fault.")
    assert error_of_call(said) is None


# What is written down


@dataclasses.dataclass
class Written:
    stream: io.StringIO

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def written() -> Iterator[Written]:
    """What the server logs as JSON, access lines included."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger("classer")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield Written(stream)
    root.removeHandler(handler)
    root.setLevel(level)


def test_neither_texts_nor_keys_are_logged_or_said_again(key_file, written: Written) -> None:
    """In answers, refusals and failures alike, one of them a bug whose message is the text."""
    path, keys = key_file
    said = []
    with guarded(keys=path, metrics_port=0) as running:
        with Client(running.address, key=keys["any"]) as client:
            client.classify(SECRET_TEXT)
            for text, task, error in (
                (SECRET_TEXT, "none", UnknownTask),
                (f"bug {SECRET_TEXT}", None, InternalError),
                ("full", None, Overloaded),
            ):
                with pytest.raises(error) as refused:
                    client.classify(text, task)
                said.append(str(refused.value))
        with (
            Client(running.address, key="ck_nobody_" + keys["any"]) as client,
            pytest.raises(Unauthenticated) as refused,
        ):
            client.classify(SECRET_TEXT)
        said.append(str(refused.value))
        said += list(metrics_of(running))
    codes = [line["code"] for line in written.lines if line["logger"] == "classer.access"]
    assert codes == ["OK", "NOT_FOUND", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"]
    first = next(line for line in written.lines if line["logger"] == "classer.access")
    assert (first["method"], first["key"], first["texts"]) == ("Classify", "any", 1)
    for text in [written.stream.getvalue(), *said]:
        assert SECRET_TEXT not in text
        assert keys["any"].split("_", 2)[2] not in text
    assert "ValueError" in written.stream.getvalue()  # the bug's kind and place, so that someone can find it


def test_calls_are_counted_by_method_status_reason_and_stage() -> None:
    with guarded(metrics_port=0) as running, Client(running.address) as client:
        for _ in range(3):
            client.classify("a")
        client.classify_batch(["a", "full", "b"])
        with pytest.raises(Overloaded) as refused:
            client.classify("full")
        assert str(refused.value) == "Full."
        assert eventually(lambda: 'classer_refusals_total{reason="OVERLOADED"}' in metrics_of(running))
        samples = metrics_of(running)
        client.classify_batch(["full", "full"])  # an answered call, though none of its texts was
        assert eventually(lambda: metrics_of(running)['classer_refused_texts_total{reason="OVERLOADED"}'] == 3)
    assert samples['classer_calls_total{code="OK",method="Classify"}'] == 3
    assert samples['classer_calls_total{code="RESOURCE_EXHAUSTED",method="Classify"}'] == 1
    assert samples['classer_refusals_total{reason="OVERLOADED"}'] == 1
    assert samples['classer_refused_texts_total{reason="OVERLOADED"}'] == 1
    assert samples['classer_texts_total{code="OK"}'] == 5
    assert samples['classer_texts_total{code="RESOURCE_EXHAUSTED"}'] == 1
    assert samples['classer_call_seconds_count{method="Classify"}'] == 4
    assert samples['classer_stage_seconds_count{stage="queue"}'] == 4
    assert samples['classer_stage_seconds_sum{stage="queue"}'] == pytest.approx(4 * 0.002)
    assert samples['classer_stage_seconds_sum{stage="compute"}'] == pytest.approx(4 * 0.001)
    assert samples["process_resident_memory_bytes"] > 1e6


def test_a_call_s_span_is_its_caller_s_child(monkeypatch) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from classer.serve.ops import operations
    from classer.serve.ops.tracing import Tracing

    exporter = InMemorySpanExporter()
    monkeypatch.setattr(operations, "Tracing", lambda endpoint, service: Tracing(endpoint, service, exporter))
    with guarded(trace_endpoint="http://localhost:1") as running, Client(running.address) as client:
        tracer = TracerProvider().get_tracer("caller")
        with tracer.start_as_current_span("caller") as caller:
            client.classify("a")
            with pytest.raises(Overloaded):
                client.classify("full")
        client.classify("a")
    first, second, alone = exporter.get_finished_spans()
    for span in (first, second):
        assert span.parent is not None
        assert span.context is not None
        assert span.parent.span_id == caller.get_span_context().span_id
        assert span.context.trace_id == caller.get_span_context().trace_id
    assert alone.parent is None
    assert first.name == "classer.v1.Classifier/Classify"
    assert first.kind is trace.SpanKind.SERVER
    assert first.attributes is not None
    assert first.attributes["classer.queue"] == pytest.approx(0.002)
    assert first.attributes["rpc.response.status_code"] == "OK"
    assert second.status.status_code is trace.StatusCode.ERROR


# Front ends


def test_a_front_end_reaches_an_engine_over_tls_with_a_key_of_its_own(key_file, certificates, monkeypatch) -> None:
    path, keys = key_file
    monkeypatch.setenv("ENGINE_KEY", keys["any"])
    server = {"tls_cert": certificates / "server.pem", "tls_key": certificates / "server.key", "keys": path}

    async def ask(config: FrontEndConfig) -> list[Any]:
        front_end = FrontEnd(config)
        await front_end.start()
        async with AsyncClient(front_end.address) as client:
            await client.wait_until_healthy(TIMEOUT)
            found = [await client.classify("a"), *await client.classify_batch(["a"])]
            found += [outcome async for outcome in client.classify_stream(["a"])]
        await front_end.stop()
        return found

    with guarded(**server) as engine:
        config = FrontEndConfig(
            engine.address, port=0, engine_tls_ca=certificates / "ca.pem", engine_key_env="ENGINE_KEY"
        )
        assert FrontEndConfig.from_json(json.dumps(dataclasses.asdict(config), default=str)) == config
        assert [one.best.label for one in asyncio.run(ask(config))] == ["sport"] * 3
    with pytest.raises(InputError, match="that is not set"):
        asyncio.run(ask(dataclasses.replace(config, engine_key_env="NO_SUCH_KEY")))


def test_a_front_end_refuses_what_is_no_message_with_a_sentence(key_file, caplog) -> None:
    """In a call and in a stream, whose other refusals come through too; none of them is a failure of the server's."""
    path, keys = key_file

    async def ask(engine: str) -> list[Any]:
        front_end = FrontEnd(FrontEndConfig(engine, port=0, operations=OperationsConfig(keys=path, max_in_flight_mb=1)))
        await front_end.start()
        batch = pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a"])).SerializeToString()
        large = pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a" * 1_100_000])).SerializeToString()
        found = []
        async with aio_channel(front_end.address, [], key=keys["any"]) as channel:
            unary: Any = channel.unary_unary("/classer.v1.Classifier/ClassifyBatch")
            stream: Any = channel.stream_stream("/classer.v1.Classifier/ClassifyStream")

            async def once(message: bytes) -> None:
                await unary(message, timeout=TIMEOUT)

            async def streamed(message: bytes) -> None:
                async for _ in stream(iter([batch, message]), timeout=TIMEOUT):
                    pass

            for message in (b"\xff", large):
                for send in (once, streamed):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await send(message)
                    found.append((refused.value.code().name, refused.value.details()))
        await front_end.stop()
        return found

    with guarded() as engine:
        found = asyncio.run(ask(engine.address))
    assert [code for code, _ in found] == ["INVALID_ARGUMENT"] * 2 + ["RESOURCE_EXHAUSTED"] * 2
    assert all("bytes sent are no request of Classify" in sentence for _, sentence in found[:2])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_front_end_guards_as_a_server_does(key_file) -> None:
    """Keys, rates and metrics hold for calls that it gathers and for those that it hands on as bytes."""
    path, keys = key_file
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    operations = OperationsConfig(keys=path, metrics_port=metrics_port)
    with guarded() as engine:
        config = FrontEndConfig(engine.address, port=0, operations=operations)
        text = json.dumps(dataclasses.asdict(config), default=str)
        assert FrontEndConfig.from_json(text) == config
        with Process([sys.executable, "-m", "classer.serve.rpc.frontend", text]) as process:
            address = process.stdout.line().split()[-1]
            with Client(address, key=keys["any"]) as client:
                client.wait_until_healthy(TIMEOUT)
                assert client.classify("a").best.label == "sport"
                assert len(client.classify_batch(["a", "full", "b"])) == 3
            with Client(address) as client, pytest.raises(Unauthenticated):
                client.classify_batch(["a"])
            with sync_channel(address, [], key=keys["slow"]) as channel:
                stub = ClassifierStub(channel)
                assert (
                    len(
                        stub.ClassifyBatch(
                            pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a"] * 9)), timeout=TIMEOUT
                        ).items
                    )
                    == 9
                )
                with pytest.raises(grpc.RpcError, match="3 texts a second"):
                    stub.ClassifyBatch(pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a"])), timeout=TIMEOUT)
            samples = metrics_at(metrics_port)
            assert samples['classer_key_texts_total{key="slow"}'] == 9
            assert samples['classer_texts_total{code="RESOURCE_EXHAUSTED"}'] == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
