"""`classer serve`: one process that loads a bundle, compiles its programs, and answers over gRPC until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from tqdm import tqdm

from ..data.errors import InputError
from ..model.bundle import load_bundle
from ..model.focus import Focus
from .answers import Answers
from .engine import Engine, Warmed
from .limits import MAX_MESSAGE_BYTES
from .proto import classifier_pb2 as pb
from .proto.classifier_pb2_grpc import add_ClassifierServicer_to_server
from .scheduler import MAX_WAITING_TOKENS, Scheduler
from .service import ClassifierService
from .tokenizing import TokenizerStage

CLASSIFIER_NAME = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
Health = health_pb2.HealthCheckResponse
# How long the last answers may take onto the wire, once they are given.
_SEND_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How to serve a bundle.

    Attributes:
      bundle: the folder of the bundle.
      host: the address to listen on; the default is reachable from this machine only.
      port: 0 picks a free one, which the last line printed names.
      drain_seconds: how long requests in flight may still take after SIGTERM or SIGINT.
      focus: the share of all tokens to keep on the mean over layers, or one share a layer with commas between; 1 is
        all. The bundle must have been trained with --focus-epochs.
      max_waiting_tokens: how many tokens may wait for the device before requests are refused as RESOURCE_EXHAUSTED.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 50051
    drain_seconds: float = 30.0
    focus: str = "1"
    max_waiting_tokens: int = MAX_WAITING_TOKENS


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns. Call it from the main thread.

    If the device is lost meanwhile it stays, with its health NOT_SERVING, for whoever watches that to replace it.

    Raises:
      InputError: the bundle cannot be used, or the address not be listened on.
    """
    asyncio.run(_serve(config))


async def _serve(config: ServeConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    server = Server(config)
    await server.start()
    try:
        if await server.warm_up(stop):
            await stop.wait()
    finally:
        await server.stop()


class Server:
    """The parts of one server, put together. Made, and its methods called, on one running event loop.

    Args:
      config: what to serve, and where.

    Raises:
      InputError: the address cannot be listened on, or the bundle not be used.

    Attributes:
      address: "host:port" as it really is.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        # Two servers on one port would share its requests at random; refuse the second one instead.
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._grpc = grpc.aio.server(options=options)
        self.address = _listen(self._grpc, config.host, config.port)  # first, because it fails fastest
        print(f"Loading {config.bundle} …", flush=True)
        self._bundle = load_bundle(config.bundle)
        focus = Focus.parse(config.focus, self._bundle.encoder.num_layers)
        self._engine = Engine(
            self._bundle.predictor(focus=focus),
            max_length=self._bundle.max_length,
            pad_id=self._bundle.tokenizer.pad_id,
        )
        self._tokenizer = TokenizerStage(self._bundle.tokenizer, self._bundle.max_length)
        self._loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(
            self._engine,
            max_waiting_tokens=config.max_waiting_tokens,
            on_death=self._device_lost,
        )
        answers = Answers(self._bundle.taxonomy, self._bundle.calibration, self._bundle.version)
        self._service = ClassifierService(self._tokenizer, self.scheduler, answers, focused=self._engine.focused)
        self._health = health_aio.HealthServicer()
        add_ClassifierServicer_to_server(self._service, self._grpc)
        add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((CLASSIFIER_NAME, HEALTH_NAME, reflection.SERVICE_NAME), self._grpc)

    async def start(self) -> None:
        """Answers from now on: that it is not ready, until `warm_up` is through."""
        await self._say(Health.NOT_SERVING)
        await self._grpc.start()

    async def warm_up(self, stop: asyncio.Event) -> bool:
        """Compiles and runs every program, then says SERVING; False if `stop` was set before that."""
        await asyncio.to_thread(self._bundle.tokenizer.encode, ["warm up"], self._bundle.max_length)
        programs = self._engine.warm_up()
        with tqdm(total=len(self._engine.shapes), desc="Compiling programs", unit="program") as bar:
            while not stop.is_set() and (warmed := await asyncio.to_thread(next, programs, None)):
                bar.set_postfix_str(f"{warmed.batch_size} × {warmed.length} tokens")
                bar.update()
        if stop.is_set():
            return False
        print(_describe(self._engine.programs), flush=True)
        self.scheduler.start()
        self._service.ready = True
        await self._say(Health.SERVING)
        tasks = ", ".join(f"{task.name} ({len(task.labels)} labels)" for task in self._bundle.taxonomy.tasks)
        bundle = self._bundle
        print(f"Serving {tasks}, {bundle.precision}, version {bundle.version}, on {self.address}", flush=True)
        return True

    async def stop(self) -> None:
        """Takes on nothing more, lets what is in flight finish for `drain_seconds`, and ends every thread."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._grpc.stop(self._config.drain_seconds))
        # gRPC would wait for those who watch the health too, and they never leave: only classifying counts.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._service.idle.wait(), self._config.drain_seconds)
        await self._grpc.stop(_SEND_SECONDS)
        await stopping
        await asyncio.to_thread(self.scheduler.close, self._config.drain_seconds)
        self._tokenizer.close()

    async def _say(self, status: Health.ServingStatus) -> None:
        for name in ("", CLASSIFIER_NAME):
            await self._health.set(name, status)

    def _device_lost(self) -> None:
        """Called in the scheduler's thread."""
        asyncio.run_coroutine_threadsafe(self._say(Health.NOT_SERVING), self._loop)


def _listen(server: grpc.aio.Server, host: str, port: int) -> str:
    """Binds the server's port; the real address.

    Raises:
      InputError: it cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port is {port}; a port is a number from 0 (pick a free one) to 65535.")
    name = f"[{host}]" if ":" in host else host
    try:
        return f"{name}:{server.add_insecure_port(f'{name}:{port}')}"
    except RuntimeError:
        raise InputError(
            f"Cannot listen on {name}:{port}: {_why_not(host, port)}. "
            "Choose another --port (0 picks a free one) or --host."
        ) from None


def _why_not(host: str, port: int) -> str:
    """The operating system's reason why an address cannot be bound, which gRPC only logs."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "gRPC refused it"


def _describe(programs: list[Warmed]) -> str:
    """What was compiled, and what to expect of it, in a sentence."""
    seconds = sum(warmed.compile_seconds for warmed in programs)
    rates = []
    for length in sorted({warmed.length for warmed in programs}):
        rate = max(warmed.batch_size / warmed.run_seconds for warmed in programs if warmed.length == length)
        rates.append(f"{rate:,.0f} of up to {length} tokens")
    return f"Compiled {len(programs)} programs in {seconds:.0f} s. Expect, texts a second: {', '.join(rates)}."
