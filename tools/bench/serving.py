"""Overhead of the server: of its front ends with an engine that does nothing, and of its layers with a real one.

    python tools/bench/serving.py front-end
    python tools/bench/serving.py engine --bundle runs/banking77/bundle --data FOLDER

Everything runs on this machine, on loopback, and shares its cores with the callers; so ratios of one run count.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from classer.tools.pipes import drain

if TYPE_CHECKING:
    from classer.serve.proto.classifier_pb2_grpc import ModelAdminStub


@dataclasses.dataclass(frozen=True)
class FrontEndBench:
    """The ceiling of one front end: calls it takes a second of its own CPU time, before an engine that does nothing.

    Attributes:
      seconds: how long each measurement takes.
      callers: unary calls in flight.
      batch: texts of each ClassifyBatch.
    """

    seconds: float = 8.0
    callers: int = 64
    batch: int = 128


@dataclasses.dataclass(frozen=True)
class EngineBench:
    """A real bundle: batches in the bare program, through the scheduler, through gRPC; 64 callers, and one by one.

    Attributes:
      bundle: an INT8 or float32 bundle.
      data: a folder with task.json, whose test texts are sent.
      seconds: how long each measurement takes.
      rounds: number of rounds of all measurements; medians are printed.
      callers: unary calls in flight.
      frontends: number of front ends of the server.
    """

    bundle: Path
    data: Path
    seconds: float = 8.0
    rounds: int = 3
    callers: int = 64
    frontends: int = 0


# The null engine: what a front end stands before.

NULL_ENGINE = """
import asyncio, sys
from classer.serve.ops.listening import make_server
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierServicer, add_ClassifierServicer_to_server

LABELS = [pb.ScoredLabel(label=f"label number {i}", score=0.2, chosen=i == 0) for i in range(5)]

class Null(ClassifierServicer):
    async def Classify(self, request, context):
        return pb.ClassifyResponse(task="null", labels=LABELS, tokens=12, model="null", model_version="0123456789ab")

    async def ClassifyBatch(self, request, context):
        count = len(request.request_batch.requests) or len(request.text_batch.texts)
        answer = pb.ClassifyResponse(task="null", labels=LABELS, tokens=12, model="null", model_version="0123456789ab")
        return pb.ClassifyBatchResponse(items=[pb.ClassifyBatchItem(response=answer)] * count)

async def main():
    server = make_server()
    server.add_insecure_port(sys.argv[1])
    add_ClassifierServicer_to_server(Null(), server)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()

try:
    import uvloop; uvloop.install()
except ImportError:
    pass
asyncio.run(main())
"""

# Calls one address for some seconds, in a process of its own; prints how many texts were answered.
CALLER = """
import asyncio, json, sys, time
import grpc
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub
try:
    import uvloop; uvloop.install()
except ImportError:
    pass

address, callers, batch, seconds, texts = json.load(sys.stdin)

async def main():
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = ClassifierStub(channel)
        if batch:
            call = stub.ClassifyBatch
            starts = range(0, len(texts), batch)
            batches = [pb.TextBatch(texts=(texts * batch)[i : i + batch]) for i in starts]
            requests = [pb.ClassifyBatchRequest(text_batch=one) for one in batches]
        else:
            call, requests = stub.Classify, [pb.ClassifyRequest(text=text) for text in texts]
        end = time.monotonic() + seconds
        done, latencies, turn = 0, [], 0

        async def caller():
            nonlocal done, turn
            while time.monotonic() < end:
                request = requests[turn % len(requests)]
                turn += 1
                begin = time.monotonic()
                await call(request, timeout=60)
                latencies.append(time.monotonic() - begin)
                done += batch or 1
        begin = time.monotonic()
        await asyncio.gather(*(caller() for _ in range(callers)))
        took = time.monotonic() - begin
        latencies.sort()
        print(json.dumps([done / took, latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]]))

