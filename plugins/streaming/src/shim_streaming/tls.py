"""TLS for the streaming server; certificates that are replaced on disk are taken up without a restart."""

from __future__ import annotations

import logging
import os
import ssl

from shim_core.errors import StartupError

logger = logging.getLogger("shim.streaming.tls")

_Version = tuple[tuple[int, int, int], ...]


class TlsContexts:
    """The TLS context to use for a new connection.

    :param cert: PEM files, as in ``StreamingServerSection``.
    :raises StartupError: they can't be used.
    """

    def __init__(self, cert: str, key: str, client_ca: str | None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._refused: _Version | None = None
        try:
            self._version = self._look()
            self._context = self._load()
        except (OSError, ValueError) as err:
            raise StartupError(f"StreamingServer: TLS can't be set up: {_problem(err)}") from err

    def current(self) -> ssl.SSLContext:
        """A context with the certificate that is on disk now, or with the last good one."""
        try:
            version = self._look()
        except OSError:
            version = ()
        if version not in (self._version, self._refused):
            self._refused = version
            try:
                self._context = self._load()
                self._version = version
                logger.info("TLS certificate of the streaming server read again")
            except (OSError, ValueError) as err:
                logger.warning("TLS certificate of the streaming server: keeping the old one: %s", _problem(err))
        return self._context

    def _look(self) -> _Version:
        paths = [self._cert, self._key] + ([self._client_ca] if self._client_ca else [])
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in map(os.stat, paths))

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # Without a password callback OpenSSL would ask on the terminal.
        context.load_cert_chain(self._cert, self._key, password=_no_password)
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _no_password() -> str:
    raise ValueError("the private key is encrypted; store it without a password")


def _problem(err: Exception) -> str:
    path = getattr(err, "filename", None)
    text = getattr(err, "strerror", None) or str(err)
    return f"{path}: {text}" if path else text
