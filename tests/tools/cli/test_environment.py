"""Options from environment variables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from classer.serve.ops.operations import OperationsConfig
from classer.serve.rpc import frontend
from classer.serve.rpc.frontend import FrontEndConfig
from classer.serve.rpc.server import ServeConfig
from classer.tools.cli.environment import from_environment
from classer.tools.cli.frontend import frontend as frontend_command


@dataclasses.dataclass(frozen=True)
class ServeWithBundles(ServeConfig):
    bundles: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="BUNDLE")] = ()


def parsed(argv: list[str], **environment: str) -> ServeWithBundles:
    more, rest = from_environment(ServeWithBundles, argv, environment)
    default: dict[str, Any] = {"default": ServeWithBundles(**more)} if more else {}
    return tyro.cli(ServeWithBundles, args=rest, **default)


def test_every_option_of_the_server_is_a_variable() -> None:
    values: dict[str, tuple[str, Any]] = {
        "bundles": ("a b", ("a", "b")),
        "loadable": ("x=c 'd e'", ("x=c", "d e")),
        "host": ("0.0.0.0", "0.0.0.0"),
        "focus": ("1 0.5", ("1", "0.5")),
        "precision": ("int8", "int8"),
        "metrics_host": ("::1", "::1"),
        "trace_endpoint": ("traces:4317", "traces:4317"),
        "log_format": ("json", "json"),
        "access_log": ("true", True),
    }
    files = {name: ("a.pem", Path("a.pem")) for name in ("tls_cert", "tls_key", "tls_client_ca", "keys")}
    values |= files
    for field in dataclasses.fields(ServeConfig):
        text, value = values.get(field.name, ("7", 7))
        found = parsed([], **{"CLASSER_BUNDLES": "a b", f"CLASSER_{field.name.upper()}": text})
        assert getattr(found, field.name) == value, field.name


def test_every_option_of_a_front_end_is_a_variable(monkeypatch) -> None:
    values: dict[str, tuple[str, Any]] = {
        "engine": ("h:1", "h:1"),
        "host": ("0.0.0.0", "0.0.0.0"),
        "shared": ("true", True),
        "engine_key_env": ("KEY", "KEY"),
        "metrics_host": ("::1", "::1"),
        "trace_endpoint": ("traces:4317", "traces:4317"),
        "log_format": ("json", "json"),
        "access_log": ("true", True),
    }
    names = ("tls_cert", "tls_key", "tls_client_ca", "keys", "engine_tls_ca", "engine_tls_cert", "engine_tls_key")
    values |= {name: ("a.pem", Path("a.pem")) for name in names}
    own = [field.name for field in dataclasses.fields(FrontEndConfig) if field.name != "operations"]
    given = {
        name: values.get(name, ("7", 7)) for name in (*own, *(f.name for f in dataclasses.fields(OperationsConfig)))
    }
    found: list[FrontEndConfig] = []
    monkeypatch.setattr(frontend, "run_front_end", found.append)
    for name, (text, _) in given.items():
        monkeypatch.setenv(f"CLASSER_{name.upper()}", text)
    frontend_command([])
    frontend_command(["--port", "1"])
    for name, (_, value) in given.items():
        assert getattr(found[0] if name in own else found[0].operations, name) == value, name
    assert (found[1].port, found[1].engine) == (1, "h:1")


def test_the_command_line_goes_before_the_environment() -> None:
    found = parsed(
        ["mine", "--port", "1"], CLASSER_BUNDLES="theirs", CLASSER_PORT="2", CLASSER_HOST="h", CLASSER_OTHER="?"
    )
    assert (found.bundles, found.port, found.host) == (("mine",), 1, "h")
    assert parsed(["mine", "--port=1"], CLASSER_PORT="2").port == 1
