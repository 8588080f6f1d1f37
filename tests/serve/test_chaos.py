"""A server among callers who do everything wrong, and one who does everything right and must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from classer.serve.client import AsyncClient, ClasserError, Classification, Client, InvalidRequest
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub

SECONDS = 20.0
TIMEOUT = 60.0
TEXTS = ["my card has not arrived", "where is my money ?", "card", "", "the money is here. " * 8]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# The head of a HEADERS frame that says 100 bytes follow, which never do.
HEADERS = b"\x00\x00\x64\x01\x04\x00\x00\x00\x01"


class Chaos:
    """The callers; each of its methods misbehaves once."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.rng = random.Random(0)
        self.done: dict[str, int] = {}

    async def cancelled(self, client: AsyncClient) -> None:
        task = asyncio.create_task(client.classify(self.rng.choice(TEXTS), "topic"))
        await asyncio.sleep(self.rng.random() * 0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ClasserError):
            await task

    async def hurried(self, client: AsyncClient) -> None:
        with contextlib.suppress(ClasserError):
            await client.classify_batch(TEXTS * 4, "topic", timeout=0.001)

    async def enormous(self, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match="at most 1000000"):
            await client.classify("word " * 2_000_000, "topic", timeout=TIMEOUT)

    async def garbled(self, client: AsyncClient) -> None:
        kinds = [
            self.rng.randbytes(self.rng.randrange(200)),  # no message at all
            b"\x0a\x04" + b"\xff\xfe\xfd\xfc",  # a text that is not UTF-8
            b"\x0a\xff\xff\xff\x7f" + b"a" * 50,  # a text that ends before its length
            b"\x0b" * 5_000,  # groups within groups
        ]
        async with grpc.aio.insecure_channel(self.address) as channel:
            for method in ("Classify", "ClassifyBatch"):
                call = channel.unary_unary(f"/classer.v1.Classifier/{method}")
                with contextlib.suppress(grpc.RpcError):
                    await call(self.rng.choice(kinds), timeout=TIMEOUT)

    async def slow_reader(self, client: AsyncClient) -> None:
        async def requests() -> AsyncIterator[pb.ClassifyBatchRequest]:
            for _ in range(50):
                yield pb.ClassifyBatchRequest(texts=TEXTS * 20, task="topic", top_k=100)

        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            call = ClassifierStub(channel).ClassifyStream(requests(), timeout=TIMEOUT)
            await call.read()
            await asyncio.sleep(1.0)  # and then reads no more
            call.cancel()

    async def half_open(self, client: AsyncClient) -> None:
        host, _, port = self.address.rpartition(":")
        for said in (b"", PREFACE, PREFACE + SETTINGS + HEADERS, b"GET / HTTP/1.1\r\n\r\n", self.rng.randbytes(100)):
            raw = socket.create_connection((host, int(port)), TIMEOUT)
            raw.sendall(said)
            await asyncio.sleep(0.2)
            # Gone without a word: the other end gets a reset.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()

    async def misbehave(self, end: float) -> None:
        """Misbehaves until then; three of ten times by cancelling."""
        others = (self.hurried, self.enormous, self.garbled, self.slow_reader, self.half_open)
        async with AsyncClient(self.address, own_connection=True) as client:
            while time.monotonic() < end:
                act = self.cancelled if self.rng.random() < 0.3 else self.rng.choice(others)
                await act(client)
                self.done[act.__name__] = self.done.get(act.__name__, 0) + 1


@pytest.mark.slow
def test_those_who_behave_get_their_answers(start_server: Callable[..., Any], bundle_path: Path) -> None:
    """No answer is wrong, late or lost, whatever others do; and nothing of them is left behind."""
    with start_server(bundle_path, metrics_port=0) as running:
        with Client(running.address) as client:
            expected = {text: client.classify(text, "topic", top_k=100) for text in TEXTS}
        chaos = Chaos(running.address)
        checked = asyncio.run(_behave(running.address, chaos, expected))
        assert checked > 50
        assert set(chaos.done) == {"cancelled", "hurried", "enormous", "garbled", "slow_reader", "half_open"}
        end = time.monotonic() + TIMEOUT
        service = running.server._service.calls
        while (service.in_flight or running.server.scheduler.waiting_tokens) and time.monotonic() < end:
            time.sleep(0.05)
        assert service.in_flight == 0
        assert running.server.scheduler.waiting_tokens == 0
        with Client(running.address) as client:
            assert client.healthy()


async def _behave(address: str, chaos: Chaos, expected: dict[str, Classification]) -> int:
    """Asks and compares while eight others misbehave; how many answers were compared."""
    end = time.monotonic() + SECONDS
    others = [asyncio.create_task(chaos.misbehave(end)) for _ in range(8)]
    checked = 0
    async with AsyncClient(address, own_connection=True) as client:
        while time.monotonic() < end:
            one = await client.classify(TEXTS[checked % len(TEXTS)], "topic", top_k=100, timeout=TIMEOUT)
            _compare(one, expected[TEXTS[checked % len(TEXTS)]])
            batch = await client.classify_batch(TEXTS, "topic", top_k=100, timeout=TIMEOUT)
            for text, answer in zip(TEXTS, batch, strict=True):
                assert isinstance(answer, Classification)
                _compare(answer, expected[text])
            checked += 1 + len(TEXTS)
    await asyncio.gather(*others)
    return checked


def _compare(answer: Classification, expected: Classification) -> None:
    scores = {label.name: label.score for label in expected.labels}
    assert {label.name: label.score for label in answer.labels} == pytest.approx(scores, abs=2e-3)
    assert answer.tokens == expected.tokens
