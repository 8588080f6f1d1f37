"""A real server on a real port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import pytest

from classer.data.taxonomy import Label, Task, TaskKind, Taxonomy
from classer.data.tokenizer import WordPieceTokenizer
from classer.model.bundle import Bundle, save_bundle
from classer.model.classifier import TextClassifier
from classer.model.config import EncoderConfig
from classer.model.decode import Calibration
from classer.model.quantize import flatten
from classer.serve.server import ServeConfig, Server

T = TypeVar("T")
TIMEOUT = 60.0
VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    ".",
    "?",
    "my",
    "card",
    "has",
    "not",
    "arrived",
    "where",
    "is",
    "the",
    "money",
]
TAXONOMY = Taxonomy(
    (
        Task("topic", TaskKind.MULTICLASS, tuple(Label(f"topic {i}") for i in range(7))),
        Task("tags", TaskKind.MULTILABEL, (Label("urgent"), Label("angry"), Label("spam"))),
    )
)


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny encoder with random weights, that reads 48 tokens and answers two tasks."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    config = EncoderConfig(len(VOCAB), num_layers=2, d_model=32, num_heads=2, d_ff=64, max_positions=48)
    model = TextClassifier(config, TAXONOMY.num_labels)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))["params"]
    weights = flatten(params)
    weights["head.kernel"] = 20 * weights["head.kernel"]  # else all texts look alike to it
    bundle = Bundle(
        encoder=config,
        taxonomy=TAXONOMY,
        tokenizer=WordPieceTokenizer(folder / "vocab.txt"),
        weights=weights,
        precision="float32",
        calibration={"topic": Calibration(1.5), "tags": Calibration(0.8, (0.3, 0.5, 0.7))},
        golden_texts=("my card has not arrived",),
        card="A test's bundle.",
        max_length=48,
    )
    save_bundle(bundle, folder / "bundle")
    return folder / "bundle"


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
            self.server = self.call(self._start(config, warm))
        except BaseException:
            self._end()
            raise
        self.address = self.server.address

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT)

    def stop(self) -> None:
        self.call(self.server.stop())
        self._end()

    @staticmethod
    async def _start(config: ServeConfig, warm: bool) -> Server:
        server = Server(config)
        await server.start()
        if warm:
            assert await server.warm_up(asyncio.Event())
        return server

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT)
        self._loop.close()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """Starts a server of a bundle: `with start_server(bundle, warm=True, **ServeConfig fields) as running`."""

    @contextlib.contextmanager
    def start(bundle: Path, *, warm: bool = True, **fields: Any) -> Iterator[Running]:
        running = Running(ServeConfig(bundle=bundle, **{"port": 0, "drain_seconds": 5.0, **fields}), warm=warm)
        try:
            yield running
        finally:
            running.stop()

    return start
