"""Starting, counting and draining calls: the same for a server's services and for a front end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence

import grpc.aio

from ..wire.errors import Unavailable

# Seconds for sending the last responses, after their calls have ended.
_SEND_SECONDS = 0.5


class Lifecycle:
    """The calls of a service: counted while they run, refused until it is ready, drained when it stops.

    Used on one event loop.

    Args:
      ready: whether calls are accepted from the start.

    Attributes:
      ready: whether calls are accepted.
      in_flight: number of running calls.
    """

    def __init__(self, *, ready: bool) -> None:
        self.ready = ready
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Counts a call while it runs.

        Raises:
          Unavailable: the service is not ready.
        """
        if not self.ready:
            raise Unavailable("The server is still compiling its programs; wait until its health says SERVING.")
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def stop(self, servers: Sequence[grpc.aio.Server], seconds: float) -> None:
        """Refuses new calls, waits at most `seconds` for the running ones, and closes the servers."""
        stopping = [asyncio.create_task(server.stop(seconds)) for server in servers]
        # gRPC's own wait includes calls that watch the health, which never end.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        for server in servers:
            await server.stop(_SEND_SECONDS)
        await asyncio.gather(*stopping)


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. Call it on the event loop of the main thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    return stop
