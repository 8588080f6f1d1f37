"""What tests of training share: a folder of toy tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from classer.tests.helpers import TOY_TASKS, write_task


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks and one that can only be evaluated."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in TOY_TASKS:
        write_task(folder, task, train=200, test=40)
    write_task(folder, dataclasses.replace(TOY_TASKS[0], name="later"), test=10)
    (folder / "notes").mkdir()
    return folder
