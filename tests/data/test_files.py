"""Atomic files and folders: complete or absent after an error, a kill during the write, and on a full disk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from classer.data.errors import InputError
from classer.data.files import atomic_write, disk_error, staged_folder

LIMIT = 1 << 20  # the largest file size while a full disk is simulated


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Makes the kernel fail every write beyond 1 MiB of a file (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; the test is skipped if it cannot be mounted."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text("old")
    with atomic_write(path) as part:
        assert part == tmp_path / "facts.json.part"
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["facts.json"]


def write_file(path: Path, write: Callable[[Path], None], *, shared: bool = False) -> None:
    with atomic_write(path, shared=shared) as part:
        write(part)


def write_folder(path: Path, write: Callable[[Path], None], *, shared: bool = False) -> None:
    with staged_folder(path, shared=shared) as staging:
        (staging / "deep").mkdir()
        write(staging / "deep" / "file")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("shared", [False, True])
def test_an_error_in_the_middle_leaves_what_was_there(tmp_path: Path, error: type[BaseException], shared: bool) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write_file(tmp_path / "file", fail, shared=shared)
    with pytest.raises(error):
        write_folder(tmp_path / "folder", fail, shared=shared)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def _killed(path: Path, folder: Path) -> None:
    with atomic_write(path) as part, staged_folder(folder) as staging:
        part.write_text("half")
        (staging / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_replaced_by_the_next(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(path, folder))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["file.part", "folder.part"]
    with atomic_write(path) as part:
        assert part.read_text() == ""
        part.write_text("whole")
    with staged_folder(folder) as staging:
        assert names(staging) == []
        (staging / "other").write_text("whole")
    assert names(tmp_path) == ["file", "folder"]
    assert names(folder) == ["other"]


def test_all_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def note(what: str, path: Path | str) -> None:
        events.append((what, Path(path).name))

    monkeypatch.setattr(os, "fsync", lambda fd: (note("fsync", os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (note("rename", self), replace(self, to))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (note("rename", self), rename(self, to))[1])
    with atomic_write(tmp_path / "file") as part:
        part.write_text("x")
    assert events == [("fsync", "file.part"), ("rename", "file.part"), ("fsync", tmp_path.name)]
    events.clear()
    with staged_folder(tmp_path / "folder") as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "inner").write_text("x")
    assert set(events[:3]) == {("fsync", "deep"), ("fsync", "inner"), ("fsync", "folder.part")}
    assert events[3:] == [("rename", "folder.part"), ("fsync", tmp_path.name)]


def test_permissions_are_the_asked_ones_from_the_first_byte_on(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "keys", mode=0o600) as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
        part.write_text("secret")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600
    with atomic_write(tmp_path / "file") as part:
        part.write_text("x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "file.part").symlink_to(tmp_path / "other")
    with atomic_write(tmp_path / "file") as part:
        part.write_text("ours")
    assert (tmp_path / "other").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours"


def test_shared_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        with atomic_write(tmp_path / "file", shared=True) as part:
            barrier.wait()
            part.write_text(str(number) * 1000)
        with staged_folder(tmp_path / "folder", shared=True) as staging:
            (staging / "file").write_text("same")
            barrier.wait()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["file", "folder"]
    assert len(set((tmp_path / "file").read_text())) == 1
    assert (tmp_path / "folder" / "file").read_text() == "same"


def test_a_folder_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists already and was not touched"), staged_folder(tmp_path / "out"):
        pytest.fail("nothing may be computed for it")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as e, atomic_write(tmp_path / "none" / "file"):
        pass
    assert e.value.filename == str(tmp_path / "none" / "file")


def _as_text(part: Path) -> None:
    part.write_text("x" * 2 * LIMIT)


def _as_numpy(part: Path) -> None:
    with part.open("wb") as file:
        np.save(file, np.zeros(2 * LIMIT, np.uint8))


def _as_npz(part: Path) -> None:
    with part.open("wb") as file:
        np.savez(file, zeros=np.zeros(2 * LIMIT, np.uint8))


def _as_safetensors(part: Path) -> None:
    save_file({"zeros": np.zeros(2 * LIMIT, np.uint8)}, part)


WRITERS = [_as_text, _as_numpy, _as_npz, _as_safetensors]


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_takes_no_more_is_a_sentence_that_names_the_file(tmp_path: Path, full_disk, write) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match=rf"{tmp_path}/file could not be written: .*MB are free"):
        write_file(tmp_path / "file", write)
    with pytest.raises(InputError, match=rf"{tmp_path}/folder could not be written: "):
        write_folder(tmp_path / "folder", write)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_file_system_is_a_sentence_and_is_left_empty(tiny_disk: Path, write) -> None:
    with pytest.raises(InputError, match="file could not be written: no space left on device"):
        write_file(tiny_disk / "file", write)
    with pytest.raises(InputError, match="folder could not be written: no space left on device"):
        write_folder(tiny_disk / "folder", write)
    assert names(tiny_disk) == []


def test_an_error_of_another_kind_is_no_disk_error(tmp_path: Path) -> None:
    assert disk_error(FileNotFoundError(2, "No such file or directory")) is None
    assert disk_error(ValueError("a bug")) is None
    with pytest.raises(OSError, match="No space left on device") as e, open("/dev/full", "w") as full:
        full.write("x")
    assert disk_error(e.value) == "No space left on device"
    with pytest.raises(ValueError, match="a bug"), atomic_write(tmp_path / "file"):
        raise ValueError("a bug")


if sys.platform != "linux":
    pytestmark = pytest.mark.skip("the kernel's own limits and /proc are used")
