"""Pipes of child processes."""

from __future__ import annotations

import threading
from typing import IO


def drain(pipe: IO[str]) -> None:
    """Reads a pipe to its end in a thread and drops what it reads: a full pipe would block the process that writes."""

    def read() -> None:
        for _ in pipe:
            pass

    threading.Thread(target=read, daemon=True).start()
