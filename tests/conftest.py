"""Shared fixtures: the compilation cache, real data sets, a real pretrained encoder, a tiny bundle and encoder."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from classer.data.errors import InputError
from classer.model.bundle import Bundle
from classer.model.pretrained import fetch_encoder
from classer.tests.helpers import make_bundle, write_encoder

# JAX's persistent cache, so that a program of several tests or child processes is compiled once.
COMPILED = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


def pytest_configure(config: pytest.Config) -> None:
    """Sets up the folder of compiled programs: $JAX_COMPILATION_CACHE_DIR, or a new one for this run.

    Child processes of tests inherit it in their environment.
    """
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, which inherits the run's folder
        return
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = tempfile.mkdtemp(prefix="classer-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in (COMPILED | {"jax_compilation_cache_dir": folder}).items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Restores the logging configuration, which a server in this process changes."""
    root, access = logging.getLogger("classer"), logging.getLogger("classer.access")
    before = (root.handlers, root.level, root.propagate, access.disabled)
    yield
    root.handlers, root.level, root.propagate, access.disabled = before


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The folder of real data sets: $CLASSER_DATASETS, or `shared/datasets` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "datasets"
    folder = Path(os.environ.get("CLASSER_DATASETS") or beside)
    if not folder.is_dir():
        pytest.skip("skipped: no data sets")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, fetched once into the cache."""
    try:
        return fetch_encoder()
    except InputError as e:
        pytest.skip(f"skipped: {e}")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An unsaved float32 bundle with a tiny random encoder."""
    return make_bundle(tmp_path_factory.mktemp("tiny_bundle"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random encoder in Hugging Face's layout; tests must not write to it."""
    return write_encoder(tmp_path_factory.mktemp("tiny_encoder"))
