"""A real server on a real port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from classer.model.bundle import Bundle, save_bundle
from classer.serve.rpc.server import ServeConfig, Server

T = TypeVar("T")
TIMEOUT = 60.0
START_TIMEOUT = 180.0  # compiling takes its time where other jobs run beside it


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """A bundle of a tiny encoder with random weights, that reads 48 tokens and answers two tasks."""
    path = tmp_path_factory.mktemp("serve") / "bundle"
    save_bundle(tiny_bundle, path)
    return path


class Running:
    """A server in a thread.

    Attributes:
      server: its parts; touch them only through `call`, or where they are safe from any thread.
      address: where it answers.
    """

    def __init__(self, config: ServeConfig, *, warm: bool) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self.server = self.call(self._start(config, warm), START_TIMEOUT)
        except BaseException:
            self._end()
            raise
        self.address = self.server.address

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float = TIMEOUT) -> T:
        """Runs a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def stop(self) -> None:
        self.call(self.server.stop())
        self._end()

    @staticmethod
    async def _start(config: ServeConfig, warm: bool) -> Server:
        server = Server(config)
        await server.start()
        try:
            if warm:
                assert await server.warm_up(asyncio.Event())
        except BaseException:
            await server.stop()
            raise
        return server

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """Starts a server of bundles: `with start_server(bundle, …, warm=True, **ServeConfig fields) as running`.

    It computes in float32 unless told otherwise, so that little is compiled.
    """

    @contextlib.contextmanager
    def start(*bundles: Path | str, warm: bool = True, **fields: Any) -> Iterator[Running]:
        given = {"port": 0, "drain_seconds": 5.0, "precision": "float32", **fields}
        running = Running(ServeConfig(bundles=tuple(map(str, bundles)), **given), warm=warm)
        try:
            yield running
        finally:
            running.stop()

    return start
