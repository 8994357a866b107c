"""HTTP to registries: connections that can be cut from another thread, TLS, proxies, time limits for each phase.

No redirects, no retries, no authentication: those are decided in :mod:`~shim_porto_runtime.images.registry`.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from shim_core import __version__
from shim_core.context import CallContext
from shim_porto_runtime.images.tls import Tls, TlsContexts

USER_AGENT = f"portoshim/{__version__}"

Connection = HTTPConnection | HTTPSConnection

_FAILURES = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError)


class TransportError(Exception):
    """No answer, or half of one. The text names no more than the host."""


class CertificateError(TransportError):
    """The server's certificate, or ours, isn't accepted: trying again won't help."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds for each phase of a request."""

    connect_s: float = 10.0
    """TCP and TLS, each."""
    header_s: float = 30.0
    """From the request to the answer's header."""
    progress_s: float = 300.0
    """Without a byte of the body."""


@dataclass(frozen=True, slots=True)
class _Proxy:
    host: str
    port: int
    authorization: tuple[tuple[str, str], ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Peer:
    """Whom a connection is to, and how: connections to the same peer are interchangeable."""

    scheme: str
    host: str
    port: int
    tls: Tls
    proxy: _Proxy | None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Transport:
    """Connections to any number of hosts, kept open between requests. Safe to use from many threads."""

    def __init__(self, timeouts: Timeouts, contexts: TlsContexts) -> None:
        self._timeouts = timeouts
        self._contexts = contexts
        self._lock = threading.Lock()
        self._idle: dict[_Peer, list[Connection]] = {}
        self._closed = False

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        tls: Tls,
        context: CallContext,
        *,
        connect_timeout_s: float | None = None,
    ) -> Response:
        """Send a GET request; the answer, whatever its status, with the body still to be read.

        :raises TransportError: there is none.
        :raises errors.Cancelled: the context was cancelled.
        """
        context.check()
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as err:
            raise TransportError("the address is not a URL") from err
        host = parts.hostname or ""
        peer = _Peer(parts.scheme, host, port, tls, _proxy_for(parts.scheme, host, port))
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        if peer.proxy is not None and peer.scheme == "http":
            target, headers = f"http://{peer}{target}", {**headers, **dict(peer.proxy.authorization)}
        connection = self._take(peer)
        if connection is not None:
            try:
                return self._exchange(connection, peer, target, headers, context)
            except TransportError:
                # The server may have closed it while it was idle: a GET can be sent again.
                context.check()
        connection = self._connect(peer, context, connect_timeout_s or self._timeouts.connect_s)
        return self._exchange(connection, peer, target, headers, context)

    def close(self) -> None:
        """Close what is idle, and everything else when its answer is read."""
        with self._lock:
            self._closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _take(self, peer: _Peer) -> Connection | None:
        with self._lock:
            connections = self._idle.get(peer)
            return connections.pop() if connections else None

    def _give_back(self, peer: _Peer, connection: Connection) -> None:
        with self._lock:
            if not self._closed and connection.sock is not None:
                self._idle.setdefault(peer, []).append(connection)
                return
        connection.close()

    def _connect(self, peer: _Peer, context: CallContext, timeout_s: float) -> Connection:
        # Registries answer many small requests: header and body must not wait for each other.
        options: list[tuple[int, int, int | bytes]] = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        ]
        where = (peer.proxy.host, peer.proxy.port) if peer.proxy is not None else (peer.host, peer.port)
        timeout_s = max(context.remaining_s(timeout_s), 0.001)
        connection: Connection
        if peer.scheme == "http":
            connection = HTTPConnection(*where, timeout=timeout_s, socket_options=options)
        else:
            ssl_context = self._contexts.get(peer.tls)
            connection = HTTPSConnection(*where, timeout=timeout_s, socket_options=options, ssl_context=ssl_context)
            if peer.proxy is not None:
                connection.set_tunnel(peer.host, peer.port, headers=dict(peer.proxy.authorization))
        try:
            connection.connect()
        except _FAILURES as err:
            connection.close()
            context.check()
            way = f" by way of the proxy {peer.proxy.host}:{peer.proxy.port}" if peer.proxy is not None else ""
            raise _failure(err, f"can't connect to {peer}{way}") from err
        return connection

    def _exchange(
        self, connection: Connection, peer: _Peer, target: str, headers: Mapping[str, str], context: CallContext
    ) -> Response:
        sock = connection.sock
        if sock is None:
            raise TransportError("the connection is closed")
        undo = context.on_cancel(lambda: _cut(sock))
        try:
            sock.settimeout(max(context.remaining_s(self._timeouts.header_s), 0.001))
            connection.request(
                "GET",
                target,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers},
                preload_content=False,
                decode_content=False,
            )
            answer = connection.getresponse()
            sock.settimeout(self._timeouts.progress_s)
        except BaseException as err:
            undo()
            connection.close()
            if isinstance(err, _FAILURES):
                context.check()
                raise _failure(err, f"no answer from {peer}") from err
            raise

        def finish(complete: bool) -> None:
            undo()
            if complete and not context.cancelled:
                self._give_back(peer, connection)
            else:
                answer.close()
                connection.close()

        return Response(answer, context, str(peer), finish)


