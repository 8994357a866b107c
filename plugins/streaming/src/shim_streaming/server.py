"""The streaming server: listens, lets in who has a token, gives each of them a session."""

from __future__ import annotations

import errno
import functools
import ipaddress
import logging
import socket
import threading
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit

from shim_core.context import CallContext
from shim_core.errors import StartupError, Unavailable
from shim_streaming.command import CommandSession
from shim_streaming.forward import ForwardSession
from shim_streaming.greeting import Greeting
from shim_streaming.handshake import CommandProtocol, ForwardProtocol, Gatekeeper, Refused, Upgrade
from shim_streaming.limits import Limits
from shim_streaming.loop import Loop
from shim_streaming.session import Environment, Session
from shim_streaming.settings import StreamingServerSection, base_url
from shim_streaming.threads import Threads
from shim_streaming.tickets import CommandTicket, ForwardTicket, Ticket, Tickets
from shim_streaming.tls import TlsContexts

logger = logging.getLogger("shim.streaming.server")

_BACKLOG = 1024
_ACCEPTS_A_ROUND = 64
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_RESOURCES_PAUSE_S = 0.5
_NO_RESOURCES_LOG_S = 60.0
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 30, 10, 6


class StreamingServer:
    """Serves exec, attach and port-forward.

    :param hooks: the runtime's side, as in ``Shim.hooks``.
    """

    def __init__(self, section: StreamingServerSection, hooks: Any, limits: Limits | None = None) -> None:
        self._section = section
        self._limits = limits or Limits()
        self._tickets = Tickets(self._limits.tokens, self._limits.token_ttl_s)
        self._threads = Threads()
        self._environment = Environment(hooks, self._limits, section.idle_timeout, self._threads)
        self._greetings: OrderedDict[Greeting, None] = OrderedDict()
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._stopping = False
        self._complain_at = 0.0
        self._sock: socket.socket | None = None
        self._loop: Loop | None = None
        self._listener: threading.Thread | None = None
        self._tls: TlsContexts | None = None
        self._gatekeeper = Gatekeeper(self._tickets.take)
        self.base_url = ""
        """What URLs begin with; known once the server has started."""

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, and serve from a thread of its own.

        :raises StartupError: the address or the certificate can't be used.
        """
        section = self._section
        if section.tls_cert is not None and section.tls_key is not None:
            self._tls = TlsContexts(section.tls_cert, section.tls_key, section.client_ca)
        self._sock = _listen(section.listen_address, section.port)
        bound_address, port = self._sock.getsockname()[:2]
        self.base_url = base_url(section, bound_address, port)
        names = {urlsplit(self.base_url).hostname, socket.gethostname().lower()}
        prefix = urlsplit(self.base_url).path.rstrip("/")
        self._gatekeeper = Gatekeeper(self._tickets.take, frozenset(name for name in names if name), prefix)
        self._log_where(bound_address, port)
        self._loop = Loop()
        self._loop.on_readable(self._sock.fileno(), self._accept)
        self._listener = threading.Thread(target=self._run, name="streaming", daemon=True)
        self._listener.start()

    def stop(self) -> None:
        """Take no more clients, end the sessions, wait a little for them."""
        if self._loop is None or self._listener is None:
            return
        with self._lock:
            self._stopping = True
            sessions = list(self._sessions)
        self._loop.call_threadsafe(self._loop.stop)
        self._listener.join(self._limits.stop_timeout_s)
        for session in sessions:
            session.stop()
        left = self._threads.join(self._limits.stop_timeout_s)
        if left:
            logger.warning("streaming threads that have not ended: %s", ", ".join(left))

    def _run(self) -> None:
        assert self._loop is not None
        assert self._sock is not None
        try:
            self._loop.run()
        except Exception:
            logger.exception("the streaming server has failed: exec, attach and port-forward are gone until a restart")
        finally:
            self._sock.close()
            for greeting in list(self._greetings):
                greeting.close()
            self._loop.close()

    def _log_where(self, bound_address: str, port: int) -> None:
        how = "TLS" if self._tls else "plain HTTP"
        logger.info("streaming on %s port %d, %s; clients are given %s", bound_address, port, how, self.base_url)
        if self._tls is None and not ipaddress.ip_address(bound_address).is_loopback:
            logger.warning("streaming without TLS on %s: what passes can be read on the network", bound_address)
        elif self._tls is None and "address" not in self._section.model_fields_set:
            logger.info("streaming on loopback only, because neither TLS nor an address is configured")

    # -- URLs ----------------------------------------------------------------------------------------------------------

    def url(self, ticket: Ticket) -> str:
        """An absolute URL at which a client can have what the ticket says, once and soon.

        :raises ResourceExhausted: too many are waiting.   :raises Unavailable: the server doesn't run.
        """
        if self._listener is None or not self._listener.is_alive() or self._stopping:
            raise Unavailable("the streaming server is not running")
        return f"{self.base_url}/{ticket.kind}/{self._tickets.issue(ticket)}"

    def state(self) -> dict[str, Any]:
        """What it is doing, for people."""
        with self._lock:
            sessions = len(self._sessions)
        return {
            "baseURL": self.base_url,
            "tls": self._tls is not None,
            "sessions": sessions,
            "unusedURLs": len(self._tickets),
        }

    # -- the listener's thread -----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._sock is not None
        assert self._loop is not None
        for _ in range(_ACCEPTS_A_ROUND):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as err:
                if err.errno in _NO_RESOURCES:
                    self._pause(err)
                    return
                continue  # that one is gone already
            try:
                self._greet(self._loop, sock)
            except (OSError, ValueError) as err:
                logger.debug("a connection broke at once: %s", err)
                sock.close()

    def _pause(self, err: OSError) -> None:
        """Wait for descriptors: the connection stays in the backlog, and asking at once would be a busy loop."""
        assert self._sock is not None
        assert self._loop is not None
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + _NO_RESOURCES_LOG_S
            logger.error("no connection can be accepted: %s", err.strerror)
        fd = self._sock.fileno()
        self._loop.on_readable(fd, None)
        self._loop.call_later(_NO_RESOURCES_PAUSE_S, functools.partial(self._loop.on_readable, fd, self._accept))

    def _greet(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        if self._tls is not None:
            sock = self._tls.current().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        if len(self._greetings) >= self._limits.greetings:
            # An honest client is done in a moment: the one that has been here longest isn't one.
            next(iter(self._greetings)).close()
        greeting = Greeting(loop, sock, self._gatekeeper, self._limits, self._admit, self._greeted)
        if not greeting.over:
            self._greetings[greeting] = None

    def _greeted(self, greeting: Greeting) -> None:
        self._greetings.pop(greeting, None)

    def _admit(self, sock: socket.socket, upgrade: Upgrade, answer: bytes, early: bytes) -> None:
        session = self._session(upgrade)
        with self._lock:
            if self._stopping or len(self._sessions) >= self._limits.sessions:
                raise Refused(503, "too many sessions", [("Retry-After", "10")])
            self._sessions.add(session)
        try:
            name = f"{session.name}-{session.context.request_id}-io"
            self._threads.start(name, functools.partial(self._serve, session, sock, answer, early))
        except RuntimeError:
            self._ended(session)
            raise Refused(503, "no more threads", [("Retry-After", "10")]) from None

    def _session(self, upgrade: Upgrade) -> Session:
        ticket, protocol = upgrade.ticket, upgrade.protocol
        if isinstance(ticket, CommandTicket):
            assert isinstance(protocol, CommandProtocol)
            context = CallContext(ticket.kind.capitalize(), ticket.request_id)
            return CommandSession(self._environment, context, ticket, protocol)
        assert isinstance(ticket, ForwardTicket)
        assert isinstance(protocol, ForwardProtocol)
        return ForwardSession(self._environment, CallContext("PortForward", ticket.request_id), ticket, protocol)

    # -- a session's thread --------------------------------------------------------------------------------------------

    def _serve(self, session: Session, sock: socket.socket, answer: bytes, early: bytes) -> None:
        try:
            session.run(sock, answer, early)
        finally:
            self._ended(session)

    def _ended(self, session: Session) -> None:
        with self._lock:
            self._sessions.discard(session)


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket.

    :raises StartupError: says which key to change.
    """
    try:
        try:
            return _bound(address, port)
        except OSError as err:
            # Without IPv6 on the node, "all addresses" are those of IPv4.
            if address != "::" or err.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return _bound("0.0.0.0", port)
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            advice = f"port {port} is taken by another process; choose another StreamingServer.Port, or 0 for any"
        elif err.errno == errno.EADDRNOTAVAIL:
            advice = "this node has no such address; correct StreamingServer.Address"
        else:
            advice = err.strerror or str(err)
        raise StartupError(f"streaming server: can't listen on {address}: {advice}") from err


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
