"""Child processes of tests. Threads read their pipes from the start, so that a process never blocks on a full pipe."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

TIMEOUT = 240.0  # seconds
GRACE = 10.0  # seconds that the other processes of a job get to end after one has failed


class Output:
    """The output of a process on one of its pipes, read by a thread."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe, self._lines, self._taken, self._ended = pipe, list[str](), 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def line(self, start: str = "", *, within: float = TIMEOUT) -> str:
        """The next line that begins with `start`; lines before it are skipped.

        Raises:
          AssertionError: the output ended, or no such line arrived within `within` seconds.
        """
        return self._next(lambda line: line.startswith(start), start, within)

    def line_with(self, part: str, *, within: float = TIMEOUT) -> str:
        """The next line that contains `part`; otherwise like `line`."""
        return self._next(lambda line: part in line, part, within)

    def rest(self) -> str:
        """The output after the last line returned by `line`, up to its end."""
        self._thread.join()
        return "".join(self._lines[self._taken :])

    def close(self, within: float) -> None:
        self._thread.join(within)

    def _next(self, matches: Callable[[str], bool], wanted: str, within: float) -> str:
        until = time.monotonic() + within
        with self._changed:
            while True:
                while self._taken < len(self._lines):
                    self._taken += 1
                    if matches(line := self._lines[self._taken - 1]):
                        return line
                assert not self._ended, f"no line with {wanted!r} in: {''.join(self._lines)}"
                assert self._changed.wait(until - time.monotonic()), f"no {wanted!r} yet in: {''.join(self._lines)}"

    def _read(self) -> None:
        for line in self._pipe:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Process:
    """A child process with pipes for text, killed at the end of the `with` block."""

    def __init__(self, command: Sequence[object], *, env: Mapping[str, str] | None = None) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.pid, self.stdin = self._process.pid, self._process.stdin
        self.stdout, self.stderr = Output(self._process.stdout), Output(self._process.stderr)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def poll(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._process.poll()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Waits for the end of the process and returns its exit code."""
        return self._process.wait(timeout)

    def result(self, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
        """Waits for the end; returns the exit code and the output that no call of `line` has returned."""
        code = self.wait(timeout)
        return subprocess.CompletedProcess(self._process.args, code, self.stdout.rest(), self.stderr.rest())

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.stdout.close(5)
        self.stderr.close(5)
        self.stdin.close()


def run_all(
    commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]], *, timeout: float = TIMEOUT
) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands in parallel, each in its environment; after a failure, the others get `GRACE` seconds to end.

    Raises:
      AssertionError: the commands did not end in time; the message holds each command's stderr.
    """
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(Process(command, env=env)) for command, env in zip(commands, environments, strict=True)
        ]
        until = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in started]):
            if any(codes):
                until = min(until, time.monotonic() + GRACE)
            if time.monotonic() > until:
                stack.close()
                said = "\n".join(f"process {i}: {process.stderr.rest()[-3000:]}" for i, process in enumerate(started))
                raise AssertionError(f"exit codes {codes} after the time allowed\n{said}")
            time.sleep(0.05)
        return [process.result() for process in started]
