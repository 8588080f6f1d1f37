"""HTTP gateway process: JSON over HTTP in front of a gRPC server. Loads no JAX, no TensorFlow and no model.

The gateway limits only what it has in flight. API keys and deadlines go on to the server, and the server's errors come
back with the HTTP status of their kind. No error repeats what a caller sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from ...data.errors import InputError
from ...data.extras import missing_packages
from ..ops.guard import MAX_IN_FLIGHT_BYTES, MAX_IN_FLIGHT_CALLS
from ..ops.listening import bind
from ..ops.log import LogFormat, configure_logging
from ..ops.security import Tls
from ..ops.tracing import Tracing

_MB = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """
    Attributes:
      server: address of a running `classer serve`, HOST:PORT.
      host: address to listen on; the default is reachable from this machine only.
      port: port to listen on; 0 picks a free one and prints it.
      server_tls_ca: connect to the server with TLS, trusting these authorities, PEM.
      server_tls_cert: a certificate to present to the server, PEM; for mutual TLS.
      server_tls_key: the private key of --server-tls-cert, PEM.
      tls_cert: the gateway's own certificate and chain, PEM; with it and --tls-key it accepts HTTPS only.
      tls_key: the private key of --tls-cert, PEM.
      max_in_flight: calls in flight at most; more are refused with status 429.
      max_in_flight_mb: megabytes of bodies in flight at most; more are refused with status 429.
      drain_seconds: seconds that requests in flight may take after SIGTERM or SIGINT.
      trace_endpoint: an OpenTelemetry collector (OTLP over gRPC), such as http://localhost:4317.
      log_format: the format of the log, on stderr: text, or json with one object a line.
    """

    server: str = "localhost:50051"
    host: str = "127.0.0.1"
    port: int = 8080
    server_tls_ca: Path | None = None
    server_tls_cert: Path | None = None
    server_tls_key: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_in_flight: int = MAX_IN_FLIGHT_CALLS
    max_in_flight_mb: float = MAX_IN_FLIGHT_BYTES / _MB
    drain_seconds: float = 30.0
    trace_endpoint: str | None = None
    log_format: LogFormat = "text"

    @property
    def server_tls(self) -> Tls | None:
        """TLS toward the server; None without TLS."""
        return Tls.of_files(self.server_tls_cert, self.server_tls_key, self.server_tls_ca)


def run_gateway(config: GatewayConfig) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in flight.

    Raises:
      InputError: a package is missing, a file cannot be used, or the address is taken.
    """
    try:
        import uvicorn

        from .app import make_app
    except ImportError as error:
        if error.name not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise missing_packages("The gateway", "FastAPI and uvicorn", "http") from None
    if config.max_in_flight < 1 or config.max_in_flight_mb <= 0:
        raise InputError("--max-in-flight and --max-in-flight-mb must be above 0.")
    if config.tls_cert is not None or config.tls_key is not None:
        Tls(config.tls_cert, config.tls_key).server_credentials()  # checks the files; raises InputError
    listener = bind(config.host, config.port, "--port", _listen)
    configure_logging(config.log_format, access=False)
    tracing = None if config.trace_endpoint is None else Tracing(config.trace_endpoint, "classer-gateway")

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn's own raises the signal again after the drain, so that the exit status would be a failure.
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self.handle_exit)
            yield

    server = Server(
        uvicorn.Config(
            make_app(
                config.server,
                config.server_tls,
                tracing,
                max_calls=config.max_in_flight,
                max_bytes=round(config.max_in_flight_mb * _MB),
            ),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.drain_seconds),
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
        )
    )
    scheme = "http" if config.tls_cert is None else "https"
    print(f"Gateway to {config.server} on {scheme}://{config.host}:{listener.getsockname()[1]}", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        if tracing is not None:
            tracing.close()


def _listen(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
