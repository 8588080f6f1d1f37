"""`classer serve`: loads bundles, compiles their programs, and serves gRPC until it is stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import threading
from pathlib import Path

import jax
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_health.v1.health_pb2 import HealthCheckResponse as Health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection
from tqdm import tqdm

from ...data.errors import InputError
from ..core.engine import TimedProgram
from ..core.models import AUTO, Model, Models, ModelSettings, named_folders
from ..core.report import model_summary
from ..core.scheduler import MAX_WAITING_TOKENS, Scheduler
from ..ops.cache import check_private
from ..ops.guard import Guard
from ..ops.listening import bind_server, make_server, run_loop
from ..ops.log import configure_logging, logger
from ..ops.operations import Operations, OperationsConfig
from ..proto import classifier_pb2 as pb
from ..proto.classifier_pb2_grpc import add_ClassifierServicer_to_server, add_ModelAdminServicer_to_server
from ..wire.errors import NotPossible
from .admin import ModelAdminService
from .frontends import MAX_FRONT_ENDS, FrontEnds
from .lifecycle import stop_signal
from .service import ClassifierService

CLASSIFIER_NAME = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
ADMIN_NAME = pb.DESCRIPTOR.services_by_name["ModelAdmin"].full_name
# The interpreter's switch interval, which delays the device's thread while the event loop runs. Python's default, 5 ms,
# is long beside a batch of some tens of milliseconds.
SWITCH_SECONDS = 0.0005
# The nice value of XLA's threads; the threads that receive calls have a higher priority.
DEVICE_NICE = 5
# How often the device loop is checked.
_WATCH_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class ServeConfig(OperationsConfig):
    """How to serve bundles.

    Attributes:
      bundles: the folders of the bundles, each FOLDER or NAME=FOLDER.
      loadable: further bundles, each FOLDER or NAME=FOLDER; ModelAdmin may load them later.
      host: the address to listen on; the default is reachable from this machine only.
      port: the port to listen on; 0 picks a free one. The last line printed names it.
      admin_port: the port of ModelAdmin (load, unload, list, default version), on this machine only; 0 picks a free
        one; by default ModelAdmin is off.
      drain_seconds: seconds that requests in flight may take after SIGTERM or SIGINT.
      stall_seconds: seconds after which a running batch counts as stuck; the health is then NOT_SERVING.
      focus: the share of tokens to keep, as the mean over layers, or one share a layer, separated by commas; 1 keeps
        all. A focus below 1 needs a bundle trained with --focus-epochs. Of several, each request may choose one; the
        first is the default.
      precision: the precision of the programs: float32, bfloat16 or int8; auto takes the fastest for each length, as
        measured at the start.
      max_waiting_tokens: tokens that wait for the device at most; more are refused with RESOURCE_EXHAUSTED.
      frontends: number of processes that receive calls and pass them in batches to the process with the device. One
        Python process receives some thousands of calls a second; 0 uses one process for everything.
    """

    bundles: tuple[str, ...]
    loadable: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 50051
    admin_port: int | None = None
    drain_seconds: float = 30.0
    stall_seconds: float = 60.0
    focus: tuple[str, ...] = ("1",)
    precision: str = AUTO
    max_waiting_tokens: int = MAX_WAITING_TOKENS
    frontends: int = 0

    def __post_init__(self) -> None:
        if not self.bundles:
            raise InputError("No bundle was named; give the folder of at least one. `classer train` writes them.")
        if not 0 <= self.frontends <= MAX_FRONT_ENDS:
            raise InputError(f"--frontends is {self.frontends}; it lies between 0 and {MAX_FRONT_ENDS}.")
        for name in ("drain_seconds", "stall_seconds", "max_waiting_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0.")


def serve(config: ServeConfig, settings: ModelSettings | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns. Call it from the main thread.

    If the device is lost, the process keeps running with the health NOT_SERVING, until its supervisor restarts it.

    Args:
      config: how to serve.
      settings: how the models are compiled; by default in the focuses and the precision of `config`.

    Raises:
      InputError: a bundle cannot be used, or an address cannot be bound.
    """
    # Front ends log the calls; this process only sees their batches.
    configure_logging(config.log_format, access=config.access_log and not config.frontends)
    sys.setswitchinterval(SWITCH_SECONDS)
    _yield_to_calls()
    run_loop(_serve(config, settings))


def _yield_to_calls() -> None:
    """Lowers the priority of XLA's CPU threads, so that a call need not wait for a batch.

    On Linux a thread inherits the priority of the thread that starts it.
    """

    def start_backend() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), DEVICE_NICE)
        jax.devices()

    thread = threading.Thread(target=start_backend, name="classer-backend")
    thread.start()
    thread.join()


async def _serve(config: ServeConfig, settings: ModelSettings | None) -> None:
    stop = stop_signal()
    server = Server(config, settings)
    await server.start()
    try:
        if await server.warm_up(stop):
            await stop.wait()
    finally:
        await server.stop()


