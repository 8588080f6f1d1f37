"""The front ends of one server: processes that share its port, started anew when they die."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from ...data.errors import InputError
from ..ops.log import logger
from ..ops.operations import OperationsConfig
from .frontend import FrontEndConfig

MAX_FRONT_ENDS = 64
# How long a new front end may take until it listens.
_START_SECONDS = 60.0
# Before one that died is started anew: one that cannot live must not keep the machine busy.
_RESTART_SECONDS = 0.5


class FrontEnds:
    """The front ends of one server. Made, and its methods called, on one running event loop.

    Args:
      count: how many.
      host: where they listen.
      port: likewise; 0 picks a free one.
      drain_seconds: how long they may take to end.
      operations: how each is guarded. They share keys' rates and quotas evenly, and each has a metrics port of its own,
        the first one above the server's, and so on.

    Raises:
      InputError: the address cannot be listened on.

    Attributes:
      address: "host:port" as it really is.
      engine: where they expect the engine: a Unix socket in a folder that only this user can enter.
    """

    def __init__(
        self, count: int, host: str, port: int, drain_seconds: float, operations: OperationsConfig | None = None
    ) -> None:
        self._count = count
        self._drain_seconds = drain_seconds
        # Held, but not listened on, so that the port stays ours while front ends come and go.
        self._held = _hold(host, port)
        port = self._held.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._folder = Path(tempfile.mkdtemp(prefix="classer-"))  # made with mode 0700
        self.engine = f"unix:{self._folder / 'engine.sock'}"
        self._config = FrontEndConfig(self.engine, host, port, drain_seconds, shared=True, share=1 / count)
        self._operations = operations or OperationsConfig()
        self._processes: list[asyncio.subprocess.Process] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._processes if process.returncode is None]

    async def start(self) -> None:
        """Starts all of them; returns once they listen.

        Raises:
          InputError: one could not be started.
        """
        for process in await asyncio.gather(*map(self._spawn, range(self._count))):
            self._keeping.append(asyncio.create_task(self._keep(len(self._keeping), process)))

    async def stop(self) -> None:
        """Lets them finish what they have taken on, and ends them."""
        self._stopping = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await asyncio.gather(*(self._end(process) for process in self._processes))
        for task in self._keeping:
            task.cancel()
        self._held.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _spawn(self, number: int) -> asyncio.subprocess.Process:
        config = dataclasses.replace(self._config, operations=self._operations.of_front_end(number))
        # Its standard input ends with this process. In a session of its own, so that Ctrl-C reaches this process only.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "classer.serve.rpc.frontend", json.dumps(dataclasses.asdict(config), default=str)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)
        except TimeoutError:
            line = b""
        if not line:
            self._processes.remove(process)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise InputError("A front end could not be started; what it said stands above.")
        return process

    async def _keep(self, number: int, process: asyncio.subprocess.Process) -> None:
        """Starts a front end anew when it dies. Its calls fail as UNAVAILABLE; all others are served by the rest."""
        while True:
            await _drain(process)
            await process.wait()
            self._processes.remove(process)
            if self._stopping:
                return
            logger.error("front end %d ended with code %s; starting another", process.pid, process.returncode)
            await asyncio.sleep(_RESTART_SECONDS)
            while True:
                try:
                    process = await self._spawn(number)
                    break
                except (InputError, OSError):
                    await asyncio.sleep(_RESTART_SECONDS)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), self._drain_seconds + 5)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _drain(process: asyncio.subprocess.Process) -> None:
    """Reads what a process writes until it ends: one that fills its pipe would block in writing."""
    assert process.stdout is not None
    while await process.stdout.read(1 << 16):
        pass


def _hold(host: str, port: int) -> socket.socket:
    """Binds a port that processes of ours may share, and nobody else has.

    Raises:
      InputError: it cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port is {port}; a port is a number from 0 (pick a free one) to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if port:  # with SO_REUSEPORT alone a second server would be let in
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        name = f"[{host}]" if ":" in host else host
        raise InputError(
            f"Cannot listen on {name}:{port}: {(error.strerror or str(error)).lower()}. Choose another --port (0 picks "
            "a free one) or --host."
        ) from None
    return held
