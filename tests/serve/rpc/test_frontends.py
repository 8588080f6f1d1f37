"""Front ends before a real server: the same answers, the same refusals, and one that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from classer.data.errors import InputError
from classer.serve.client.client import Client, DeadlineExceeded, InvalidRequest, UnknownTask
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub
from classer.serve.rpc.frontend import GATHER_REQUESTS, Coalescer
from classer.tests.processes import Process

TIMEOUT = 60.0
COUNT = 2


@pytest.fixture(scope="module")
def running(start_server, bundle_path) -> Iterator[Any]:
    with start_server(bundle_path, frontends=COUNT) as running, Client(running.address) as client:
        client.wait_until_healthy(TIMEOUT)
        yield running


@pytest.fixture
def client(running) -> Iterator[Client]:
    with Client(running.address) as client:
        yield client


def test_many_callers_get_their_own_answers(client: Client) -> None:
    def ask(i: int) -> tuple[int, int]:
        answer = client.classify("card " * (i % 40), "topic" if i % 2 else "tags", top_k=1, timeout=TIMEOUT)
        return answer.tokens, len(answer.task)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(300)))
    assert answers == [(i % 40 + 2, 5 if i % 2 else 4) for i in range(300)]


def test_refusals_keep_their_status_and_details(client: Client, running) -> None:
    with pytest.raises(UnknownTask, match="topic, tags") as unknown:
        client.classify("a", "secret")
    assert (unknown.value.field, unknown.value.reason) == ("task", "UNKNOWN_TASK")
    with pytest.raises(InvalidRequest, match="at most 1000000") as long:
        client.classify("a" * 1_000_001, "topic")
    assert (long.value.field, long.value.reason) == ("text", "INVALID_REQUEST")
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        ClassifierStub(channel).ClassifyBatch(
            pb.ClassifyBatchRequest(text_batch=pb.TextBatch(texts=["a"] * 1025)), timeout=TIMEOUT
        )
    refused: Any = caught.value
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert any(key == "grpc-status-details-bin" for key, _ in refused.trailing_metadata())
    with pytest.raises(DeadlineExceeded):
        client.classify("a", "topic", timeout=1e-4)


def test_whatever_else_the_service_has_passes_through(running, client: Client) -> None:
    assert len(client.classify_batch(["card"] * 1024, "topic", timeout=TIMEOUT)) == 1024
    with grpc.insecure_channel(running.address) as channel:
        stub = ClassifierStub(channel)
        assert [task.name for task in stub.ListTasks(pb.ListTasksRequest(), timeout=TIMEOUT).tasks] == ["topic", "tags"]
        assert stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).programs
        requests = [
            pb.ClassifyBatchRequest(
                text_batch=pb.TextBatch(texts=["card"] * n, options=pb.ClassifyOptions(task="topic"))
            )
            for n in range(1, 6)
        ]
        responses = list(stub.ClassifyStream(iter(requests), timeout=TIMEOUT))
        assert [len(response.items) for response in responses] == [1, 2, 3, 4, 5]
        watch: Any = health_pb2_grpc.HealthStub(channel)
        assert watch.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status == 1


def test_a_killed_front_end_is_replaced_and_the_other_serves_on(running) -> None:
    front_ends = running.server._front_ends
    before = front_ends.pids
    assert len(before) == COUNT
    stop, answered, failed = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            with Client(running.address) as own:  # a connection each, so that both front ends get some
                try:
                    answered.append(own.classify("card", "topic", timeout=TIMEOUT))
                except Exception as error:
                    failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    os.kill(before[0], signal.SIGKILL)
    end = time.monotonic() + TIMEOUT
    while (len(front_ends.pids) < COUNT or before[0] in front_ends.pids) and time.monotonic() < end:
        time.sleep(0.05)
    count = len(answered)
    while len(answered) < count + 20 and time.monotonic() < end:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(front_ends.pids) == COUNT
    assert len(answered) >= count + 20
    # What the killed one had in hand fails, and nothing else.
    assert len(failed) <= len(threads), f"{len(failed)} failed, such as {failed[0]!r} and {failed[-1]!r}"


def test_the_port_is_nobody_else_s(running, start_server, bundle_path) -> None:
    port = int(running.address.rpartition(":")[2])
    for count in (0, 1):
        with (
            pytest.raises(InputError, match=f"Cannot listen on 127.0.0.1:{port}"),
            start_server(bundle_path, port=port, frontends=count),
        ):
            pass
    with pytest.raises(InputError, match="--frontends is 65"), start_server(bundle_path, frontends=65):
        pass


def test_a_front_end_ends_with_its_parent() -> None:
    config = '{"engine": "unix:/nonexistent/classer.sock", "port": 0, "drain_seconds": 1}'
    with Process([sys.executable, "-m", "classer.serve.rpc.frontend", config]) as process:
        with Client(process.stdout.line().split()[-1]) as client:
            assert not client.healthy()
        process.stdin.close()
        assert process.wait(TIMEOUT) == 0


def test_it_loads_neither_jax_nor_tensorflow() -> None:
    code = "import sys, classer.serve.rpc.frontend; print(*({'jax', 'tensorflow', 'aqt', 'grpc'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert done.stdout.split() == ["grpc"]


# Coalescing


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT))


def test_the_first_goes_at_once_and_those_after_it_together() -> None:
    async def scenario() -> None:
        sizes: list[int] = []
        go_on = asyncio.Event()

        async def send(batch: pb.ClassifyBatchRequest) -> pb.ClassifyBatchResponse:
            sizes.append(len(batch.request_batch.requests))
            await go_on.wait()
            items = [
                pb.ClassifyBatchItem(response=pb.ClassifyResponse(task=one.text))
                for one in batch.request_batch.requests
            ]
            return pb.ClassifyBatchResponse(items=items)

        coalescer = Coalescer(send)

        def ask(name: int) -> asyncio.Task[pb.ClassifyBatchItem]:
            return asyncio.create_task(coalescer.classify(pb.ClassifyRequest(text=str(name))))

        tasks = [ask(0)]
        while not sizes:
            await asyncio.sleep(0)
        tasks += [ask(name) for name in range(1, GATHER_REQUESTS + 4)]
        tasks[-1].cancel()
        while len(sizes) < 3:
            await asyncio.sleep(0.001)
        assert sizes == [1, GATHER_REQUESTS, 2]  # the one that gave up has left
        go_on.set()
        items = await asyncio.gather(*tasks[:-1])
        assert [item.response.task for item in items] == [str(name) for name in range(len(items))]

    run(scenario())


def test_a_batch_is_cancelled_with_the_last_of_its_calls() -> None:
    async def scenario() -> None:
        sent: list[str] = []
        cancelled: list[str] = []
        go_on = asyncio.Event()

        async def send(batch: pb.ClassifyBatchRequest) -> pb.ClassifyBatchResponse:
            texts = "".join(one.text for one in batch.request_batch.requests)
            sent.append(texts)
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                cancelled.append(texts)
                raise
            return pb.ClassifyBatchResponse(items=[pb.ClassifyBatchItem()] * len(batch.request_batch.requests))

        coalescer = Coalescer(send)
        tasks = {name: asyncio.create_task(coalescer.classify(pb.ClassifyRequest(text=name))) for name in "ab"}
        while sent != ["ab"]:
            await asyncio.sleep(0)
        tasks["c"] = asyncio.create_task(coalescer.classify(pb.ClassifyRequest(text="c")))
        while sent != ["ab", "c"]:
            await asyncio.sleep(0.001)
        tasks["a"].cancel()
        tasks["c"].cancel()
        while not cancelled:
            await asyncio.sleep(0)
        assert cancelled == ["c"]  # somebody waits for the other batch
        go_on.set()
        assert isinstance(await tasks["b"], pb.ClassifyBatchItem)
        assert cancelled == ["c"]

    run(scenario())


def test_a_failed_batch_is_each_one_s_failure_and_the_next_one_goes() -> None:
    async def scenario() -> None:
        async def send(batch: pb.ClassifyBatchRequest) -> pb.ClassifyBatchResponse:
            if batch.request_batch.requests[0].text == "bad":
                raise RuntimeError("no engine")
            return pb.ClassifyBatchResponse(items=[pb.ClassifyBatchItem()] * len(batch.request_batch.requests))

        coalescer = Coalescer(send)
        outcomes = await asyncio.gather(
            *(coalescer.classify(pb.ClassifyRequest(text="bad")) for _ in range(3)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 3
        assert isinstance(await coalescer.classify(pb.ClassifyRequest(text="good")), pb.ClassifyBatchItem)

    run(scenario())
