"""The server as a process of its own: what it prints, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from classer.serve.client import Client

TIMEOUT = 90
CODE = """
import sys
from classer.serve.server import ServeConfig, serve
serve(ServeConfig(bundles=(sys.argv[1],), port=0, precision="float32"))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_serves_and_ends_well(bundle_path: Path, signum: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(bundle_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        last = next(line for line in process.stdout if line.startswith("Serving"))
        address = last.split()[-1]
        assert address.startswith("127.0.0.1:")
        with Client(address) as client:
            assert client.healthy()
            assert client.classify("my card has not arrived", "topic").chosen
        process.send_signal(signum)
        output, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        assert output == ""
        assert "Traceback" not in errors
    finally:
        process.kill()


def test_a_signal_during_warm_up_ends_it_too(bundle_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(bundle_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Loading")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        assert "Serving" not in output
    finally:
        process.kill()