asyncio.run(main())
"""


def call(address: str, callers: int, batch: int, seconds: float, texts: Sequence[str]) -> tuple[float, float, float]:
    """Texts a second, and the median and 99th percentile of the latency in seconds; closed loop."""
    return run_caller([sys.executable, "-c", CALLER], address, callers, batch, seconds, texts)


def run_caller(
    command: list[str], address: str, callers: int, batch: int, seconds: float, texts: Sequence[str]
) -> tuple[float, float, float]:
    """Runs `call` with arguments from standard input, because a command line would be too long."""
    done = subprocess.run(
        command,
        input=json.dumps([address, callers, batch, seconds, list(texts)]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=seconds + 120,
    )
    rate, p50, p99 = json.loads(done.stdout)
    return rate, p50, p99


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def front_end(a: FrontEndBench) -> None:
    """Prints the ceiling of a front end."""
    with tempfile.TemporaryDirectory() as folder:
        engine = f"unix:{folder}/engine.sock"
        processes = []
        try:
            processes.append(
                subprocess.Popen([sys.executable, "-c", NULL_ENGINE, engine], stdout=subprocess.PIPE, text=True)
            )
            assert processes[0].stdout is not None
            processes[0].stdout.readline()
            drain(processes[0].stdout)
            config = json.dumps({"engine": engine, "port": 0})
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "classer.serve.rpc.frontend", config],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            front = processes[1]
            assert front.stdout is not None
            address = front.stdout.readline().split()[-1]
            drain(front.stdout)
            texts = ["my card has not arrived, and I have been waiting for two weeks now"] * 1024
            call(address, 4, 0, 1.0, texts)
            for what, to, process, callers, batch in (
                ("a Python gRPC handler that does nothing, unary calls", engine, processes[0], a.callers, 0),
                ("front end, unary calls", address, front, a.callers, 0),
                (f"front end, texts in ClassifyBatch({a.batch})", address, front, 4, a.batch),
            ):
                begin = cpu_seconds(process.pid)
                rate, p50, p99 = call(to, callers, batch, a.seconds, texts)
                used = cpu_seconds(process.pid) - begin
                print(
                    f"{what}: {rate:,.0f} a second here; {rate * a.seconds / used:,.0f} a second of its CPU time; "
                    f"p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms"
                )
        finally:
            for process in processes:
                process.kill()
                process.wait()


class Serving:
    """A server in a thread of this process, as `classer serve` would run it."""

    def __init__(self, **fields: Any) -> None:
        from classer.serve.rpc.server import ServeConfig, Server

        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

        async def start() -> Server:
            server = Server(ServeConfig(**{"port": 0, "drain_seconds": 5.0, **fields}))
            await server.start()
            assert await server.warm_up(asyncio.Event())
            return server

        self.server = asyncio.run_coroutine_threadsafe(start(), self.loop).result(600)

    @contextlib.contextmanager
    def admin(self) -> Iterator[ModelAdminStub]:
        """Its ModelAdmin; start it with an `admin_port`."""
        import grpc

        from classer.serve.proto.classifier_pb2_grpc import ModelAdminStub

        with grpc.insecure_channel(self.server.admin_address or "") as channel:
            yield ModelAdminStub(channel)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(60)


def engine(a: EngineBench) -> None:
    """Prints the overhead of each layer above the bare program."""
    from classer.data.readers import read_task_folder
    from classer.serve.core.work import Work

    texts = [example.text for example in read_task_folder(a.data).splits["test"]][:1024]
    serving = Serving(bundles=(f"bench={a.bundle}",), frontends=a.frontends)
    try:
        server = serving.server
        (model,) = server.models
        one = model.engine("")
        ids = list(model.bundle.tokenizer.encode(texts, model.bundle.max_length).ids)
        by_bucket: dict[int, list] = {}
        for row in ids:
            by_bucket.setdefault(next(b for b in one.buckets if b >= len(row)), []).append(row)
        print("texts by bucket:", {bucket: len(rows) for bucket, rows in sorted(by_bucket.items())})

        def bare() -> int:
            """Texts per second of the same texts in full batches of the best program, one after the other."""
            for bucket, rows in by_bucket.items():
                size = one.batch_for(bucket, 1 << 20)
                filled = (rows * (size // len(rows) + 1))[: max(len(rows) // size, 1) * size]
                for start in range(0, len(filled), size):
                    one.run(filled[start : start + size], bucket)
            return sum(
                max(len(rows) // one.batch_for(b, 1 << 20), 1) * one.batch_for(b, 1 << 20)
                for b, rows in by_bucket.items()
            )

        def scheduled() -> int:
            for future in server.scheduler.submit_all(Work(one, row) for row in ids):
                future.result()
            return len(ids)

        rates: dict[str, list[float]] = {}
        for number in range(a.rounds):
            for name, run in (
                ("bare program", lambda: timed(bare, a.seconds)),
                ("engine and scheduler", lambda: timed(scheduled, a.seconds)),
                ("ClassifyBatch(256), 2 callers", lambda: call(server.address, 2, 256, a.seconds, texts)[0]),
                (f"Classify, {a.callers} callers", lambda: call(server.address, a.callers, 0, a.seconds, texts)[0]),
                ("Classify, one by one", lambda: call(server.address, 1, 0, a.seconds, texts)[0]),
            ):
                rates.setdefault(name, []).append(run())
                print(f"round {number + 1}: {name}: {rates[name][-1]:,.0f} texts/s", flush=True)
    finally:
        serving.stop()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    bare_rate, engine_rate, batch_rate, unary_rate, single_rate = medians.values()
    print(f"engine / bare program: {engine_rate / bare_rate:.1%}")
    print(f"ClassifyBatch / engine: {batch_rate / engine_rate:.1%}")
    print(f"{a.callers} callers / one by one: {unary_rate / single_rate:.2f}×")


def timed(run: Callable[[], int], seconds: float) -> float:
    """Texts a second of `run`, called again and again."""
    texts, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        texts += run()
    return texts / took if took else 0.0


def main() -> None:
    arguments = tyro.extras.subcommand_cli_from_dict(
        {"front-end": FrontEndBench, "engine": EngineBench}, description=__doc__
    )
    {FrontEndBench: front_end, EngineBench: engine}[type(arguments)](arguments)


if __name__ == "__main__":
    main()
