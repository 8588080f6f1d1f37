"""Writing files and folders: complete under their name, or not there at all, also after a crash or on a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

# Why a disk takes no more, as the C library and libraries above it say it.
_DISK_ERRORS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
    errno.EROFS: "Read-only file system",
}


@contextlib.contextmanager
def atomic_write(path: Path, *, mode: int = 0o666, shared: bool = False) -> Iterator[Path]:
    """Writes a file under a temporary name beside it; renames it to `path`, over what is there, when the block ends.

    The file is flushed to disk before the rename. If the block raises, the temporary file is removed and `path` is as
    it was. A killed process leaves the temporary file, NAME.part, which the next writer of `path` replaces.

    Args:
      path: the file, in an existing folder.
      mode: permissions of the file, less the umask.
      shared: whether several processes may write `path` at the same time. Each then has a temporary name of its own.

    Yields:
      The temporary file, empty, to be written by its path.

    Raises:
      InputError: the disk is full, read-only or over its quota; the message names `path`.
      OSError: the file cannot be made.
    """
    part = _temporary(path, shared)
    with _naming_disk_errors(path):
        try:
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from None
        try:
            yield part
            _flush(part)
            part.replace(path)
            _flush(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def staged_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Fills a folder under a temporary name beside it and renames it to `path` when the block ends.

    All files are flushed to disk before the rename. If the block raises, the temporary folder is removed. A killed
    process leaves the temporary folder, NAME.part, which the next writer of `path` replaces.

    Args:
      path: the folder, which does not exist yet; its parents are made.
      shared: whether several processes may make `path`, of the same content, at the same time. Each then has a
        temporary name of its own, and the first to be done makes the folder.

    Yields:
      The temporary folder, empty.

    Raises:
      InputError: `path` exists, or the disk is full, read-only or over its quota; the message names `path`.
    """
    if path.exists() and not shared:
        raise InputError(f"{path} exists already and was not touched; name a new folder.")
    part = _temporary(path, shared)
    with _naming_disk_errors(path):
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            yield part
            for item in (*part.rglob("*"), part):
                _flush(item)
            try:
                part.rename(path)
            except OSError:
                if not (shared and path.is_dir()):
                    raise
                shutil.rmtree(part)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def disk_error(error: BaseException) -> str | None:
    """Why the disk took no more, where `error` says so, in a number or, as errors of other libraries do, in words."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return _DISK_ERRORS[error.errno]
    if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # NumPy
        return _DISK_ERRORS[errno.ENOSPC]
    return next((reason for reason in _DISK_ERRORS.values() if reason in str(error)), None)


def _temporary(path: Path, shared: bool) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part" if shared else f"{path.name}.part")


@contextlib.contextmanager
def _naming_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        if (reason := disk_error(e)) is None:
            raise
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        raise InputError(
            f"{path} could not be written: {reason[0].lower()}{reason[1:]} ({free / 1e6:,.0f} MB are free there). "
            f"Nothing of it was kept; make room, or name another place."
        ) from e


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's entries where the file system can tell, are on disk."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            _fsync(path)
    else:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
