"""What exec, attach and port-forward have in common: a client connection with a thread and a loop of its own.

How a connection ends::

    the session is over     say so, send what waits, close, give the client a moment to close too
    the client is gone      pass on what it had sent, wait the grace time, cancel the runtime's work
    the protocol is broken  tell the client, close; the runtime's work is cancelled
    idle too long, or the daemon stops    as if over, and cancelled
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from shim_core.config import format_duration
from shim_core.context import CallContext
from shim_streaming.channels import ClientLeft
from shim_streaming.limits import Limits
from shim_streaming.loop import Loop
from shim_streaming.pipes import Pressure
from shim_streaming.spdy import SpdyError
from shim_streaming.threads import Threads
from shim_streaming.transport import Transport
from shim_streaming.websocket import WebSocketError

logger = logging.getLogger("shim.streaming.session")


@dataclass(frozen=True, slots=True)
class Environment:
    """What every session needs from the server."""

    hooks: Any
    limits: Limits
    idle_timeout_s: float
    threads: Threads


class Session(ABC):
    """One client. :meth:`run` is the life of its thread; everything else but :meth:`stop` happens in that thread."""

    def __init__(self, environment: Environment, context: CallContext, name: str) -> None:
        self.environment = environment
        self.context = context
        self.name = name
        self.loop: Loop
        self.transport: Transport
        self.pressure: Pressure
        self._started = threading.Event()
        self._stop_asked = False
        self._held = False
        self._probing = False
        self._last_active = 0.0
        self._seen_waiting_bytes = 0
        self.client_is_gone = False
        """Nothing comes from it any more, and nothing reaches it."""

    # -- for the server ------------------------------------------------------------------------------------------------

    def run(self, sock: socket.socket, greeting: bytes, early: bytes) -> None:
        """Serve a client until the session is over.

        :param sock: connected and non-blocking; closed in the end.
        :param greeting: what to send first.   :param early: what the client has sent already.
        """
        try:
            self.loop = Loop()
        except OSError as err:
            logger.error("[%s] %s: %s", self.context.request_id, self.name, err.strerror)
            sock.close()
            self.context.cancel()
            return
        self.transport = Transport(self.loop, sock, self, self.environment.limits.linger_s)
        self.pressure = Pressure(self._hold)
        self._last_active = time.monotonic()
        self._started.set()
        try:
            self.transport.write(greeting)
            self.begin()
            self.transport.start(early)
            self._watch_idleness()
            if self._stop_asked:
                self._stop()
            self.loop.run()
        except Exception:
            logger.exception("[%s] %s failed", self.context.request_id, self.name)
        finally:
            self.context.cancel()
            self.transport.close()
            self.loop.close()
            self.clean_up()

    def stop(self) -> None:
        """The daemon stops: end the session soon. From any thread."""
        self._stop_asked = True
        if self._started.is_set():
            self.loop.call_threadsafe(self._stop)

    # -- for the kinds of session --------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> None:
        """The client is connected."""

    @abstractmethod
    def consume(self, data: bytes) -> None:
        """The client has sent this.

        :raises SpdyError, WebSocketError: it breaks the protocol.   :raises ClientLeft: it is done.
        """

    @abstractmethod
    def client_gone(self) -> None:
        """Nothing more will come from the client, and nothing will reach it."""

    @abstractmethod
    def give_up(self, reason: str) -> None:
        """End the session from our side: tell the client, and call :meth:`finish`."""

    @abstractmethod
    def abandon(self, err: Exception) -> None:
        """Tell the client what it did wrong."""

    @abstractmethod
    def probe(self) -> None:
        """Send the client something that it doesn't answer."""

    @abstractmethod
    def clean_up(self) -> None:
        """The loop is closed: close what is still open. Called once, whatever happened."""

    def active(self) -> None:
        """Something moved: the session isn't idle."""
        self._last_active = time.monotonic()

    def finish(self) -> None:
        """Everything has been said: close the connection in order and end."""
        self.transport.finish(self.loop.stop)

    def end_after(self, delay_s: float) -> None:
        """End in ``delay_s`` seconds, whatever is left to do."""
        self.loop.call_later(delay_s, self.loop.stop)

    # -- what the client does (Receiver) -------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        try:
            self.consume(data)
        except (SpdyError, WebSocketError) as err:
            logger.warning("[%s] %s: closed: %s", self.context.request_id, self.name, err)
            self.abandon(err)
            self.finish()
            self.end_after(self.environment.limits.linger_s)
            self.loop.call_soon(self.context.cancel)
        except ClientLeft:
            # Its goodbye is answered; what it had sent before may still be on its way to the process.
            self.transport.finish(lambda: None)
            self._gone()

    def _hold(self, held: bool) -> None:
        """The client isn't read while what it has sent can't be passed on."""
        self.transport.hold(held)
        self._held = held
        if held and not self._probing:
            self._probing = True
            self.loop.call_later(self.environment.limits.probe_interval_s, self._probe)

    def _probe(self) -> None:
        """Find out whether the client is still there.

        Its goodbye would wait behind its data, which isn't read. But what is sent to one that is gone comes back.
        """
        self._probing = False
        if self._held and not self.client_is_gone:
            self.probe()
            self._hold(True)

    def hung_up(self) -> None:
        # It is still to be read, when there is room for it. If that isn't soon, it won't be.
        self.end_after(self.environment.limits.disconnect_grace_s)

    def lost(self) -> None:
        self._gone()

    def _gone(self) -> None:
        if not self.client_is_gone:
            self.client_is_gone = True
            self.end_after(self.environment.limits.disconnect_grace_s)
            self.client_gone()

    # -- the end -------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._cut("portoshim is stopping", self.environment.limits.stop_linger_s)

    def _cut(self, reason: str, linger_s: float) -> None:
        self.give_up(reason)
        self.end_after(linger_s)
        self.loop.call_soon(self.context.cancel)

    def _watch_idleness(self) -> None:
        now = time.monotonic()
        waiting_bytes = self.transport.waiting_bytes
        if waiting_bytes != self._seen_waiting_bytes:
            # The client still takes what a finished session has left.
            self._seen_waiting_bytes = waiting_bytes
            self._last_active = now
        due = self._last_active + self.environment.idle_timeout_s
        if now < due:
            self.loop.call_at(due, self._watch_idleness)
        else:
            logger.info("[%s] %s: closed: idle", self.context.request_id, self.name)
            idle = format_duration(self.environment.idle_timeout_s)
            self._cut(f"the session was idle for {idle}", self.environment.limits.linger_s)
