"""Security and operation of a server or a front end: the options, and the parts that are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc.aio

from ...data.errors import InputError
from ..wire.limits import MAX_PENDING_CALLS
from .guard import MAX_IN_FLIGHT_BYTES, MAX_IN_FLIGHT_CALLS, Guard
from .keys import KeyRing
from .listening import make_server
from .log import LogFormat
from .metrics import BatchProtocol, CallMetrics, DeviceMetrics, MetricsServer, new_registry
from .security import Tls
from .tracing import Tracing

_MB = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperationsConfig:
    """
    Attributes:
      tls_cert: the server's certificate and chain, PEM; with it, and --tls-key, the server speaks TLS only.
      tls_key: the certificate's private key, PEM.
      tls_client_ca: the authorities that clients' certificates must come from, PEM; makes TLS mutual.
      keys: a file of API keys, made by `classer keys new`; with it, only their holders are answered.
      max_in_flight: calls that are worked on at once; what comes beyond them is refused as RESOURCE_EXHAUSTED.
      max_in_flight_mb: likewise, megabytes of requests.
      max_pending: calls that wait until the server comes to read them. Beyond them gRPC itself refuses, and from half
        of them on a growing share, at once and at next to no cost. Where deadlines are short a lower number keeps
        calls from being read too late; it must stay above the calls that callers send at once.
      metrics_port: where Prometheus finds /metrics; 0 picks a free one; by default nowhere. Front ends take the ports
        above it, one each.
      metrics_host: the address that it listens on.
      trace_endpoint: an OpenTelemetry collector (OTLP over gRPC), such as http://localhost:4317.
      log_format: of the server's log, on stderr: text, or json with one object a line.
      access_log: whether each call gets a line, without its texts.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    keys: Path | None = None
    max_in_flight: int = MAX_IN_FLIGHT_CALLS
    max_in_flight_mb: float = MAX_IN_FLIGHT_BYTES / _MB
    max_pending: int = MAX_PENDING_CALLS
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    trace_endpoint: str | None = None
    log_format: LogFormat = "text"
    access_log: bool = False

    @property
    def tls(self) -> Tls | None:
        """Raises InputError if the files do not go together."""
        if self.tls_cert is None and self.tls_key is None:
            if self.tls_client_ca is not None:
                raise InputError("--tls-client-ca needs --tls-cert and --tls-key beside it.")
            return None
        return Tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> OperationsConfig:
        """The configuration of fields as JSON has them."""
        paths = ("tls_cert", "tls_key", "tls_client_ca", "keys")
        known = {field.name for field in dataclasses.fields(OperationsConfig)}
        values: dict[str, Any] = {name: value for name, value in fields.items() if name in known}
        values.update({name: Path(values[name]) for name in paths if values.get(name)})
        return OperationsConfig(**values)

    def of_front_end(self, number: int) -> OperationsConfig:
        """The configuration of the front end of that number, from 0, of this server."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(OperationsConfig)}
        if self.metrics_port:
            fields["metrics_port"] = self.metrics_port + 1 + number
        return OperationsConfig(**fields)


class Operations:
    """The parts, made from the configuration.

    Args:
      config: what was asked for.
      service: what this process is called in traces.
      share: the part of each key's rate and quota that this process grants.

    Raises:
      InputError: a file cannot be used, a package is missing, or the metrics' address cannot be listened on.

    Attributes:
      guard: for the server's interceptors.
      metrics_port: where metrics are, if anywhere.
    """

    def __init__(self, config: OperationsConfig, *, service: str = "classer", share: float = 1.0) -> None:
        if min(config.max_in_flight, config.max_in_flight_mb, config.max_pending) <= 0:
            raise InputError("--max-in-flight, --max-in-flight-mb and --max-pending must be above 0.")
        self._config = config
        self._credentials = None if config.tls is None else config.tls.server_credentials()
        self._keys = None if config.keys is None else KeyRing(config.keys, share=share)
        self._tracing = None if config.trace_endpoint is None else Tracing(config.trace_endpoint, service)
        self.registry = None if config.metrics_port is None else new_registry()
        self.guard = Guard(
            keys=self._keys,
            metrics=None if self.registry is None else CallMetrics(self.registry),
            tracing=self._tracing,
            max_calls=config.max_in_flight,
            max_bytes=round(config.max_in_flight_mb * _MB),
        )
        self._device: DeviceMetrics | None = None
        self._metrics_server: MetricsServer | None = None
        self.metrics_port: int | None = None
        if self.registry is not None and config.metrics_port is not None:
            self._metrics_server = MetricsServer(self.registry, config.metrics_host, config.metrics_port)
            self.metrics_port = self._metrics_server.port

    def make_server(self, *, reuse_port: bool = False) -> grpc.aio.Server:
        """A guarded server, as `listening.make_server` makes it."""
        return make_server(reuse_port=reuse_port, interceptors=[self.guard], max_pending=self._config.max_pending)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Binds a port of a server, with TLS if there is a certificate. Raises RuntimeError if gRPC refuses it."""
        # A Unix socket does not leave this machine and needs no TLS.
        if self._credentials is None or address.startswith("unix:"):
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._credentials)

    def watch_device(
        self, *, waiting_tokens: Callable[[], int], max_waiting_tokens: int, alive: Callable[[], bool]
    ) -> None:
        """Exports the device's metrics, if metrics are on."""
        if self.registry is not None:
            self._device = DeviceMetrics(
                self.registry, waiting_tokens=waiting_tokens, max_waiting_tokens=max_waiting_tokens, alive=alive
            )

    def batch_ran(self, batch: BatchProtocol) -> None:
        """Counts a batch; an `on_batch` of the scheduler."""
        if self._device is not None:
            self._device.ran(batch)

    def close(self) -> None:
        """Exports the last traces and stops the metrics server."""
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._tracing is not None:
            self._tracing.close()