class Server:
    """One server: ports, models, scheduler and services. Made and used on one running event loop.

    Args:
      config: its configuration.
      settings: as for `serve`.

    Raises:
      InputError: an address cannot be bound, or a bundle has no valid name.

    Attributes:
      address: the real "host:port".
      admin_address: the address of ModelAdmin; None if it is off.
    """

    def __init__(self, config: ServeConfig, settings: ModelSettings | None = None) -> None:
        self._config = config
        self.operations = Operations(config)
        add_port = self.operations.add_port
        self._front_ends = None
        # Ports first, because they fail fastest.
        if config.frontends:
            self._front_ends = FrontEnds(config.frontends, config.host, config.port, config.drain_seconds, config)
            self.address = self._front_ends.address
            # The front ends guard the calls; this guard only turns errors into statuses.
            self._grpc = make_server(interceptors=[Guard(max_calls=sys.maxsize, max_bytes=sys.maxsize)])
            self._grpc.add_insecure_port(self._front_ends.engine)
        else:
            self._grpc = self.operations.make_server()
            self.address = bind_server(self._grpc, config.host, config.port, "--port", add_port=add_port)
        self._admin_grpc = self.operations.make_server()
        self.admin_address = None
        if config.admin_port is not None:
            self.admin_address = bind_server(
                self._admin_grpc, "127.0.0.1", config.admin_port, "--admin-port", host_option=None, add_port=add_port
            )
        if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            check_private(Path(cache))
        self._first = list(named_folders(config.bundles))
        folders = named_folders([*config.bundles, *config.loadable])
        self.models = Models(folders, settings or ModelSettings(config.focus, config.precision))
        self._loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(
            max_waiting_tokens=config.max_waiting_tokens,
            depth=1 if jax.default_backend() == "cpu" else 2,
            on_death=self._device_lost,
            on_batch=self.operations.batch_ran,
        )
        self.operations.watch_device(
            waiting_tokens=lambda: self.scheduler.waiting_tokens,
            max_waiting_tokens=config.max_waiting_tokens,
            alive=lambda: self.scheduler.alive and self.scheduler.running_seconds <= config.stall_seconds,
        )
        self._service = ClassifierService(self.models, self.scheduler)
        self._admin = ModelAdminService(self.models)
        self._health = health_aio.HealthServicer()
        self._watching: asyncio.Task[None] | None = None
        add_ClassifierServicer_to_server(self._service, self._grpc)
        add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((CLASSIFIER_NAME, HEALTH_NAME, reflection.SERVICE_NAME), self._grpc)
        add_ModelAdminServicer_to_server(self._admin, self._admin_grpc)
        reflection.enable_server_reflection((ADMIN_NAME, reflection.SERVICE_NAME), self._admin_grpc)

    async def start(self) -> None:
        """Starts to listen; calls fail with UNAVAILABLE until `warm_up` has ended."""
        await self._say(Health.NOT_SERVING)
        await self._grpc.start()
        await self._admin_grpc.start()
        if self._front_ends is not None:
            await self._front_ends.start()

    async def warm_up(self, stop: asyncio.Event) -> bool:
        """Loads every bundle, compiles its programs, and sets the health to SERVING; False if `stop` was set before.

        Raises:
          InputError: a bundle cannot be used.
        """
        for name in self._first:
            print(f"Loading {self.models.folders[name]} …", flush=True)
            try:
                model = await self._load(name, stop)
            except NotPossible:
                if not stop.is_set():
                    raise
            if stop.is_set():
                return False
            print(model_summary(model), flush=True)
        self.scheduler.start()
        self._service.calls.ready = self._admin.calls.ready = True
        self._watching = asyncio.create_task(self._watch())
        await self._say(Health.SERVING)
        if self.operations.metrics_port is not None:
            print(f"Metrics on http://{self._config.metrics_host}:{self.operations.metrics_port}/metrics", flush=True)
        if self.admin_address:
            print(f"ModelAdmin answers on {self.admin_address}", flush=True)
        tasks = [
            f"{task.name} ({len(task.labels)} labels)" for one in self.models for task in one.answers.tasks.values()
        ]
        print(f"Serving {', '.join(tasks)} on {self.address}", flush=True)
        return True

    async def stop(self) -> None:
        """Refuses new calls, lets those in flight finish, at most `drain_seconds`, and ends every thread."""
        if self._watching is not None:
            self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        if self._front_ends is not None:
            await self._front_ends.stop()  # first, because the engine answers the calls that they still have
        await self._service.calls.stop((self._grpc, self._admin_grpc), self._config.drain_seconds)
        await asyncio.to_thread(self.scheduler.close, self._config.drain_seconds)
        self.models.close()
        self.operations.close()

    async def _load(self, name: str, stop: asyncio.Event) -> Model:
        with tqdm(desc="Compiling programs", unit="program", delay=0.01) as bar:  # not before there is one

            def progress(model: Model, warmed: TimedProgram | None) -> bool:
                bar.total = sum(engine.steps for engine in model.engines.values())
                if warmed is not None:
                    bar.set_postfix_str(
                        f"{warmed.batch_size} × {warmed.length} tokens, {warmed.precision}", refresh=False
                    )
                    bar.update()
                return not stop.is_set()

            return await self.models.load(name, progress=progress)

    async def _watch(self) -> None:
        """Sets the health to NOT_SERVING while a batch hangs, and back to SERVING if it ends."""
        healthy = True
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            stuck = self.scheduler.running_seconds > self._config.stall_seconds
            if not self.scheduler.alive:  # checked last: a dead device has no running batch
                return
            if healthy == stuck:
                healthy = not stuck
                logger.warning("the device %s", "is stuck" if stuck else "goes on")
                await self._say(Health.SERVING if healthy else Health.NOT_SERVING)

    async def _say(self, status: Health.ServingStatus) -> None:
        for name in ("", CLASSIFIER_NAME):
            # If the device dies meanwhile, NOT_SERVING must stay the last status.
            await self._health.set(name, status if self.scheduler.alive else Health.NOT_SERVING)

    def _device_lost(self) -> None:
        """Called in the scheduler's thread."""
        asyncio.run_coroutine_threadsafe(self._say(Health.NOT_SERVING), self._loop)
