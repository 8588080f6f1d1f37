"""The folder `OUT.part` of finished chunks, from which the output is assembled.

Each finished chunk is a file that is written atomically. A run that is killed loses at most its unfinished chunks, and
the same command continues after the finished ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from classer.data.errors import InputError
from classer.data.files import atomic_write

from .chunks import Chunk, RejectedRow
from .output import OutputFormat


class Part(NamedTuple):
    """A finished chunk: a file whose name holds the other attributes.

    Attributes:
      path: the file of its rows; its rejects, if any, are in one of the same name with `.rejects`.
      digest: the hash of the input's chunk.
      rows, rejected: how many rows it holds, and how many were rejected.
    """

    path: Path
    digest: str
    rows: int
    rejected: int


class Parts:
    """The folder of one output file.

    Args:
      out: the output file.
      rejects: the file of rejected rows.
    """

    def __init__(self, out: Path, rejects: Path) -> None:
        self._out, self._rejects = out, rejects
        self.folder = out.with_name(out.name + ".part")
        self._done: dict[int, Part] = {}

    def check(self) -> None:
        """Raises InputError if the output exists already or cannot be written."""
        if self._out.exists():
            raise InputError(f"{self._out} exists already and was not touched; name a new file with --out.")
        if self._rejects.exists() and not self.folder.exists():
            raise InputError(f"{self._rejects} exists already and was not touched; name a new one with --rejects.")
        if not self._out.absolute().parent.is_dir():
            raise InputError(f"--out is {self._out}, but there is no folder {self._out.parent}; make it first.")

    @contextlib.contextmanager
    def opened(self, job: Mapping[str, Any]) -> Iterator[None]:
        """Locks the folder, which is made if it does not exist.

        Args:
          job: see `BulkJob.fingerprint`.

        Raises:
          InputError: another process has locked it, or it belongs to another job.
        """
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"Another process is writing {self._out}; wait for it, or name another --out."
                ) from None
            self._check_job(json.loads(json.dumps(job)))
            self._done = dict(self._read())
            yield

    def find(self, index: int, digest: str) -> Part | None:
        """The finished part of a chunk; None if there is none.

        Raises:
          InputError: it was made from other rows.
        """
        part = self._done.get(index)
        if part is not None and part.digest != digest:
            raise InputError(
                f"The input is not the one that {self.folder} was begun with; remove that folder to begin anew."
            )
        return part

    def put(self, chunk: Chunk, data: bytes) -> None:
        """Writes a finished chunk. May be called by any process that reaches the folder."""
        name = f"{chunk.index:08d}.{chunk.digest}.{len(chunk.texts)}.{len(chunk.rejects)}"
        if chunk.rejects:
            self._write(name + ".rejects", _lines(chunk.rejects))
        self._write(name + ".rows", data)

    def finish(self, output: OutputFormat) -> tuple[int, int]:
        """Assembles the output atomically and removes the folder; returns the numbers of rows and rejects."""
        done = dict(self._read())
        parts = [done[index] for index in sorted(done)]
        whole = self.folder / "whole"
        rejected = [part.path.with_suffix(".rejects") for part in parts if part.rejected]
        if rejected:
            with atomic_write(whole) as unfinished, unfinished.open("wb") as file:
                for path in rejected:
                    file.write(path.read_bytes())
            whole.replace(self._rejects)
        with atomic_write(whole) as unfinished, unfinished.open("wb") as file:
            output.assemble((part.path for part in parts), file)
        if self._out.exists():
            raise InputError(f"{self._out} has come to exist and was not touched; the result is {whole}.")
        whole.replace(self._out)
        shutil.rmtree(self.folder)
        return sum(part.rows for part in parts), sum(part.rejected for part in parts)

    def precision_of(self, bucket: int, chosen: str | None = None) -> str | None:
        """The precision of a bucket in this job, which the first process that chose one decides for all."""
        path = self.folder / f"precision-{bucket}"
        if chosen is not None and not path.exists():
            self._write(path.name, chosen.encode())
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _check_job(self, job: dict[str, Any]) -> None:
        path = self.folder / "job.json"
        if not path.exists():
            self._write(path.name, json.dumps(job, indent=1).encode())
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(before.keys() | job.keys()):
            if before.get(name) != job.get(name):
                raise InputError(
                    f"{self.folder} was begun with {name} = {before.get(name)!r}, and not {job.get(name)!r}; give the "
                    "same again, or remove that folder to begin anew."
                )

    def _read(self) -> Iterator[tuple[int, Part]]:
        for path in self.folder.glob("*.rows"):
            index, digest, rows, rejected, _ = path.name.split(".")
            yield int(index), Part(path, digest, int(rows), int(rejected))

    def _write(self, name: str, data: bytes) -> None:
        with atomic_write(self.folder / name, shared=True) as unfinished:
            unfinished.write_bytes(data)


def _lines(rejects: Sequence[RejectedRow]) -> bytes:
    return "".join(json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects).encode(
        errors="backslashreplace"
    )
