"""The front ends of one server: processes that share its port, and are restarted when they die."""

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
from ..ops.listening import address_of, bind, check_free
from ..ops.log import logger
from ..ops.operations import OperationsConfig
from .frontend import FrontEndConfig

MAX_FRONT_ENDS = 64
# Seconds that a front end may take to start.
_START_SECONDS = 60.0
# The pause before a restart, which limits the load of a front end that fails at every start.
_RESTART_SECONDS = 0.5


class FrontEnds:
    """The front ends of one server. Made and used on one running event loop.

    Args:
      count: number of front ends.
      host: the address that they listen on.
      port: the port that they share; 0 picks a free one.
      drain_seconds: seconds that their calls in flight may take at the end.
      operations: the security and operation of each. Keys' rates and quotas are divided evenly, and each has its own
        metrics port: the server's plus 1, plus 2, and so on.

    Raises:
      InputError: the address cannot be bound.

    Attributes:
      address: the real "host:port".
      engine: the engine's address: a Unix socket in a folder that only this user can enter.
    """

    def __init__(
        self, count: int, host: str, port: int, drain_seconds: float, operations: OperationsConfig | None = None
    ) -> None:
        self._count = count
        self._drain_seconds = drain_seconds
        # Bound but not listening: keeps the port while front ends are restarted.
        self._held = bind(host, port, "--port", _hold)
        port = self._held.getsockname()[1]
        self.address = address_of(host, port)
        self._folder = Path(tempfile.mkdtemp(prefix="classer-"))  # made with mode 0700
        self.engine = f"unix:{self._folder / 'engine.sock'}"
        self._config = FrontEndConfig(self.engine, host, port, drain_seconds, shared=True, share=1 / count)
        self._operations = operations or OperationsConfig()
        self._processes: list[asyncio.subprocess.Process] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def pids(self) -> list[int]:
        """The process ids of the front ends that run."""
        return [process.pid for process in self._processes if process.returncode is None]

    async def start(self) -> None:
        """Starts all front ends; returns once they listen.

        Raises:
          InputError: a front end could not be started.
        """
        for process in await asyncio.gather(*map(self._spawn, range(self._count))):
            self._keeping.append(asyncio.create_task(self._keep(len(self._keeping), process)))

    async def stop(self) -> None:
        """Lets all front ends finish their calls, and ends them."""
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
        # Standard input ends with this process, and so does the front end. A session of its own keeps Ctrl-C from it.
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
        """Restarts a front end when it dies. Its calls fail as UNAVAILABLE; other front ends are not affected."""
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
    """A socket bound to a port that only this server's processes share. Raises OSError if the port is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if port:  # with SO_REUSEPORT alone a second server would be let in
        check_free(host, port)
    held = socket.socket(family, kind, protocol)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held
