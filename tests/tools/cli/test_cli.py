"""The command line's own care for the process: where compiled programs are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from classer.tools.cli.main import keep_compiled_programs

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLASSER_CACHE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "to be restored")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    monkeypatch.delenv(VARIABLE)
    return tmp_path / "programs"


def test_compiled_programs_are_kept_in_a_folder_of_the_user_alone(cache: Path) -> None:
    keep_compiled_programs()
    assert os.environ[VARIABLE] == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    keep_compiled_programs()
    assert VARIABLE not in os.environ


def test_the_users_own_choice_stands(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "elsewhere")
    keep_compiled_programs()
    assert os.environ[VARIABLE] == "elsewhere"


def test_no_folder_to_write_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLASSER_CACHE", str(tmp_path / "file"))
    keep_compiled_programs()
    assert VARIABLE not in os.environ