class Response:
    """An answer whose body is read piece by piece. A context manager: it must be closed."""

    def __init__(
        self, answer: urllib3.HTTPResponse, context: CallContext, host: str, finish: Callable[[bool], None]
    ) -> None:
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers
        """Names in any case; values of a repeated header are joined by commas."""
        self._answer = answer
        self._context = context
        self._host = host
        self._finish: Callable[[bool], None] | None = finish
        self._complete = False

    def read(self, limit_bytes: int) -> bytes:
        """Up to that many bytes, as soon as there are any; none at the end.

        :raises TransportError: the connection broke, or nothing came for too long.
        """
        try:
            data: bytes = self._answer.read1(limit_bytes)
        except _FAILURES as err:
            self._context.check()
            raise _failure(err, f"the answer of {self._host} broke off") from err
        if not data:
            self._context.check()
            self._complete = True
        return data

    def read_all(self, limit_bytes: int) -> bytes:
        """The whole body; one byte more than the limit when it is longer."""
        pieces = []
        missing = limit_bytes + 1
        while missing > 0 and (data := self.read(min(missing, 65536))):
            pieces.append(data)
            missing -= len(data)
        return b"".join(pieces)

    def close(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish(self._complete)

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _proxy_for(scheme: str, host: str, port: int) -> _Proxy | None:
    """The proxy that the daemon's environment names for a host (``HTTPS_PROXY``, ``NO_PROXY``)."""
    url = urllib.request.getproxies_environment().get(scheme)
    if not url or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise TransportError(f"the proxy in {scheme.upper()}_PROXY must be an http:// URL")
    authorization: tuple[tuple[str, str], ...] = ()
    if parts.username is not None:
        user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        authorization = tuple(urllib3.make_headers(proxy_basic_auth=f"{user}:{password}").items())
    return _Proxy(parts.hostname, parts.port or 3128, authorization)


def _cut(sock: socket.socket) -> None:
    """Wake a thread that is blocked on the socket. TLS is cut below TLS: its own shutdown isn't safe here."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


def _failure(err: BaseException, what: str) -> TransportError:
    """Our error for one of a library's, without what it may quote (URLs hold signatures, headers tokens)."""
    chain: BaseException | None = err
    while chain is not None:
        if isinstance(chain, ssl.SSLCertVerificationError):
            return CertificateError(f"{what}: its certificate isn't trusted: {chain.verify_message}")
        if isinstance(chain, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return TransportError(f"{what}: the connection was closed")
        if isinstance(chain, ssl.SSLError):
            return CertificateError(f"{what}: TLS failed: {chain.reason or 'the connection was closed'}")
        if isinstance(chain, TimeoutError):
            return TransportError(f"{what}: timed out")
        if isinstance(chain, socket.gaierror):
            return TransportError(f"{what}: the name can't be resolved")
        if isinstance(chain, OSError) and chain.strerror:
            return TransportError(f"{what}: {chain.strerror}")
        if isinstance(chain, http.client.IncompleteRead | http.client.RemoteDisconnected):
            return TransportError(f"{what}: the connection was closed")
        chain = chain.__cause__ or chain.__context__
    return TransportError(f"{what}: {type(err).__name__}")
