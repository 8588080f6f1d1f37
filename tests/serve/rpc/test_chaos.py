"""A server among callers who do everything wrong, and some who do everything right and must not notice."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import os
import random
import signal
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from classer.model.bundle import Bundle, load_bundle, save_bundle
from classer.serve.client.client import (
    AsyncClient,
    Classification,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Unavailable,
)
from classer.serve.client.results import Outcome
from classer.serve.core.engine import Engine
from classer.serve.ops import listening
from classer.serve.ops.keys import make_key, write_keys
from classer.serve.ops.security import KEY_HEADER, KEY_SCHEME, aio_channel
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub, add_ClassifierServicer_to_server
from classer.serve.wire.errors import Unauthenticated
from classer.tests.helpers import VOCAB
from classer.tests.serve.ops.guarded import Null

SECONDS = 20.0
TIMEOUT = 60.0
CALLERS, TROUBLEMAKERS, NEVER_READING, HALF_OPEN = 8, 4, 3, 30
KILLS = 3
# The part of all well-formed calls that are given up while they are under way.
CANCELLED = 0.3
# Megabytes that are taken from one who reads no answer: what fills a connection's window, and little more.
MOST_TAKEN = 20
# Where the good bundle has numbers, the sick one has none for this word.
RARE = "storm"
TEXTS = ["my card has not arrived", "where is my money ?", "card", "", "the money is here. " * 8, f"the {RARE} is here"]
MODELS = ("good", "sick")
# By model and text: label → probability, how many tokens, which version; None where there are no numbers.
Expected = dict[str, dict[str, tuple[dict[str, float], int, str] | None]]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# The head of a HEADERS frame that says 100 bytes follow, which never do.
HEADERS = b"\x00\x00\x64\x01\x04\x00\x00\x00\x01"


def half_open(key: str | None = None) -> list[bytes]:
    """What is said on connections on which nothing follows: nothing, half of a greeting, a call without its message."""

    def literal(name: str, value: str) -> bytes:  # RFC 7541 §6.2.2, without Huffman's code
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    path = b"/classer.v1.Classifier/Classify"
    # POST, http, the path and the authority by their numbers in HPACK's static table.
    block = b"\x83\x86\x04" + bytes([len(path)]) + path + b"\x01\x09localhost"
    block += literal("content-type", "application/grpc") + literal("te", "trailers")
    if key is not None:
        block += literal(KEY_HEADER, KEY_SCHEME + key)
    call = len(block).to_bytes(3, "big") + HEADERS[3:] + block
    return [b"", PREFACE[:10], PREFACE + SETTINGS, PREFACE + SETTINGS + call]


class Chaos:
    """All that callers do to one server at a time.

    Args:
      address: the server's.
      key: the callers' API key; None if the server requires none.
      expected: the right answers.
      front_ends: the server's, which are killed, so that calls may end as UNAVAILABLE; None if it has none.

    Attributes:
      trouble: what misbehaves, each once when called.
      counts: number of calls by kind, and of their outcomes.
      stop: ends everyone.
      go_on: cleared, it lets the device's next batch hang.
    """

    def __init__(self, address: str, key: str | None, expected: Expected, front_ends: Any) -> None:
        self.address, self.key, self.expected, self.front_ends = address, key, expected, front_ends
        self.rng = random.Random(0)
        self.trouble = [self.hurried, self.enormous, self.garbled, self.broken_off]
        if key is not None:
            self.trouble.append(self.stranger)
        self.counts: collections.Counter[str] = collections.Counter()
        self.stop = asyncio.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def client(self) -> AsyncClient:
        return AsyncClient(self.address, key=self.key, own_connection=True)

    def channel(self, *options: tuple[str, int]) -> grpc.aio.Channel:
        return aio_channel(self.address, [("grpc.use_local_subchannel_pool", 1), *options], key=self.key)

    async def run(self) -> None:
        """Everyone at once; the server has its own accidents meanwhile."""
        async with asyncio.TaskGroup() as group:
            for number in range(TROUBLEMAKERS):
                group.create_task(self.misbehave(number))
            for _ in range(CALLERS):
                group.create_task(self.behave())
            for _ in range(NEVER_READING):
                group.create_task(self.never_read())
            group.create_task(self.stay_half_open())
            await asyncio.sleep(SECONDS / 4)
            await self.stall()
            await asyncio.sleep(SECONDS / 4)
            for _ in range(KILLS if self.front_ends else 0):
                await self.kill()
            await asyncio.sleep(SECONDS / 2)
            async with self.client() as newcomer:
                self.compare("good", TEXTS, await newcomer.classify_batch(TEXTS, "topic", model="good", top_k=100))
            self.stop.set()

    # Those who behave

    async def behave(self) -> None:
        """Asks one call after another, gives up some, and compares the answers of all others."""
        async with self.client() as client:
            for how in itertools.cycle((self.one, self.batch, self.stream)):
                if self.stop.is_set():
                    return
                model, texts = self.rng.choice(MODELS), self.rng.sample(TEXTS, len(TEXTS))
                while not await self.asked(how, client, model, texts):
                    pass

    async def asked(self, how: Callable[..., Any], client: AsyncClient, model: str, texts: Sequence[str]) -> bool:
        """Asks once; whether it is done, or must be asked again because a front end was killed."""
        task = asyncio.create_task(how(client, model, texts))
        self.counts["calls"] += 1
        if self.counts["calls given up"] < CANCELLED * self.counts["calls"]:
            await asyncio.sleep(self.rng.random() * 0.005)
            task.cancel()
        await asyncio.wait((task,))
        if task.cancelled():
            self.counts["calls given up"] += 1
            return True
        try:
            outcomes = await task
        except Unavailable:
            if not self.front_ends:
                raise
            self.counts["calls of killed front ends"] += 1
            return False
        self.counts["calls answered"] += 1
        self.compare(model, texts, outcomes)
        return True

    async def one(self, client: AsyncClient, model: str, texts: Sequence[str]) -> list[Outcome]:
        try:
            return [await client.classify(texts[0], "topic", model=model, top_k=100, timeout=TIMEOUT)]
        except InternalError as error:
            return [error]

    async def batch(self, client: AsyncClient, model: str, texts: Sequence[str]) -> list[Outcome]:
        return await client.classify_batch(texts, "topic", model=model, top_k=100, timeout=TIMEOUT)

    async def stream(self, client: AsyncClient, model: str, texts: Sequence[str]) -> list[Outcome]:
        return [one async for one in client.classify_stream(texts, "topic", model=model, top_k=100)]

    def compare(self, model: str, texts: Sequence[str], outcomes: Sequence[Outcome]) -> None:
        for text, outcome in zip(texts, outcomes, strict=len(outcomes) > 1):
            expected = self.expected[model][text]
            if expected is None:
                assert isinstance(outcome, InternalError)
                assert "not finite" in str(outcome)
                self.counts["texts without scores"] += 1
                continue
            assert isinstance(outcome, Classification), repr(outcome)
            scores, tokens, version = expected
            assert {label.label: label.score for label in outcome.labels} == pytest.approx(scores, abs=2e-3)
            assert (outcome.tokens, outcome.model, outcome.model_version) == (tokens, model, version)
            self.counts["texts right"] += 1

    # Those who do not

    async def misbehave(self, number: int) -> None:
        async with self.client() as client:
            for act in itertools.islice(itertools.cycle(self.trouble), number, None):
                if self.stop.is_set():
                    return
                try:
                    await act(client)
                    self.counts[act.__name__] += 1
                except Unavailable:
                    if not self.front_ends:
                        raise

    async def hurried(self, client: AsyncClient) -> None:
        """What comes within a millisecond is right."""
        with contextlib.suppress(DeadlineExceeded):
            outcomes = await client.classify_batch(TEXTS, "topic", model="good", top_k=100, timeout=0.001)
            for text, outcome in zip(TEXTS, outcomes, strict=True):
                if not isinstance(outcome, DeadlineExceeded):
                    self.compare("good", [text], [outcome])

    async def enormous(self, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match="at most 1000000"):
            await client.classify("word " * 2_000_000, "topic", model="good", timeout=TIMEOUT)

    async def garbled(self, client: AsyncClient) -> None:
        kinds = [
            self.rng.randbytes(self.rng.randrange(200)),  # no message at all
            b"\x0a\x04" + b"\xff\xfe\xfd\xfc",  # a text that is not UTF-8
            b"\x0a\xff\xff\xff\x7f" + b"a" * 50,  # a text that ends before its length
            b"\x0b" * 5_000,  # groups within groups
        ]
        async with self.channel() as channel:
            for method in ("Classify", "ClassifyBatch"):
                call: Any = channel.unary_unary(f"/classer.v1.Classifier/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(self.rng.choice(kinds), timeout=TIMEOUT)
                name = caught.value.code().name
                if name == "UNAVAILABLE":
                    raise Unavailable("Its front end was killed.")
                assert name == "INVALID_ARGUMENT", caught.value
                self.counts[f"garbled: {name}"] += 1

    async def broken_off(self, client: AsyncClient) -> None:
        for said in (b"", PREFACE, PREFACE + SETTINGS + HEADERS, b"GET / HTTP/1.1\r\n\r\n", self.rng.randbytes(100)):
            raw = self.connect(said)
            await asyncio.sleep(0.1)
            # Gone without a word: the other end gets a reset.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()

    async def stranger(self, client: AsyncClient) -> None:
        """One whose key is not known."""
        async with AsyncClient(self.address, key=make_key("stranger")[1], own_connection=True) as other:
            with pytest.raises(Unauthenticated):
                await other.classify("card", "topic", model="good", timeout=TIMEOUT)

    async def never_read(self) -> None:
        """Offers messages of a megabyte without end, and reads no answer; the server reads no more than are taken."""
        message = pb.ClassifyBatchRequest(
            text_batch=pb.TextBatch(
                texts=["the money is here. " * 50] * 1000, options=pb.ClassifyOptions(task="topic", model="good")
            )
        )
        taken = 0

        async def requests() -> AsyncIterator[pb.ClassifyBatchRequest]:
            nonlocal taken
            while True:
                taken += 1
                yield message

        stop = asyncio.create_task(self.stop.wait())
        while not stop.done():  # again when its front end was killed
            taken = 0
            async with self.channel(("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)) as channel:
                call: Any = ClassifierStub(channel).ClassifyStream(requests())
                ended = asyncio.create_task(call.code())
                await asyncio.wait((stop, ended), return_when=asyncio.FIRST_COMPLETED)
                assert self.front_ends or not ended.done(), await ended
                self.counts["most taken"] = max(self.counts["most taken"], taken)
                call.cancel()
                await ended

    async def stay_half_open(self) -> None:
        """Keeps connections on which nothing comes; those that the server drops are made anew."""
        held: dict[int, socket.socket] = {}
        try:
            while not self.stop.is_set():
                for number, said in zip(range(HALF_OPEN), itertools.cycle(half_open(self.key))):
                    if number in held and is_open(held[number]):
                        continue
                    with contextlib.suppress(Unavailable):
                        held[number] = self.connect(said)
                        self.counts["half open"] += 1
                await asyncio.sleep(0.5)
        finally:
            for raw in held.values():
                raw.close()

    def connect(self, said: bytes) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        try:
            raw = socket.create_connection((host, int(port)), TIMEOUT)
            raw.sendall(said)
        except OSError as error:
            if not self.front_ends:
                raise
            raise Unavailable("Its front end was killed.") from error
        return raw

    # The server's own accidents

    async def stall(self) -> None:
        """A batch hangs: who has a deadline is told when it is over, everyone else is answered after all."""
        async with self.client() as client:
            assert await client.healthy(timeout=TIMEOUT)
            try:
                self.go_on.clear()
                async with asyncio.timeout(TIMEOUT):
                    while await client.healthy(timeout=TIMEOUT):
                        await asyncio.sleep(0.05)
                hurry = [client.classify("card", "topic", model="good", timeout=0.5) for _ in range(8)]
                patient = [asyncio.create_task(self.stream(client, model, TEXTS)) for model in MODELS * 4]
                outcomes = await asyncio.wait_for(asyncio.gather(*hurry, return_exceptions=True), TIMEOUT)
                assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * len(hurry)
                assert not any(task.done() for task in patient)
                assert not self.go_on.is_set()
            finally:
                self.go_on.set()
            for model, outcomes in zip(MODELS * 4, await asyncio.gather(*patient), strict=True):
                self.compare(model, TEXTS, outcomes)
            await client.wait_until_healthy(TIMEOUT)
            self.counts["stalls"] += 1

    async def kill(self) -> None:
        """One of the front ends is killed, and has a successor."""
        port = int(self.address.rpartition(":")[2])
        listening, victim = listeners(port), self.rng.choice(self.front_ends.pids)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in self.front_ends.pids and listeners(port) == listening)
        self.counts["front ends killed"] += 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.05)


def is_open(raw: socket.socket) -> bool:
    raw.setblocking(False)
    try:
        while raw.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    raw.close()
    return False


def listeners(port: int) -> int:
    """How many sockets of this machine listen on a port."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in map(str.split, lines))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> dict[str, Path]:
    """The tiny bundle, and one with another head whose embedding of one word is no number."""
    folder = tmp_path_factory.mktemp("chaos")
    save_bundle(tiny_bundle, folder / "good")
    table_VD = tiny_bundle.weights["encoder.embeddings.token.table"].copy()
    table_VD[VOCAB.index(RARE)] = np.nan
    weights = {
        **tiny_bundle.weights,
        "encoder.embeddings.token.table": table_VD,
        "head.kernel": np.roll(tiny_bundle.weights["head.kernel"], 1, axis=1),
    }
    save_bundle(dataclasses.replace(tiny_bundle, weights=weights), folder / "sick")
    return {name: folder / name for name in MODELS}


