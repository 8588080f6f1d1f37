"""Where gRPC servers are made, bound and run: `classer serve`, its admin port, and front ends. Loads no JAX."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

import grpc.aio

from ...data.errors import InputError
from ..wire.limits import MAX_MESSAGE_BYTES, MAX_PENDING_CALLS

T = TypeVar("T")
# A peer that connects must speak HTTP/2 within so many seconds; one that is silent for so long is sent a ping, and
# dropped if it does not answer it. By default gRPC asks after two hours, and only those that have a call.
HANDSHAKE_SECONDS = 20.0
KEEPALIVE_SECONDS = 60.0
PING_SECONDS = 20.0
# How much of a stream gRPC reads ahead of the service. By default that grows with the traffic, to many megabytes for
# each caller who sends and reads no answer.
READ_AHEAD_BYTES = 1024 * 1024


def run_loop(main: Coroutine[None, None, None]) -> None:
    """`asyncio.run`, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # not on every platform; it is only faster
        asyncio.run(main)
    else:
        uvloop.run(main)


def make_server(
    *,
    reuse_port: bool = False,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    max_pending: int = MAX_PENDING_CALLS,
) -> grpc.aio.Server:
    """A server without services, not bound yet.

    Args:
      reuse_port: whether several processes share its port. Two servers that do not know of each other would then share
        requests at random, so it is off by default: the second one is refused.
      interceptors: what every call passes through.
      max_pending: how many calls may wait in gRPC until the event loop comes to them. From half of it on gRPC refuses
        the more of them the more wait, beyond it all, at no cost to the event loop (see `status.error_of_call`).
    """
    options = [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.server.max_pending_requests", max_pending // 2),
        ("grpc.server.max_pending_requests_hard_limit", max_pending),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_SECONDS * 1e3)),
        ("grpc.keepalive_time_ms", round(KEEPALIVE_SECONDS * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.ping_timeout_ms", round(PING_SECONDS * 1e3)),
    ]
    return grpc.aio.server(options=options, interceptors=interceptors)


def bind_server(
    server: grpc.aio.Server,
    host: str,
    port: int,
    option: str,
    *,
    host_option: str | None = "--host",
    add_port: Callable[[grpc.aio.Server, str], int] = lambda server, address: server.add_insecure_port(address),
) -> str:
    """Binds a port of a gRPC server, by `add_port`; returns its real address. For arguments and errors see `bind`."""
    own = bind(host, port, option, lambda *_: add_port(server, join(host, port)), host_option=host_option)
    return join(host, own)


def bind(host: str, port: int, option: str, make: Callable[[str, int], T], *, host_option: str | None = "--host") -> T:
    """Binds an address.

    Args:
      host: the address.
      port: its port; 0 picks a free one.
      option: the option that gives the port, for the error.
      make: binds them; it raises an OSError, or, as gRPC does, a RuntimeError if it cannot.
      host_option: the option that gives the address; None if it is fixed.

    Returns:
      What `make` returns.

    Raises:
      InputError: the port is out of range, or the address cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"{option} is {port}; a port is a number from 0 (pick a free one) to 65535.")
    try:
        return make(host, port)
    except (OSError, RuntimeError) as error:
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else _why_not(host, port)
        other = f"{option} (0 picks a free one)" + (f" or {host_option}" if host_option else "")
        raise InputError(f"Cannot listen on {join(host, port)}: {reason}. Choose another {other}.") from None


def join(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Raises OSError if the address cannot be bound."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _why_not(host: str, port: int) -> str:
    """The operating system's reason why an address cannot be bound, which gRPC only logs."""
    try:
        check_free(host, port)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "gRPC refused it"
