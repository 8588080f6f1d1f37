"""The HTTP gateway as it runs: uvicorn on a real port, before a guarded gRPC service that computes nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from classer.data.errors import InputError
from classer.serve.gateway.app import make_app
from classer.serve.gateway.run import GatewayConfig, run_gateway
from classer.serve.ops.keys import make_key, write_keys
from classer.serve.wire.limits import MAX_MESSAGE_BYTES
from classer.tests.processes import Process

from ..ops.guarded import TIMEOUT, Guarded, guarded

SECRET_TEXT = "my mother's maiden name"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


class Gateway:
    """A gateway in a thread, and a plain HTTP client to it."""

    def __init__(self, server: str, **limits: Any) -> None:
        import uvicorn

        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(make_app(server, **limits), log_config=None))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()
        assert eventually(lambda: self._server.started)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """`body` goes as JSON unless it is bytes; `headers` with '-' for '_'."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"content-type": "application/json", **names})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kind = answer.headers.get("content-type", "")
        return Answer(
            answer.status,
            {name.lower(): value for name, value in answer.headers.items()},
            json.loads(content) if "json" in kind else content.decode(),
        )

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT)


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def running() -> Iterator[Guarded]:
    with guarded(max_in_flight=8, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(running: Guarded) -> Iterator[Gateway]:
    gateway = Gateway(running.address)
    yield gateway
    gateway.stop()


def test_it_answers_as_the_service_does(gateway: Gateway) -> None:
    answer = gateway.ask("POST", "/v1/classify", {"input": "a", "top_k": 2})
    assert answer.status == 200
    assert answer.body["task"] == "topic"
    assert answer.body["labels"] == [
        {"label": "sport", "score": 0.75, "chosen": True, "path": []},
        {"label": "food", "score": 0.25, "chosen": False, "path": []},
    ]
    assert (answer.body["queue_duration"], answer.body["compute_duration"], answer.body["tokens"]) == (0.002, 0.001, 5)
    assert (answer.body["focus"], answer.body["precision"], answer.body["model_version"]) == ("0.5", "int8", "v1")
    batch = gateway.ask("POST", "/v1/classify", {"input": ["a", "full", "b"]}).body["items"]
    assert [one["response"] is None for one in batch] == [False, True, False]
    assert batch[1]["error"] == {
        "code": "RESOURCE_EXHAUSTED",
        "reason": "OVERLOADED",
        "message": "Full.",
        "field": None,
        "retry_seconds": 0.7,
    }
    measured = gateway.ask("GET", "/metrics").body
    assert 'classer_refused_texts_total{reason="OVERLOADED"} 1.0' in measured
    assert 'classer_texts_total{code="RESOURCE_EXHAUSTED"} 1.0' in measured
    tasks = gateway.ask("GET", "/v1/tasks").body["tasks"]
    described = {"name": "topic", "kind": "multiclass", "num_labels": 2, "model": "null", "model_version": "v1"}
    assert tasks == [{**described, "labels": []}]


def test_models_are_listed_and_described(gateway: Gateway) -> None:
    (listed,) = gateway.ask("GET", "/v1/models").body["models"]
    assert gateway.ask("GET", "/v1/models/null").body == listed
    assert (listed["name"], listed["state"], listed["precision"], listed["focuses"]) == ("null", "ready", "int8", ["1"])
    assert listed["load_time"] == "2026-01-02T00:00:00Z"
    assert listed["programs"][0]["run_duration"] == 0.003
    assert listed["tasks"][0]["labels"] == [{"label": "sport", "description": "", "path": []}]


def test_refusals_have_the_status_of_their_meaning(gateway: Gateway) -> None:
    full = gateway.ask("POST", "/v1/classify", {"input": "full"})
    assert (full.status, full.headers["retry-after"]) == (429, "1")
    assert full.body["error"]["retry_seconds"] == pytest.approx(0.7)
    unknown = gateway.ask("POST", "/v1/classify", {"input": SECRET_TEXT, "task": "none"})
    assert (unknown.status, unknown.body["error"]["code"]) == (404, "NOT_FOUND")
    late = gateway.ask("POST", "/v1/classify", {"input": "hold", "timeout": 0.05})
    assert (late.status, late.body["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
    bug = gateway.ask("POST", "/v1/classify", {"input": f"bug {SECRET_TEXT}"})
    assert bug.status == 500
    for answer in (unknown, late, bug):
        assert SECRET_TEXT not in json.dumps(answer.body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b'{"input": "\xff\xfe"}', "UTF-8"),
        (b'{"input": "\\ud800"}', "`input`"),
        (b"[" * 100_000, "JSON"),
        ({"input": 7}, "`input` is wrong: input should be a valid string"),
        ({"input": ["a", 7]}, "`input[1]` is wrong: input should be a valid string"),
        ({"input": []}, "`input` is wrong: list should have at least 1 item"),
        ({"input": ["a"] * 1025}, "`input` is wrong: list should have at most 1024 items"),
        ({"input": ["a", "a" * 1_000_001]}, "`input[1]`"),
        ({"input": "a", "priority": "soon"}, "`priority` is wrong: input should be 'interactive' or 'bulk'"),
        ({"input": "a", "timeout": 0}, "`timeout`"),
        ({"input": "a", "top_k": 0}, "`top_k`"),
        ({}, "`input` is missing"),
        ({"input": "a", "top_k": -1}, "`top_k`"),
        ({"input": "a", "top_k": 10**30}, "`top_k`"),
        ({"input": "a", SECRET_TEXT: 1}, "the fields are: evidence, focus, input"),
        ({"input": "a" * 1_000_001}, "at most 1000000 characters"),
        ([SECRET_TEXT], "`body`"),
    ],
)
def test_bad_bodies_are_refused_with_a_sentence_that_repeats_nothing(gateway: Gateway, body: Any, says: str) -> None:
    answer = gateway.ask("POST", "/v1/classify", body)
    assert answer.status == 400
    assert says in answer.body["error"]["message"]
    assert SECRET_TEXT not in json.dumps(answer.body)
    assert len(answer.body["error"]["message"]) < 400


def test_a_body_that_is_too_large_is_not_read_to_its_end(gateway: Gateway, running: Guarded) -> None:
    before = len(running.null.seen)
    with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT) as raw:
        head = b"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        raw.sendall(head + f"content-length: {MAX_MESSAGE_BYTES + 1}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(4096)  # nothing of the body was sent
    with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT) as raw:
        raw.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
        with contextlib.suppress(ConnectionError):  # it has closed the connection; what it said can still be read
            for _ in range(40):
                raw.sendall(chunk)
        assert b" 413 " in raw.recv(4096)
    assert len(running.null.seen) == before
    assert gateway.ask("GET", "/healthz").status == 200


