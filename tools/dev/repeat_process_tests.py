"""Repeats every quick test that starts a process, and reports failures and hangs.

    .venv/bin/python tools/dev/repeat_process_tests.py --times 50 --out runs/repeat

The first round runs all quick tests and notes which of them start a process, by Python's audit events. The rounds after
it run those alone. A test that takes longer than --timeout counts as hung: pytest then prints the stacks of its threads
and ends, and the rest of the round runs in a new process. Exits with 1 if any test failed or hung.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
LOG = "CLASSER_REPEAT_LOG"


def _plugin_log(line: dict[str, object]) -> None:
    with Path(os.environ[LOG]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


_started: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Listens for the audit events of started processes (https://docs.python.org/3/library/audit_events.html)."""
    sys.addaudithook(lambda event, _: _started.append(event) if event in STARTS else None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Logs the start and the end of each test, its outcome, and whether a process was started within."""
    _started.clear()
    _plugin_log({"test": item.nodeid, "event": "begins"})
    failed = item.session.testsfailed
    yield
    ok = item.session.testsfailed == failed
    _plugin_log({"test": item.nodeid, "event": "passed" if ok else "failed", "starts": bool(_started)})


def run_tests(tests: list[str], log: Path, timeout: int) -> tuple[list[str], list[str], list[str]]:
    """Runs tests in one process, or all quick ones if none are named.

    Returns:
      The tests that start a process, those that failed, and those that hung.
    """
    starting, failed, hung = [], [], []
    todo = tests
    while True:
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "classer.tools.dev.repeat_process_tests"]
        command += ["-o", f"faulthandler_timeout={timeout}", *todo]
        with log.with_suffix(".output").open("ab") as output:
            subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, LOG: str(log)}, check=False
            )
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        starting += [line["test"] for line in lines if line.get("starts")]
        failed += [line["test"] for line in lines if line["event"] == "failed"]
        if not lines or lines[-1]["event"] != "begins":
            return starting, failed, hung
        hung.append(lines[-1]["test"])
        done = {line["test"] for line in lines}
        todo = [test for test in todo if test not in done]
        if not todo:
            return starting, failed, hung


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="rounds; 50 by default")
    parser.add_argument("--timeout", type=int, default=240, help="seconds until a test counts as hung; 240 by default")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the logs")
    parser.add_argument("tests", nargs="*", help="tests to repeat; by default those that start a process")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "events.jsonl"
    tests = arguments.tests or run_tests([], log, arguments.timeout)[0]
    print(f"{len(tests)} tests, {arguments.times} times.", flush=True)
    (arguments.out / "tests.txt").write_text("\n".join(tests) + "\n", encoding="utf-8")
    failures, hangs = collections.Counter[str](), collections.Counter[str]()
    for number in tqdm(range(1, arguments.times + 1), unit="round"):
        _, failed, hung = run_tests(tests, log, arguments.timeout)
        failures.update(failed)
        hangs.update(hung)
        for name, kind in [(name, "failed") for name in failed] + [(name, "hung") for name in hung]:
            print(f"round {number}: {kind}: {name}", flush=True)
    print(f"{arguments.times} rounds of {len(tests)} tests: {failures.total()} failures, {hangs.total()} hangs.")
    return 1 if failures or hangs else 0


if __name__ == "__main__":
    sys.exit(main())
