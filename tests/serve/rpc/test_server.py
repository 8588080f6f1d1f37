"""The whole server, over a real port, with a real (tiny, random) bundle."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from classer.data.errors import InputError
from classer.data.limits import MAX_TEXT_CHARS
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import load_bundle
from classer.serve.client.client import (
    AsyncClient,
    Classification,
    Client,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    TaskInfo,
    Unavailable,
    UnknownTask,
)
from classer.serve.core.deadlines import LatencyEstimate, ResponsePath
from classer.serve.core.engine import Engine
from classer.serve.core.work import Output
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub

TIMEOUT = 60.0
TEXTS = ["my card has not arrived", "where is my money ?", "card", "", "the money is here. " * 8]


@pytest.fixture(scope="module")
def running(start_server, bundle_path) -> Iterator:
    with start_server(bundle_path) as running:
        yield running


@pytest.fixture(scope="module")
def client(running) -> Iterator[Client]:
    with Client(running.address) as client:
        yield client


def health_stub(channel: grpc.Channel) -> Any:
    """The generated stub has no types."""
    return health_pb2_grpc.HealthStub(channel)


def code_and_details(error: Any) -> tuple[grpc.StatusCode, str]:
    """An RpcError that a call raised is the call itself, which its type does not say."""
    return error.code(), error.details()


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# What it answers


def test_answers_are_those_of_the_model(client: Client, bundle_path) -> None:
    """The same scores as the bundle gives by itself, for each text alone and for all in a batch."""
    bundle = load_bundle(bundle_path)
    encoded = bundle.tokenizer.encode(TEXTS, bundle.max_length)
    program = bundle.predictor().compile(1, bundle.max_length)
    for task in bundle.taxonomy.tasks:
        in_batch = client.classify_batch(TEXTS, task.name, top_k=100)
        for i, text in enumerate(TEXTS):
            tokens_BS = np.zeros((1, bundle.max_length), np.int32)
            tokens_BS[0, : len(encoded.ids[i])] = encoded.ids[i]
            logits_L = program(tokens_BS, np.array([len(encoded.ids[i])], np.int32))[0]
            probs_L = bundle.probabilities(task.name, logits_L[None])[0]
            expected = dict(zip(task.label_names, probs_L.tolist(), strict=True))
            for answer in (client.classify(text, task.name, top_k=100), in_batch[i]):
                assert isinstance(answer, Classification)
                scores = {label.label: label.score for label in answer.labels}
                assert scores == pytest.approx(expected, abs=2e-3)
                assert answer.task == task.name
                assert answer.tokens == len(encoded.ids[i])
                assert answer.model_version == bundle.version
                assert not answer.truncated
                assert answer.compute_duration > timedelta()


def test_an_empty_text_is_answered(client: Client) -> None:
    answer = client.classify("", "topic")
    assert answer.tokens == 2
    assert len(answer.chosen) == 1


def test_a_text_longer_than_the_model_reads_is_reported(client: Client, bundle_path) -> None:
    answer = client.classify("card " * 10_000, "topic")
    assert answer.truncated
    assert answer.tokens == load_bundle(bundle_path).max_length


def test_many_threads_get_their_own_answers(client: Client) -> None:
    texts = [("card " * (i % 40)).strip() for i in range(200)]
    alone = {text: client.classify(text, "topic") for text in set(texts)}
    with ThreadPoolExecutor(16) as pool:
        for text, answer in zip(texts, pool.map(lambda text: client.classify(text, "topic"), texts), strict=True):
            assert answer.tokens == alone[text].tokens
            assert answer.best.score == pytest.approx(alone[text].best.score, abs=2e-3)


def test_the_async_client_gives_the_same_answers(running, client: Client) -> None:
    async def main() -> list[Classification]:
        async with AsyncClient(running.address) as other:
            await other.wait_until_healthy(5)
            assert await other.healthy()
            answers = await asyncio.gather(*(other.classify(text, "topic") for text in TEXTS))
            batch = await other.classify_batch(TEXTS, "topic")
            assert [type(one) for one in batch] == [Classification] * len(TEXTS)
            with pytest.raises(UnknownTask):
                await other.classify("a", "nothing")
            return answers

    for text, answer in zip(TEXTS, asyncio.run(main()), strict=True):
        assert answer.best.label == client.classify(text, "topic").best.label


def test_options_reach_the_model(running, client: Client) -> None:
    name = client.tasks()[0].model
    one = client.classify("card", "topic", model=name, request_id="mine", priority="bulk", focus=1, top_k=1)
    assert (one.model, one.request_id, len(one.labels)) == (name, "mine", 1)
    assert client.classify("card", "topic", threshold=0.0).chosen
    assert not client.classify("card", "topic", threshold=1.0).chosen
    with pytest.raises(InvalidRequest, match="focus"):
        client.classify("card", "topic", focus=0.123)
    with pytest.raises(UnknownTask):
        client.classify("card", "topic", model="another")


def test_tasks_can_be_listed(running, client: Client) -> None:
    async def listed() -> list[TaskInfo]:
        async with AsyncClient(running.address) as other:
            return await other.tasks()

    tasks = client.tasks()
    assert (tasks[0].name, tasks[0].kind) == ("topic", "multiclass")
    assert all(task.num_labels >= 2 and task.model_version for task in tasks)
    assert asyncio.run(listed()) == client.tasks(tasks[0].model) == tasks


def test_a_stream_gives_an_outcome_for_each_text_in_order(running, client: Client) -> None:
    texts = [TEXTS[i % len(TEXTS)] for i in range(300)]
    texts[150] = "x" * (MAX_TEXT_CHARS + 1)

    async def streamed() -> Sequence[object]:
        async def asynchronous() -> AsyncIterator[str]:
            for text in texts:
                yield text

        async with AsyncClient(running.address) as other:
            first = [one async for one in other.classify_stream(asynchronous(), "topic")]
            return first + [one async for one in other.classify_stream(texts, "topic")]

    def essence(outcomes: Sequence[object]) -> list[object]:
        return [one.chosen if isinstance(one, Classification) else type(one) for one in outcomes]

    wanted = essence(client.classify_batch(texts, "topic"))
    assert wanted[150] is InvalidRequest
    assert essence(list(client.classify_stream(iter(texts), "topic"))) == wanted
    assert essence(asyncio.run(streamed())) == wanted * 2


def test_texts_that_fail_to_come_end_a_stream_with_their_own_error(running, client: Client) -> None:
    def breaking() -> Iterator[str]:
        yield from ["card"] * 200
        raise OSError("the disk is gone")

    async def streamed() -> None:
        async with AsyncClient(running.address) as other:
            async for _ in other.classify_stream(breaking(), "topic"):
                pass

    with pytest.raises(OSError, match="the disk is gone"):
        list(client.classify_stream(breaking(), "topic"))
    with pytest.raises(OSError, match="the disk is gone"):
        asyncio.run(streamed())
    with pytest.raises(UnknownTask):
        list(client.classify_stream(["card"], "no such task"))


def test_it_describes_itself(running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT)
        names = {service.name for service in response.list_services_response.service}
        assert {"classer.v1.Classifier", "grpc.health.v1.Health"} <= names
        health = health_stub(channel)
        for name in ("", "classer.v1.Classifier"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


# Bad input


def test_bad_requests_each_have_their_status_and_echo_nothing(client: Client) -> None:
    with pytest.raises(UnknownTask, match="topic, tags") as unknown:
        client.classify("a", "secret")
    assert "secret" not in str(unknown.value)
    with pytest.raises(InvalidRequest, match="name one of: topic, tags"):
        client.classify("a")
    with pytest.raises(InvalidRequest, match=f"at most {MAX_TEXT_CHARS} are taken") as invalid:
        client.classify("secret " * 1_500_000, "topic")  # 10 MB
    assert "secret" not in str(invalid.value)
    assert client.classify("a " * (MAX_TEXT_CHARS // 2), "topic").truncated  # as long as a text may be
    with pytest.raises(UnknownTask):
        client.classify_batch(["a", "b"], "secret")


def test_a_bad_text_in_a_batch_fails_alone(client: Client) -> None:
    first, bad, last = client.classify_batch(["a", "b" * (MAX_TEXT_CHARS + 1), ""], "topic")
    assert isinstance(bad, InvalidRequest)
    assert isinstance(first, Classification)
    assert isinstance(last, Classification)
    assert last.tokens == 2


@pytest.mark.parametrize("texts", [[], ["a"] * 1025])
def test_a_batch_of_none_or_too_many_is_refused(running, texts: list[str]) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as refused:
        ClassifierStub(channel).ClassifyBatch(
            pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=texts, options=pb.ClassifyOptions(task="topic"))),
            timeout=TIMEOUT,
        )
    code, details = code_and_details(refused.value)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"has {len(texts)} entries" in details


def test_the_largest_batch_is_taken(client: Client) -> None:
    outcomes = client.classify_batch(["card"] * 1024, "topic")
    assert [type(outcome) for outcome in outcomes] == [Classification] * 1024


@pytest.mark.parametrize("payload", [b"\xff\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd", b"\x0a\xff\x01abc"])
def test_bytes_that_are_no_request_hurt_nobody(running, client: Client, caplog, payload: bytes) -> None:
    with grpc.insecure_channel(running.address) as channel:
        classify: Any = channel.unary_unary("/classer.v1.Classifier/Classify")
        stream: Any = channel.stream_stream("/classer.v1.Classifier/ClassifyStream")
        for method, ask in (
            ("Classify", lambda: classify(payload, timeout=TIMEOUT)),
            ("ClassifyStream", lambda: next(stream(iter([payload]), timeout=TIMEOUT))),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                ask()
            code, details = code_and_details(refused.value)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details == f"The bytes sent are no request of {method} as Protocol Buffers write it."
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert client.classify("card", "topic").chosen


def test_a_message_beyond_the_limit_is_refused_by_grpc(running, client: Client) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as refused:
        ClassifierStub(channel).Classify(pb.ClassifyRequest(text="a" * (17 << 20)), timeout=TIMEOUT)
    assert code_and_details(refused.value)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.healthy()


def test_a_port_in_use_is_refused_with_a_sentence(running, start_server, bundle_path) -> None:
    port = int(running.address.rpartition(":")[2])
    with (
        pytest.raises(InputError, match=f"Cannot listen on 127.0.0.1:{port}: address already in use.*--port"),
        start_server(bundle_path, port=port),
    ):
        pass


@pytest.mark.parametrize(("fields", "says"), [({"port": 70000}, "70000"), ({"host": "192.0.2.1"}, "192.0.2.1")])
def test_an_address_that_is_none_of_ours_is_refused(start_server, bundle_path, fields: dict, says: str) -> None:
    with pytest.raises(InputError, match=says), start_server(bundle_path, **fields):
        pass


def test_a_path_that_is_no_bundle_is_refused(start_server, tmp_path) -> None:
    with pytest.raises(InputError, match=tmp_path.name), start_server(tmp_path):
        pass


# Hard to kill


class Valve:
    """Holds the device still: `closed` is set once a batch waits in it, `open` lets it go on."""

    def __init__(self, monkeypatch) -> None:
        self.closed, self.open = threading.Event(), threading.Event()
        self.ran: list[int] = []
        real = Engine.launch

        def launch(engine: Engine, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], list[Output]]:
            self.closed.set()
            assert self.open.wait(TIMEOUT)
            self.ran.append(len(ids))
            return real(engine, ids, bucket)

        monkeypatch.setattr(Engine, "launch", launch)


@pytest.fixture
def valve(running, monkeypatch) -> Iterator[Valve]:
    valve = Valve(monkeypatch)
    yield valve
    valve.open.set()
    assert eventually(lambda: running.server.scheduler.waiting_tokens == 0)


def test_a_deadline_ends_the_wait_and_the_text_is_not_run(running, client: Client, valve: Valve) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.classify, "card", "topic")
        assert valve.closed.wait(TIMEOUT)
        # The client says so, or the server, whichever comes first.
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 seconds|not yet been run"):
            client.classify("money", "topic", timeout=0.2)
        # It has left the queue although the device is still held.
        assert eventually(lambda: running.server.scheduler.waiting_tokens == 0)
        valve.open.set()
        assert first.result(TIMEOUT).chosen
    assert valve.ran == [1]


def test_a_batch_that_takes_too_long_does_not_take_the_calls_other_answers(running, monkeypatch) -> None:
    held, real = threading.Event(), Engine.launch

    def launch(engine: Engine, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], list[Output]]:
        collect = real(engine, ids, bucket)

        def late() -> list[Output]:
            assert held.wait(TIMEOUT)
            return collect()

        return collect if max(map(len, ids)) < 30 else late

    monkeypatch.setattr(Engine, "launch", launch)
    # Else an earlier test's calls would say how long before the deadline it must be.
    monkeypatch.setattr(running.server._service._pipeline, "_responses", ResponsePath(LatencyEstimate(1.0)))
    try:
        with grpc.insecure_channel(running.address) as channel:
            request = pb.ClassifyBatchRequest(
                text_batch=pb.TextBatch(texts=["card", "card " * 40], options=pb.ClassifyOptions(task="topic"))
            )
            short, long = ClassifierStub(channel).ClassifyBatch(request, timeout=5).items
        assert short.response.labels
        assert long.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        # That the call waited for the other text says nothing about the way back.
        assert running.server._service._pipeline._responses.estimate == LatencyEstimate(1.0)
    finally:
        held.set()
    assert eventually(lambda: running.server.scheduler.waiting_tokens == 0)


def test_what_cannot_be_answered_in_time_is_not_even_tokenised(
    running, client: Client, valve: Valve, monkeypatch
) -> None:
    encoded: list[str] = []
    real = WordPieceTokenizer.encode

    def encode(tokenizer: WordPieceTokenizer, texts: Sequence[str], max_length: int) -> object:
        encoded.extend(texts)
        return real(tokenizer, texts, max_length)

    monkeypatch.setattr(WordPieceTokenizer, "encode", encode)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.classify, "card", "topic")
        assert valve.closed.wait(TIMEOUT)
        monkeypatch.setattr(type(running.server.scheduler), "_backlog", lambda *_: 1000.0)
        with pytest.raises(DeadlineExceeded, match="turn would come in about 1000") as refused:
            client.classify("money", "topic", timeout=TIMEOUT)
        assert refused.value.retry_seconds == pytest.approx(1000)
        valve.open.set()
        assert first.result(TIMEOUT).chosen
    assert encoded == ["card"]


def test_an_answers_way_back_is_taken_off_deadlines(running, client: Client, monkeypatch) -> None:
    pipeline = running.server._service._pipeline
    monkeypatch.setattr(pipeline, "_responses", ResponsePath())
    client.classify("card", "topic")
    estimate = pipeline._responses.estimate
    assert 0 < estimate.mean < estimate.upper < TIMEOUT
    clock = running.server.scheduler.clock
    for seconds, mean, spread, taken in (
        (10.0, 2.0, 0.0, 2.0),
        (10.0, 1.0, 0.5, 3.0),
        (10.0, 100.0, 0.0, 5.0),  # at most half of it
        (10.0, 0.0, 0.0, 0.04),  # costs that the server does not measure
        (0.1, 0.0, 0.0, 0.01),
    ):
        monkeypatch.setattr(pipeline, "_responses", ResponsePath(LatencyEstimate(mean, spread)))
        resolved = pipeline.resolve(pb.ClassifyOptions(task="topic"), seconds)
        assert resolved.deadline - clock() == pytest.approx(seconds - taken, abs=1.0)
        assert resolved.give_up - resolved.deadline == pytest.approx(taken / 2)
    resolved = pipeline.resolve(pb.ClassifyOptions(task="topic"), None)
    assert (resolved.deadline, resolved.give_up) == (None, math.inf)


def test_cancelled_requests_leave_the_queue_and_their_mates_are_answered(running, valve: Valve) -> None:
    async def main() -> None:
        async with AsyncClient(running.address) as client:
            first = asyncio.create_task(client.classify("card", "topic"))
            await asyncio.to_thread(valve.closed.wait, TIMEOUT)
            kept, dropped = (asyncio.create_task(client.classify("money", "topic")) for _ in range(2))
            batch = asyncio.create_task(client.classify_batch(["a", "b", "c"], "topic"))
            scheduler = running.server.scheduler
            assert await asyncio.to_thread(eventually, lambda: scheduler.waiting_tokens == 5 * 16)
            dropped.cancel()
            batch.cancel()
            assert await asyncio.to_thread(eventually, lambda: scheduler.waiting_tokens == 16)
            valve.open.set()
            assert (await first).chosen
            assert (await kept).chosen
            for task in (dropped, batch):
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(main())
    assert valve.ran == [1, 1]


def test_too_much_waiting_is_refused(start_server, bundle_path, monkeypatch) -> None:
    valve = Valve(monkeypatch)
    with start_server(bundle_path, warm=True, max_waiting_tokens=64) as running, Client(running.address) as client:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.classify, "card", "topic")
            assert valve.closed.wait(TIMEOUT)
            second = pool.submit(client.classify_batch, ["a"] * 6, "topic")
            threading.Timer(0.3, valve.open.set).start()
            outcomes = second.result(TIMEOUT)
            assert first.result(TIMEOUT).chosen
        assert [type(outcome) for outcome in outcomes] == [Classification] * 4 + [Overloaded] * 2
        assert client.healthy()


def test_scores_that_are_no_numbers_fail_their_text_only(client: Client, monkeypatch) -> None:
    real = Engine.launch

    def launch(engine: Engine, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], list[Output]]:
        outputs = real(engine, ids, bucket)()
        spoilt = [Output(x.logits_L * np.nan) if len(one) == 2 else x for one, x in zip(ids, outputs, strict=True)]
        return lambda: spoilt

    monkeypatch.setattr(Engine, "launch", launch)
    first, empty, last = client.classify_batch(["card", "", "money"], "topic")
    assert isinstance(empty, InternalError)
    assert isinstance(first, Classification)
    assert isinstance(last, Classification)
    with pytest.raises(InternalError, match="not finite"):
        client.classify("", "topic")
    assert client.healthy()


def test_it_is_not_healthy_before_its_programs_are_warm(start_server, bundle_path) -> None:
    with start_server(bundle_path, warm=False) as running, Client(running.address) as client:
        assert not client.healthy()
        with pytest.raises(Unavailable, match="still compiling"):
            client.classify("card", "topic")
        running.call(running.server.warm_up(asyncio.Event()))
        client.wait_until_healthy(5)
        assert client.classify("card", "topic").chosen


def test_health_goes_red_when_the_device_is_lost(start_server, bundle_path, monkeypatch) -> None:
    def lost(engine: Engine, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], list[Output]]:
        raise RuntimeError("device lost")

    with start_server(bundle_path) as running, Client(running.address) as client:
        assert client.healthy()
        monkeypatch.setattr(Engine, "launch", lost)
        with pytest.raises(Unavailable, match="lost its device"):
            client.classify("card", "topic")
        assert eventually(lambda: not client.healthy())
        with pytest.raises(Unavailable, match="lost its device"):
            client.classify("card", "topic")


def test_health_stays_red_when_a_device_that_was_stuck_dies(start_server, bundle_path, monkeypatch) -> None:
    go_on = threading.Event()

    def stuck_then_lost(engine: Engine, ids: Sequence[np.ndarray], bucket: int) -> Callable[[], list[Output]]:
        assert go_on.wait(TIMEOUT)
        raise RuntimeError("device lost")

    with start_server(bundle_path, stall_seconds=0.1) as running, Client(running.address) as client:
        monkeypatch.setattr(Engine, "launch", stuck_then_lost)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.classify, "card", "topic", timeout=TIMEOUT)
            assert eventually(lambda: not client.healthy())
            go_on.set()
            with pytest.raises(Unavailable, match="lost its device"):
                answer.result(TIMEOUT)
        assert eventually(running.server._watching.done)
        assert not client.healthy()


def test_stopping_lets_what_is_in_flight_finish(start_server, bundle_path, monkeypatch) -> None:
    """… and does not wait for those who only watch the health."""
    with start_server(bundle_path, drain_seconds=TIMEOUT) as running, Client(running.address) as client:
        channel = grpc.insecure_channel(running.address)
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        valve = Valve(monkeypatch)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.classify, "card", "topic", timeout=TIMEOUT)
            assert valve.closed.wait(TIMEOUT)
            threading.Timer(0.3, valve.open.set).start()
            begin = time.monotonic()
            running.call(running.server.stop())
            assert time.monotonic() - begin < TIMEOUT / 2
            assert answer.result(TIMEOUT).chosen
        channel.close()
        with pytest.raises(Unavailable):
            client.classify("card", "topic")
