"""The check of JAX's compile cache. Its programs are executed, so only this user may write to the folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ...data.errors import InputError


def check_private(folder: Path) -> None:
    """Checks that only this user can write to a folder. A missing folder is made, with mode 0700.

    Raises:
      InputError: another user owns it or can write to it, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise InputError(
            f"The compile cache {folder} cannot be used: {(error.strerror or str(error)).lower()}."
        ) from None
    if status.st_uid != os.getuid():
        raise InputError(
            f"The compile cache {folder} belongs to another user, who could put programs there that this server would "
            "run. Name a folder of your own in JAX_COMPILATION_CACHE_DIR."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"Others can write to the compile cache {folder}, and so put programs there that this server would run. "
            f"Take that right away (chmod go-w {folder}), or name another folder in JAX_COMPILATION_CACHE_DIR."
        )
