"""The client alone: its imports, its checks before sending, and its errors when no server answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import grpc
import pytest

from classer.data.errors import InputError
from classer.serve.client import client as client_module
from classer.serve.client.client import AsyncClient, Client, InvalidRequest, Unavailable
from classer.serve.client.requests import one_request
from classer.serve.client.results import read_classification
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.wire.errors import ServeError
from classer.serve.wire.limits import MAX_MESSAGE_BYTES, MAX_TEXTS
from classer.serve.wire.status import code_of, error_in, error_of, from_status, to_status, trailing_metadata

NOWHERE = "127.0.0.1:1"


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, classer.serve.client.client; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'grpc'" in loaded
    for heavy in ("jax", "jaxlib", "flax", "tensorflow", "tensorflow_text", "aqt", "numpy", "pyarrow", "grain"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("error", ServeError.__subclasses__())
def test_each_error_comes_back_as_itself(error: type[ServeError]) -> None:
    sent = error("Why it was.")
    for received in (from_status(to_status(sent)), error_of(code_of(sent), str(sent))):
        assert type(received) is error
        assert str(received) == "Why it was."


def test_an_error_s_details_come_back_too() -> None:
    sent = InvalidRequest("Why it was.", field="text", reason="ODD_TEXT", retry_seconds=1.5)
    for received in (from_status(to_status(sent)), error_in(trailing_metadata(sent))):
        assert type(received) is InvalidRequest
        assert (received.field, received.reason, received.retry_seconds) == ("text", "ODD_TEXT", 1.5)
    plain = from_status(to_status(InvalidRequest("Why it was.")))
    assert (plain.field, plain.reason, plain.retry_seconds) == ("", "INVALID_REQUEST", None)
    assert error_in(()) is None


def test_codes_that_we_do_not_send_are_internal_errors() -> None:
    assert type(error_of(grpc.StatusCode.DATA_LOSS, "Odd.")) is client_module.InternalError


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda client: client.classify("\ud800"), "lone surrogate"),
        (lambda client: client.classify(7), "must be strings"),
        (lambda client: client.classify("a", top_k=-1), "number from 1"),
        (lambda client: client.classify("a", threshold="much"), "of its own type"),
        (lambda client: client.classify("a", priority="soon"), "'interactive' or 'bulk'"),
        (lambda client: list(client.classify_stream(iter(["a", None]))), "must be strings"),
        (lambda client: client.classify("a" * (MAX_MESSAGE_BYTES + 1)), "takes 16777216 at most"),
        (lambda client: client.classify_batch([]), "at least one"),
        (lambda client: client.classify_batch("one text"), "list of texts"),
        (lambda client: client.classify_batch(["a", None]), "must be strings"),
        (lambda client: client.classify_batch(["a", "b" * (MAX_MESSAGE_BYTES + 1)]), "takes 16777216 at most"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_a_sentence(call, says: str, monkeypatch) -> None:
    with Client(NOWHERE) as client:
        monkeypatch.setattr(client._classifier, "ClassifyBatch", lambda *_, **__: pb.ClassifyBatchResponse())
        with pytest.raises(InvalidRequest, match=says):
            call(client)


def test_an_option_that_there_is_not_is_a_programming_error() -> None:
    with Client(NOWHERE) as client, pytest.raises(TypeError, match=r"no option 'colour'; there are: top_k, .*"):
        client.classify("a", colour="red")  # pyright: ignore[reportCallIssue]


def test_large_batches_are_cut_into_calls_that_the_server_takes(monkeypatch) -> None:
    """Any number and size of texts: every call within the limits, every text once and in order."""
    sent: list[list[str]] = []

    def classify_batch(request: pb.ClassifyBatchRequest, timeout: float) -> pb.ClassifyBatchResponse:
        assert len(request.text_batch.texts) <= MAX_TEXTS
        assert request.ByteSize() <= MAX_MESSAGE_BYTES
        sent.append(list(request.text_batch.texts))
        items = [pb.ClassifyBatchItem(response=pb.ClassifyResponse(task=text[:6])) for text in request.text_batch.texts]
        return pb.ClassifyBatchResponse(items=items)

    texts = [f"{i:06d}" + "x" * (3_000_000 if i % 100 == 0 else 0) for i in range(2500)]
    with Client(NOWHERE) as client:
        monkeypatch.setattr(client._classifier, "ClassifyBatch", classify_batch)
        outcomes = client.classify_batch(texts)
    assert [text for call in sent for text in call] == texts
    assert [one.task for one in outcomes if isinstance(one, client_module.Classification)] == [t[:6] for t in texts]
    assert len(sent) == 13


def test_nobody_there() -> None:
    with Client(NOWHERE) as client:
        assert not client.healthy()
        with pytest.raises(Unavailable, match=r"No server answers at 127\.0\.0\.1:1"):
            client.classify("a")
        with pytest.raises(Unavailable, match=r"No server answers"):
            client.classify_batch(["a"])
        begin = time.monotonic()
        with pytest.raises(Unavailable, match=r"No healthy server at 127\.0\.0\.1:1 within 0\.3 seconds"):
            client.wait_until_healthy(0.3)
        assert time.monotonic() - begin < 3


def test_nobody_there_async() -> None:
    async def main() -> None:
        async with AsyncClient(NOWHERE) as client:
            assert not await client.healthy()
            with pytest.raises(Unavailable, match="No server answers"):
                await client.classify("a")
            with pytest.raises(Unavailable, match="No healthy server"):
                await client.wait_until_healthy(0.3)

    asyncio.run(main())


def test_a_server_that_is_something_else() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            assert not client.healthy()
            with pytest.raises(ServeError, match="is not a Classer server"):
                client.classify("a")
    finally:
        server.stop(None)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_without_a_port_is_refused(kind: type[Client] | type[AsyncClient]) -> None:
    with pytest.raises(InputError, match="'localhost'; it must be HOST:PORT, such as localhost:50051"):
        kind("localhost")


@pytest.mark.parametrize(("focus", "sent"), [(1, "1"), (1.0, "1"), (0.5, "0.5"), ("0.3", "0.3")])
def test_a_focus_is_sent_as_servers_name_it(focus: float | str, sent: str) -> None:
    assert one_request("a", None, {"focus": focus}).options.focus == sent


def test_results_load_no_grpc() -> None:
    code = "import sys, classer.serve.client.results; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "classer.serve.client.results" in loaded
    assert not {"grpc", "jax", "numpy"} & set(loaded)


def test_an_answer_is_json() -> None:
    response = pb.ClassifyResponse(
        task="t",
        labels=[pb.ScoredLabel(label="a", score=0.5, chosen=True)],
        focus="0.5",
        precision=pb.PRECISION_BFLOAT16,
        compute_duration=timedelta(milliseconds=1),
    )
    answer = read_classification(response)
    assert answer.compute_duration == timedelta(milliseconds=1)
    fields = json.loads(json.dumps(answer.as_json()))
    assert fields["labels"] == [{"label": "a", "score": 0.5, "chosen": True, "path": []}]
    assert (fields["focus"], fields["precision"], fields["compute_duration"]) == ("0.5", "bfloat16", 0.001)
    assert fields.keys() == {field.name for field in pb.ClassifyResponse.DESCRIPTOR.fields}
