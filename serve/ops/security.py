"""TLS and API keys on the wire, for servers, front ends, gateways and clients. Loads no heavy package."""

from __future__ import annotations

import dataclasses
import ipaddress
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from ...data.errors import InputError
from ..wire.errors import InvalidRequest
from .tracing import current_parent

# The metadata, or HTTP header, of an API key: "Bearer KEY".
KEY_HEADER = "authorization"
KEY_SCHEME = "Bearer "


@dataclasses.dataclass(frozen=True)
class Tls:
    """The files of one end of a TLS connection, all of them PEM.

    Attributes:
      cert: this end's certificate and its chain; a client needs one only for mutual TLS.
      key: the private key of `cert`.
      ca: the authorities that must have issued the other end's certificate. A server with a `ca` requires a certificate
        of every client (mutual TLS). A client without one trusts gRPC's own list.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("certificate", "private key") if self.key is None else ("private key", "certificate")
            raise InputError(f"TLS was given a {given} without its {missing}; it takes both, as PEM files.")

    @classmethod
    def of_files(cls, cert: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
        """The TLS of these files; None, for no TLS, if there is none. Raises InputError if one is missing."""
        return None if cert is None and key is None and ca is None else cls(cert, key, ca)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises InputError if a file cannot be used or there is no certificate."""
        if self.cert is None or self.key is None:
            raise InputError("A TLS server needs a certificate and its private key.")
        cert, key = _key_pair(self.cert, self.key)
        ca = None if self.ca is None else _certificates(self.ca)
        return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=ca is not None)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Raises InputError if a file cannot be used."""
        ca = None if self.ca is None else _certificates(self.ca)
        cert, key = (None, None) if self.cert is None or self.key is None else _key_pair(self.cert, self.key)
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def _key_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """The contents of a certificate's and its private key's file, after a check that they belong together.

    gRPC itself notices at the first handshake only, and says so in its log alone.
    """
    pair = _certificates(cert), _pem(key, "PRIVATE KEY")
    if b"ENCRYPTED" in pair[1]:
        raise InputError(f"{key} is encrypted with a passphrase; a private key without one was expected.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"{key} is not the private key of the certificate in {cert}.") from None
        raise InputError(f"{key} holds a private key that cannot be read; it may be damaged.") from None
    return pair


def _certificates(path: Path) -> bytes:
    content = _pem(path, "CERTIFICATE")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise InputError(f"{path} holds a certificate that cannot be read; it may be damaged.") from None
    return content


def _pem(path: Path, kind: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); a PEM file was expected.") from None
    if f"{kind}-----".encode() not in content:
        raise InputError(f"{path} holds no {kind.lower()} in PEM form.")
    return content


def sync_channel(
    server: str, options: Sequence[tuple[str, int]], tls: Tls | None = None, key: str | None = None
) -> grpc.Channel:
    """A channel to a server, over TLS and with an API key on every call if they are given.

    Raises:
      InputError: a PEM file cannot be used.
      InvalidRequest: the key would travel in the clear over a network, or is no key.
    """
    _check_key(server, tls, key)
    if tls is None:
        channel = grpc.insecure_channel(server, options=options)
    else:
        channel = grpc.secure_channel(server, tls.channel_credentials(), options=options)
    return grpc.intercept_channel(channel, _SyncExtra(key)) if _has_extra(key) else channel


def aio_channel(
    server: str, options: Sequence[tuple[str, int]], tls: Tls | None = None, key: str | None = None
) -> grpc.aio.Channel:
    """`sync_channel` for asyncio."""
    _check_key(server, tls, key)
    interceptors = _aio_extra(key) if _has_extra(key) else []
    if tls is None:
        return grpc.aio.insecure_channel(server, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(server, tls.channel_credentials(), options=options, interceptors=interceptors)


def _check_key(server: str, tls: Tls | None, key: str | None) -> None:
    if key is None:
        return
    if not key.isascii() or not key.isprintable() or not key.strip():
        raise InvalidRequest("The API key holds characters that no key has; `classer keys new` makes one.")
    if tls is None and not is_this_machine(server):
        raise InvalidRequest(
            f"The API key would travel to {server} in the clear; connect with TLS, or over this machine's loopback."
        )


def is_this_machine(server: str) -> bool:
    """Whether an address, "host:port" or "unix:path", never leaves this machine."""
    host = server.rpartition(":")[0].strip("[]")
    if server.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Details(NamedTuple):
    """A call's details with other metadata; gRPC's own class cannot be made by others."""

    method: Any
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any = None


def _has_extra(key: str | None) -> bool:
    # Interceptors cost each call some time, so that they are there only if there is something to send.
    return key is not None or "opentelemetry.trace" in sys.modules


def _extra(key: str | None) -> list[tuple[str, str]]:
    """The metadata that is added to every call: the API key, and the caller's span."""
    entries = list(current_parent())
    return entries if key is None else [*entries, (KEY_HEADER, KEY_SCHEME + key)]


class _SyncExtra(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, key: str | None) -> None:
        self._key = key

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_extra(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_extra(client_call_details), request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._with_extra(client_call_details), request_iterator)

    def _with_extra(self, details: Any) -> _Details:
        metadata = [*(details.metadata or ()), *_extra(self._key)]
        return _Details(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            getattr(details, "compression", None),
        )


def _aio_extra(key: str | None) -> list[grpc.aio.ClientInterceptor]:
    """`_SyncExtra` for asyncio, where gRPC takes an interceptor for one kind of call only."""

    def with_extra(details: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *_extra(key))
        return details._replace(metadata=metadata)

    class Unary(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return await continuation(with_extra(client_call_details), request)

    class Down(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return await continuation(with_extra(client_call_details), request)

    class Both(grpc.aio.StreamStreamClientInterceptor):
        async def intercept_stream_stream(
            self, continuation: Any, client_call_details: Any, request_iterator: Any
        ) -> Any:
            return await continuation(with_extra(client_call_details), request_iterator)

    return [Unary(), Down(), Both()]
