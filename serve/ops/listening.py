"""Event loop, gRPC server options and ports, for servers, front ends and the gateway. Loads no JAX."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

import grpc.aio

from ...data.errors import InputError
from ..wire.limits import MAX_MESSAGE_BYTES, MAX_PENDING_CALLS

T = TypeVar("T")
# A peer must begin HTTP/2 within HANDSHAKE_SECONDS. A peer that is silent for KEEPALIVE_SECONDS is sent a ping, and
# dropped if it does not answer in PING_SECONDS. By default gRPC sends one after two hours, and only during a call.
HANDSHAKE_SECONDS = 20.0
KEEPALIVE_SECONDS = 60.0
PING_SECONDS = 20.0
# How much of a stream gRPC reads ahead. By default that grows with the traffic, to many megabytes for each caller that
# sends and reads no response.
READ_AHEAD_BYTES = 1024 * 1024


def run_loop(main: Coroutine[None, None, None]) -> None:
    """`asyncio.run`, on uvloop if it is installed."""
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
    """A gRPC server without services and ports.

    Args:
      reuse_port: whether several processes may share its port. Two unrelated servers would then split requests at
        random; without it the second one cannot start.
      interceptors: interceptors of every call.
      max_pending: how many calls may wait in gRPC for the event loop. From half of it on gRPC refuses a growing share
        of new calls, and beyond it all, at no cost to the event loop (see `wire.status.error_of_call`).
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
    own = bind(host, port, option, lambda *_: add_port(server, address_of(host, port)), host_option=host_option)
    return address_of(host, own)


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
        reason = _why_not(host, port) or str(error).lower()
        other = f"{option} (0 picks a free one)" + (f" or {host_option}" if host_option else "")
        raise InputError(f"Cannot listen on {address_of(host, port)}: {reason}. Choose another {other}.") from None


def address_of(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Raises OSError if the address cannot be bound."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _why_not(host: str, port: int) -> str:
    """The operating system's reason why an address cannot be bound; gRPC only logs it. Empty if it can be bound."""
    try:
        check_free(host, port)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""
