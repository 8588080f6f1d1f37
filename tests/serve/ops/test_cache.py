"""Whose folder compiled programs are read from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from classer.data.errors import InputError
from classer.serve.ops.cache import check_private


def test_a_folder_that_is_not_there_is_made_private(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "programs"
    check_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    check_private(folder)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(InputError, match=f"chmod go-w {tmp_path}"):
        check_private(tmp_path)
    tmp_path.chmod(0o755)  # others may read
    check_private(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="skipped: only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    with pytest.raises(InputError, match="belongs to another user"):
        check_private(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(InputError, match="belongs to another user"):
        check_private(link)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used: not a directory"):
        check_private(tmp_path / "file" / "programs")