def test_more_than_may_be_in_flight_is_refused() -> None:
    with guarded() as running:
        gateway = Gateway(running.address, max_calls=2, max_bytes=1_000_000)
        try:
            with ThreadPoolExecutor(2) as pool:
                held = [pool.submit(gateway.ask, "POST", "/v1/classify", {"input": "hold"}) for _ in range(2)]
                assert eventually(lambda: running.null.seen == ["hold", "hold"])
                many = gateway.ask("POST", "/v1/classify", {"input": "a"})
                assert (many.status, many.headers["retry-after"]) == (429, "1")
                assert (many.body["error"]["code"], many.body["error"]["reason"]) == (
                    "RESOURCE_EXHAUSTED",
                    "TOO_MANY_CALLS",
                )
                assert gateway.ask("GET", "/readyz").status == 200
                running._loop.call_soon_threadsafe(running.null.release.set)
                assert [one.result(TIMEOUT).status for one in held] == [200, 200]
            large = gateway.ask("POST", "/v1/classify", {"input": ["a" * 600_000] * 2})
            assert (large.status, large.body["error"]["reason"]) == (429, "TOO_MANY_BYTES")
            # All of it was given back.
            assert gateway.ask("POST", "/v1/classify", {"input": "a" * 900_000}).status == 200
            measured = gateway.ask("GET", "/metrics").body
            for line in ("in_flight_calls 0.0", "in_flight_bytes 0.0", 'refusals_total{reason="TOO_MANY_CALLS"} 1.0'):
                assert f"classer_{line}\n" in measured
        finally:
            gateway.stop()


