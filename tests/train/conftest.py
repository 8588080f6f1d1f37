"""What tests of training share: programs, each compiled once, and a folder of toy tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from classer.tests.helpers import TOY_TASKS, write_task


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """JAX's persistent cache, in a folder of this test run alone."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else whether there is a cache stays as it was at the first compilation
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks and one that can only be evaluated."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in TOY_TASKS:
        write_task(folder, task, train=200, test=40)
    write_task(folder, dataclasses.replace(TOY_TASKS[0], name="later"), test=10)
    (folder / "notes").mkdir()
    return folder
