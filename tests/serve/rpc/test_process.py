"""The server as a process of its own: what it prints, and how it ends."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from classer.serve.client.client import Classification, Client, Unavailable
from classer.serve.proto import classifier_pb2 as pb
from classer.serve.proto.classifier_pb2_grpc import ClassifierStub
from classer.tests.processes import Process

TIMEOUT = 90
CODE = """
import sys
from classer.serve.rpc.server import ServeConfig, serve
serve(ServeConfig(bundles=(sys.argv[1],), port=0, precision="float32"))
"""

# The device says when it has a batch, and runs it when it is told to.
HELD = """
import sys
from classer.serve.core.engine import Engine
from classer.tools.cli.main import main
launch = Engine.launch
def held(*arguments):
    print("Held", flush=True)
    sys.stdin.readline()
    return launch(*arguments)
Engine.launch = held
sys.exit(main(["serve", sys.argv[1], "--port", "0", "--precision", "float32"]))
"""


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_serves_and_ends_well(bundle_path: Path, signum: signal.Signals) -> None:
    with Process([sys.executable, "-c", CODE, str(bundle_path)]) as process:
        address = process.stdout.line("Serving").split()[-1]
        assert address.startswith("127.0.0.1:")
        with Client(address) as client:
            assert client.healthy()
            assert client.classify("my card has not arrived", "topic").chosen
        process.send_signal(signum)
        done = process.result(TIMEOUT)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_calls_in_flight_are_answered_after_sigterm(bundle_path: Path) -> None:
    with Process([sys.executable, "-c", HELD, str(bundle_path)]) as process:
        address = process.stdout.line("Serving").split()[-1]
        with Client(address) as client, grpc.insecure_channel(address) as channel, ThreadPoolExecutor() as pool:
            unary = pool.submit(client.classify, "my card has not arrived", "topic", timeout=TIMEOUT)
            assert process.stdout.line() == "Held\n"
            stream = pool.submit(lambda: list(client.classify_stream(["card", "money"], "topic", timeout=TIMEOUT)))
            model = ClassifierStub(channel)
            eventually(lambda: model.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).in_flight == 2)
            process.send_signal(signal.SIGTERM)
            # gRPC cancels calls that arrive during the shutdown itself; this call comes later.
            eventually(lambda: not listens(address))
            eventually(lambda: not client.healthy())
            with pytest.raises(Unavailable):
                client.classify("card", "topic")
            assert not unary.done()
            assert not stream.done()
            process.stdin.write("\n" * 9)
            process.stdin.flush()
            assert unary.result(TIMEOUT).chosen
            assert [type(outcome) for outcome in stream.result(TIMEOUT)] == [Classification] * 2
        done = process.result(TIMEOUT)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def test_a_signal_during_warm_up_ends_it_too(bundle_path: Path) -> None:
    with Process([sys.executable, "-c", CODE, str(bundle_path)]) as process:
        assert process.stdout.line().startswith("Loading")
        process.send_signal(signal.SIGTERM)
        done = process.result(TIMEOUT)
        assert done.returncode == 0, done.stderr
        assert "Serving" not in done.stdout