def expectations(path: Path) -> dict[str, tuple[dict[str, float], int, str] | None]:
    """What a bundle gives by itself."""
    bundle = load_bundle(path)
    task = bundle.taxonomy.task("topic")
    ids = bundle.tokenizer.encode(TEXTS, bundle.max_length).ids
    probs_NL = bundle.probabilities("topic", bundle.predictor().logits(ids, buckets=(bundle.max_length,)))
    return {
        text: (dict(zip(task.label_names, probs_L.tolist(), strict=True)), len(row), bundle.version)
        if np.isfinite(probs_L).all()
        else None
        for text, row, probs_L in zip(TEXTS, ids, probs_NL, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 2], ids=["one_process", "two_front_ends_and_keys"])
def test_those_who_behave_get_their_answers(
    start_server: Callable[..., Any],
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """No answer is wrong or lost, under concurrent calls and injected faults; no resource is leaked."""
    expected = {name: expectations(path) for name, path in bundles.items()}
    assert [[text for text in TEXTS if expected[name][text] is None] for name in MODELS] == [[], [TEXTS[-1]]]
    entry, key = make_key("chaos")
    write_keys(tmp_path / "keys.json", [entry])
    real = Engine.launch
    fields = {"keys": tmp_path / "keys.json", "frontends": count} if count else {}
    with start_server(*(f"{name}={path}" for name, path in bundles.items()), stall_seconds=1.0, **fields) as running:

        async def scenario() -> collections.Counter[str]:
            chaos = Chaos(running.address, key if count else None, expected, running.server._front_ends)

            def launch(engine: Engine, ids: Sequence[np.ndarray], bucket: int) -> Any:
                assert chaos.go_on.wait(TIMEOUT)
                return real(engine, ids, bucket)

            monkeypatch.setattr(Engine, "launch", launch)
            async with chaos.client() as client:
                await client.wait_until_healthy(TIMEOUT)
                await chaos.run()
                calls, scheduler = running.server._service.calls, running.server.scheduler
                await until(lambda: not calls.in_flight and not scheduler.waiting_tokens)
                assert await client.healthy(timeout=TIMEOUT)
            counts = chaos.counts
            print(f"\n{', '.join(f'{name}: {number}' for name, number in sorted(counts.items()))}")
            assert all(counts[act.__name__] >= 3 for act in chaos.trouble)
            return counts

        counts = asyncio.run(scenario())
    lost = counts["calls of killed front ends"]
    assert counts["calls"] == counts["calls answered"] + counts["calls given up"] + lost
    assert counts["calls given up"] >= 0.9 * CANCELLED * counts["calls"]
    assert counts["texts right"] >= 100
    assert counts["texts without scores"] >= 5
    assert counts["half open"] >= HALF_OPEN
    assert counts["stalls"] == 1
    assert 0 < counts["most taken"] <= MOST_TAKEN
    # What a killed one had in hand fails, which is one call of each caller at most, and nothing else.
    assert counts["front ends killed"] == (KILLS if count else 0)
    assert lost <= CALLERS * counts["front ends killed"]


def test_half_open_connections_are_dropped_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HANDSHAKE_SECONDS", "KEEPALIVE_SECONDS", "PING_SECONDS"):
        monkeypatch.setattr(listening, name, 1.0)

    async def scenario() -> None:
        server = listening.make_server()
        address = listening.bind_server(server, "127.0.0.1", 0, "--port")
        add_ClassifierServicer_to_server(Null(), server)
        await server.start()

        async def dropped(said: bytes) -> None:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(said)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), TIMEOUT)
            writer.close()

        async with AsyncClient(address) as client:
            await client.classify("card")
            await asyncio.gather(*map(dropped, half_open()))
            await client.classify("card")
        await server.stop(None)

    asyncio.run(scenario())
