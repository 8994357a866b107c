"""TLS with registries: what is trusted, what is shown, and the contexts made of that."""

from __future__ import annotations

import os
import ssl
import threading
from collections import OrderedDict
from dataclasses import dataclass

from shim_core import errors

_MAX_CONTEXTS = 4
"""Each holds all certificates of the system: most of a MiB."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS with one endpoint."""

    ca_paths: tuple[str, ...] = ()
    client_certs: tuple[tuple[str, str], ...] = ()
    insecure: bool = False

    def without_client_certs(self) -> Tls:
        return Tls(self.ca_paths, (), self.insecure)

    def context(self) -> ssl.SSLContext:
        """A context with the system's trust, and these.

        :raises errors.InvalidArgument: a file can't be read; names it.
        """
        made = ssl.create_default_context()
        if self.insecure:
            made.check_hostname = False
            made.verify_mode = ssl.CERT_NONE
        path = ""
        try:
            for path in self.ca_paths:
                made.load_verify_locations(cafile=path)
            for path, key in self.client_certs:
                made.load_cert_chain(path, key or None, password="")
        except (OSError, ssl.SSLError, ValueError) as err:
            reason = err.strerror if isinstance(err, OSError) and not isinstance(err, ssl.SSLError) else "not valid PEM"
            raise errors.InvalidArgument(f"the registry's certificate file {path} can't be used: {reason}") from err
        return made

    def files(self) -> list[str]:
        """All files that a context is made of."""
        system = ssl.get_default_verify_paths()
        own = [*self.ca_paths, *(path for pair in self.client_certs for path in pair)]
        return list(filter(None, (system.cafile, system.capath, *own)))


class TlsContexts:
    """Contexts, kept between pulls: to read all that the system trusts takes longer than asking for a manifest.

    A file that has changed counts from the next request on. Safe to use from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts: OrderedDict[tuple[object, ...], ssl.SSLContext] = OrderedDict()

    def get(self, tls: Tls) -> ssl.SSLContext:
        """The context for some settings.

        :raises errors.InvalidArgument: as :meth:`Tls.context`.
        """
        key = (tls, *map(_state, tls.files()))
        with self._lock:
            made = self._contexts.get(key)
            if made is None:
                made = self._contexts[key] = tls.context()
                if len(self._contexts) > _MAX_CONTEXTS:
                    self._contexts.popitem(last=False)
            self._contexts.move_to_end(key)
            return made


def _state(path: str) -> tuple[int, ...] | None:
    """Tells a file's content from what it was before; None when there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
