"""Port-forward: many TCP connections to a pod over one client connection."""

from __future__ import annotations

import functools
import logging
import socket
from collections import deque

from shim_core.context import CallContext
from shim_core.errors import ShimError
from shim_core.types import PortForwardSession
from shim_streaming.forward_streams import (
    Connect,
    ForwardStreams,
    Input,
    Leave,
    SpdyForwardStreams,
    WebSocketForwardStreams,
)
from shim_streaming.handshake import ForwardProtocol
from shim_streaming.pipes import Sink, Source
from shim_streaming.session import Environment, Session
from shim_streaming.tickets import ForwardTicket

logger = logging.getLogger("shim.streaming.forward")


class _Forward:
    """One connection: from the client to the pod, and back; each direction ends by itself."""

    def __init__(self, session: ForwardSession, key: int) -> None:
        self.key = key
        self._session = session
        self._sock: socket.socket | None = None
        self._source: Source | None = None
        self._sink = Sink(session.loop, session.pressure, self._sent_all)
        self._up_done = False
        self._down_done = False
        self.closed = False

    def connected(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._source = Source(
            self._session.loop, sock.fileno(), self._session.transport, self._received, self._received_all
        )
        self._sink.open(sock.fileno())

    def input(self, payload: memoryview) -> None:
        self._sink.write(payload)

    def flush(self) -> None:
        self._sink.flush()

    def end_input(self) -> None:
        self._sink.end()

    def close(self) -> None:
        """Close both directions at once."""
        if self.closed:
            return
        self.closed = True
        self._sink.close()
        if self._source is not None:
            self._source.close()
        if self._sock is not None:
            self._session.loop.forget(self._sock.fileno())
            self._sock.close()

    def _received(self, data: bytes) -> None:
        self._session.active()
        self._session.streams.send(self.key, data)

    def _received_all(self, err: OSError | None) -> None:
        if err is not None:
            logger.debug(
                "[%s] portforward: the pod broke a connection: %s", self._session.context.request_id, err.strerror
            )
        if err is not None or not self._session.streams.half_close:
            self._session.drop(self, reset=err is not None)
            return
        self._down_done = True
        self._session.streams.end(self.key)
        self.drop_if_done()

    def _sent_all(self) -> None:
        self._up_done = True
        if self._sock is not None and not self.closed:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the pod has closed it already
        self.drop_if_done()

    def drop_if_done(self) -> None:
        """Both directions have ended; one is enough when there is no client for the other."""
        if self._up_done and (self._down_done or self._session.client_is_gone):
            self._session.drop(self, reset=False)


class ForwardSession(Session):
    """One client and its connections. The runtime's hook only makes them; the copying is done here."""

    def __init__(
        self, environment: Environment, context: CallContext, ticket: ForwardTicket, protocol: ForwardProtocol
    ) -> None:
        super().__init__(environment, context, ticket.kind)
        self._ticket = ticket
        self._protocol = protocol
        self.streams: ForwardStreams
        self._forwards: dict[int, _Forward] = {}
        self._to_dial: deque[tuple[_Forward, int]] = deque()
        self._dialling = 0
        self._results: deque[tuple[_Forward, socket.socket | None, str]] = deque()
        self._over = False

    def begin(self) -> None:
        limits = self.environment.limits
        write = self.transport.write
        if self._protocol.websocket and not self._protocol.tunnel:
            self.streams = WebSocketForwardStreams(write, self._ticket.ports, encoded=self._protocol.base64)
        else:
            self.streams = SpdyForwardStreams(write, limits.forwards, tunnel=self._protocol.tunnel)
            self._watch_pairs()
        logger.info("[%s] portforward started to %s", self.context.request_id, self._ticket.sandbox_id[:13])
        for event in self.streams.begin():
            self._connect(event)

    def consume(self, data: bytes) -> None:
        touched: set[_Forward] = set()
        try:
            for event in self.streams.receive(data):
                self.active()
                if isinstance(event, Connect):
                    self._connect(event)
                    continue
                forward = self._forwards.get(event.key)
                if forward is None:
                    continue
                if isinstance(event, Leave):
                    forward.close()
                    self.drop(forward, reset=False)
                    continue
                self._input(forward, event)
                touched.add(forward)
        finally:
            for forward in touched:
                forward.flush()

    def _input(self, forward: _Forward, event: Input) -> None:
        if event.payload:
            forward.input(event.payload)
        if event.last:
            forward.end_input()

    def drop(self, forward: _Forward, *, reset: bool) -> None:
        """A connection is over."""
        forward.close()
        if self._forwards.pop(forward.key, None) is not None:
            self.streams.done(forward.key, reset=reset)
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._forwards or self._over:
            return
        if self.client_is_gone:
            self.loop.stop()
        elif self.streams.fixed:
            self._over = True
            self.streams.go_away()
            self.finish()

    # -- connecting ----------------------------------------------------------------------------------------------------

    def _connect(self, event: Connect) -> None:
        forward = _Forward(self, event.key)
        self._forwards[event.key] = forward
        if event.port is None:
            self._failed(forward, "the port to forward to must be a number from 1 to 65535")
            return
        self._to_dial.append((forward, event.port))
        self._dial_next()

    def _dial_next(self) -> None:
        while self._to_dial and self._dialling < self.environment.limits.dials:
            forward, port = self._to_dial.popleft()
            if forward.closed:
                continue
            self._dialling += 1
            try:
                self.environment.threads.start(
                    f"portforward-{self.context.request_id}-{forward.key}",
                    functools.partial(self._dial, forward, port),
                )
            except RuntimeError:
                self._dialling -= 1
                self._failed(forward, "the node has no more threads to give")

    def _dial(self, forward: _Forward, port: int) -> None:
        """In a thread of its own: have the runtime connect."""
        sock: socket.socket | None = None
        problem = "no runtime plugin forwards ports"
        try:
            session = PortForwardSession(self._ticket.sandbox_id, port)
            sock = self.environment.hooks.stream_port_forward(session=session, context=self.context)
        except ShimError as err:
            problem = f"error forwarding port {port}: {err.message}"
        except Exception:
            # Its text may hold anything: it goes to the log, and never to a client.
            logger.exception("[%s] portforward: the runtime failed", self.context.request_id)
            problem = f"error forwarding port {port}: the log of portoshim has it under [{self.context.request_id}]"
        self._results.append((forward, sock, problem))
        if not self.loop.call_threadsafe(self._take_results):
            self._discard_results()

    def _take_results(self) -> None:
        while self._results:
            self._dialled(*self._results.popleft())

    def _discard_results(self) -> None:
        """The session is over: what was connected for it is closed. From any thread."""
        while True:
            try:
                _, sock, _ = self._results.popleft()
            except IndexError:
                return
            if sock is not None:
                sock.close()

    def _dialled(self, forward: _Forward, sock: socket.socket | None, problem: str) -> None:
        self._dialling -= 1
        if sock is None:
            if not forward.closed:
                self._failed(forward, problem)
        elif forward.closed:
            sock.close()
        else:
            # Even if the client has gone meanwhile: what it had sent before is delivered.
            self.active()
            forward.connected(sock)
        self._dial_next()

    def _failed(self, forward: _Forward, problem: str) -> None:
        logger.info("[%s] portforward: %s", self.context.request_id, problem)
        self.streams.fail(forward.key, problem)
        self.drop(forward, reset=True)

    def _watch_pairs(self) -> None:
        """Connections whose second stream hasn't come are given up."""
        timeout_s = self.environment.limits.creation_timeout_s
        self.streams.expire(f"the client has not opened both streams of a connection within {timeout_s:g} seconds")
        self.loop.call_later(timeout_s, self._watch_pairs)

    # -- the end -------------------------------------------------------------------------------------------------------

    def client_gone(self) -> None:
        for forward in list(self._forwards.values()):
            forward.end_input()
            forward.drop_if_done()
        self._finish_if_over()

    def give_up(self, reason: str) -> None:
        if not self._over:
            self._over = True
            for forward in list(self._forwards.values()):
                self.streams.fail(forward.key, reason)
                self.drop(forward, reset=True)
            self.streams.go_away()
            self.finish()

    def probe(self) -> None:
        self.streams.probe()

    def abandon(self, err: Exception) -> None:
        self._over = True
        self.streams.abandon(err)

    def clean_up(self) -> None:
        for forward in self._forwards.values():
            forward.close()
        self._forwards.clear()
        self._discard_results()