def test_a_caller_that_goes_cancels_its_call(gateway: Gateway, running: Guarded) -> None:
    before = running.null.calls.in_flight
    with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT) as raw:
        body = b'{"input": "hold", "timeout": 60}'
        head = f"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        raw.sendall(head.encode() + b"\r\n\r\n" + body)
        assert eventually(lambda: running.null.calls.in_flight == before + 1)
    assert eventually(lambda: running.null.calls.in_flight == before)


def test_health_readiness_metrics_and_openapi(gateway: Gateway, running: Guarded) -> None:
    assert gateway.ask("GET", "/healthz").body == "ok"
    assert gateway.ask("GET", "/readyz").status == 200
    running.call(running.say_ready(False))
    assert gateway.ask("GET", "/readyz").status == 503
    assert gateway.ask("GET", "/healthz").status == 200
    running.call(running.say_ready(True))
    assert 'classer_calls_total{code="OK",method="HTTP Classify"}' in gateway.ask("GET", "/metrics").body
    schema = gateway.ask("GET", "/openapi.json").body
    assert {"/v1/classify", "/v1/models", "/v1/models/{name}", "/v1/tasks"} <= schema["paths"].keys()
    assert "openapi" in gateway.ask("GET", "/docs").body
    assert gateway.ask("GET", "/nothing").status == 404
    assert gateway.ask("GET", "/v1/classify").status == 405


def test_keys_travel_to_the_service(tmp_path: Path) -> None:
    entry, key = make_key("a", per_day=2)
    write_keys(tmp_path / "keys.json", [entry])
    with guarded(keys=tmp_path / "keys.json") as running:
        gateway = Gateway(running.address)
        try:
            refused = gateway.ask("POST", "/v1/classify", {"input": "a"})
            assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert gateway.ask("POST", "/v1/classify", {"input": "a"}, authorization=f"Bearer {key}").status == 200
            assert gateway.ask("POST", "/v1/classify", {"input": "a"}, x_api_key=key).status == 200
            over = gateway.ask("POST", "/v1/classify", {"input": "a"}, x_api_key=key)
            assert (over.status, over.body["error"]["reason"]) == (429, "QUOTA_EXCEEDED")
            assert int(over.headers["retry-after"]) >= 1
            wrong = gateway.ask("POST", "/v1/classify", {"input": "a"}, x_api_key=key + "x")
            assert wrong.status == 401
            assert key not in json.dumps(wrong.body)
        finally:
            gateway.stop()


def test_a_server_that_is_not_there_is_unavailable() -> None:
    gateway = Gateway("127.0.0.1:1")
    try:
        answer = gateway.ask("POST", "/v1/classify", {"input": "a"})
        assert (answer.status, answer.body["error"]["code"]) == (503, "UNAVAILABLE")
        assert "127.0.0.1" not in answer.body["error"]["message"]
        assert gateway.ask("GET", "/readyz").status == 503
    finally:
        gateway.stop()


def test_an_address_in_use_is_refused_with_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="already in use"):
        run_gateway(GatewayConfig(port=taken.getsockname()[1]))
    with pytest.raises(InputError, match="must be above 0"):
        run_gateway(GatewayConfig(max_in_flight=0))


def test_it_loads_neither_jax_nor_tensorflow() -> None:
    code = "import sys, classer.serve.gateway.app, classer.serve.ops.operations; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "grpc" in loaded
    assert not {"jax", "tensorflow", "flax", "aqt"} & set(loaded)


def test_the_command_drains_on_sigterm(running: Guarded) -> None:
    """What is in flight is answered, and the process ends well; every option is an environment variable too."""
    command = [sys.executable, "-m", "classer.tools.cli.main", "gateway"]
    settings = {"CLASSER_SERVER": running.address, "CLASSER_PORT": "0"}
    with Process(command, env={**os.environ, **settings}) as process:
        port = int(process.stdout.line().rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as raw:
            body = b'{"input": "hold"}'
            head = "POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            assert eventually(lambda: running.null.calls.in_flight == 1)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            running._loop.call_soon_threadsafe(running.null.release.set)
            assert b" 200 " in raw.recv(4096)
        done = process.result(TIMEOUT)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0, done.stderr
