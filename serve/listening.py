"""Where gRPC servers are made, bound and run: `classer serve`, its admin port, and front ends. Loads no JAX."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence

import grpc.aio

from ..data.errors import InputError
from .limits import MAX_MESSAGE_BYTES


def run_loop(main: Coroutine[None, None, None]) -> None:
    """`asyncio.run`, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # not on every platform; it is only faster
        asyncio.run(main)
    else:
        uvloop.run(main)


def make_server(
    *, reuse_port: bool = False, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
) -> grpc.aio.Server:
    """A server without services, not bound yet.

    Args:
      reuse_port: whether several processes share its port. Two servers that do not know of each other would then share
        requests at random, so it is off by default: the second one is refused.
      interceptors: what every call passes through.
    """
    options = [("grpc.so_reuseport", int(reuse_port)), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    return grpc.aio.server(options=options, interceptors=interceptors)


def listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    option: str,
    add_port: Callable[[grpc.aio.Server, str], int] = lambda server, address: server.add_insecure_port(address),
) -> str:
    """Binds the server's port, by `add_port`; the real address.

    Raises:
      InputError: it cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"{option} is {port}; a port is a number from 0 (pick a free one) to 65535.")
    name = f"[{host}]" if ":" in host else host
    try:
        return f"{name}:{add_port(server, f'{name}:{port}')}"
    except RuntimeError:
        raise InputError(
            f"Cannot listen on {name}:{port}: {_why_not(host, port)}. "
            f"Choose another {option} (0 picks a free one) or --host."
        ) from None


def _why_not(host: str, port: int) -> str:
    """The operating system's reason why an address cannot be bound, which gRPC only logs."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "gRPC refused it"
