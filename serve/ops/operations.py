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
      tls_cert: the server's certificate and chain, PEM; with it and --tls-key the server accepts TLS only.
      tls_key: the private key of --tls-cert, PEM.
      tls_client_ca: the authorities that must have signed clients' certificates, PEM; turns on mutual TLS.
      keys: a file of API keys, made by `classer keys new`; calls without a valid key are refused.
      max_in_flight: calls in flight at most; more are refused with RESOURCE_EXHAUSTED.
      max_in_flight_mb: megabytes of requests in flight at most; more are refused with RESOURCE_EXHAUSTED.
      max_pending: accepted calls that the server has not read yet, at most. gRPC refuses more at almost no cost; from
        half of this number on it refuses a growing share. A lower number suits short deadlines. It must exceed the
        number of calls that callers send at once.
      metrics_port: the port of /metrics for Prometheus; 0 picks a free one; by default metrics are off. Front end
        number N, from 1, uses this port plus N.
      metrics_host: the address that /metrics listens on.
      trace_endpoint: an OpenTelemetry collector (OTLP over gRPC), such as http://localhost:4317.
      log_format: the format of the log, on stderr: text, or json with one object a line.
      access_log: whether to log each call in one line, without its texts.
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
        """The server's TLS files; None without TLS.

        Raises:
          InputError: a file that the others need is missing.
        """
        if self.tls_cert is None and self.tls_key is None:
            if self.tls_client_ca is not None:
                raise InputError("--tls-client-ca needs --tls-cert and --tls-key beside it.")
            return None
        return Tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> OperationsConfig:
        """The configuration from decoded JSON, in which paths are strings. Unknown fields are ignored."""
        paths = ("tls_cert", "tls_key", "tls_client_ca", "keys")
        known = {field.name for field in dataclasses.fields(OperationsConfig)}
        values: dict[str, Any] = {name: value for name, value in fields.items() if name in known}
        values.update({name: Path(values[name]) for name in paths if values.get(name)})
        return OperationsConfig(**values)

    def of_front_end(self, number: int) -> OperationsConfig:
        """The configuration of one of this server's front ends, numbered from 0, with its own metrics port."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(OperationsConfig)}
        if self.metrics_port:
            fields["metrics_port"] = self.metrics_port + 1 + number
        return OperationsConfig(**fields)


class Operations:
    """TLS, API keys, limits, metrics and traces of one process, made from the configuration.

    Args:
      config: the configuration.
      service: the service's name in traces.
      share: this process's share of each key's rate and quota, above 0 and at most 1.

    Raises:
      InputError: a file cannot be used, a package is missing, or the metrics' address cannot be listened on.

    Attributes:
      guard: the interceptor that authenticates, limits and counts calls.
      metrics_port: the actual port of /metrics; None if metrics are off.
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
