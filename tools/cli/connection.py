"""Options of the commands that connect to a server: TLS and the server's API key."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from classer.data.errors import InputError

if TYPE_CHECKING:
    from classer.serve.ops.security import Tls

KEY_VARIABLE = "CLASSER_SERVER_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionArguments:
    """
    Attributes:
      tls: connect with TLS, trusting the authorities that gRPC brings.
      tls_ca: connect with TLS, trusting these authorities only, PEM.
      tls_cert: a certificate to show to the server, PEM; for mutual TLS.
      tls_key: the private key of --tls-cert, PEM.
      api_key_file: a file that holds an API key; else the environment variable CLASSER_SERVER_KEY, if it is set.
    """

    tls: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    api_key_file: Path | None = None

    def connect_with(self) -> tuple[Tls | None, str | None]:
        """Values for the arguments `tls` and `key` of a `Client`.

        Raises:
          InputError: a file cannot be read, or a certificate is given without its private key.
        """
        from classer.serve.ops.security import Tls

        tls = None
        if self.tls or self.tls_ca or self.tls_cert or self.tls_key:
            tls = Tls(self.tls_cert, self.tls_key, self.tls_ca)
        key = os.environ.get(KEY_VARIABLE) or None
        if self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                raise InputError(f"--api-key-file is {self.api_key_file}, which cannot be read as text.") from None
        return tls, key
