"""One client's connection: requests come in one after the other, answers and reports go out."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from porto_api.errors import ProtocolError

from porto_api import framing
from porto_api import rpc_pb2 as pb
from shim_embedded_porto.client import Client
from shim_embedded_porto.waiters import Report

logger = logging.getLogger("shim.embedded_porto.connection")

_UNSENT_MAX = 64 << 20
"""A client that lets more than this pile up is dropped."""
_RECEIVE_BYTES = 256 << 10
_PIPELINE_MAX = 64
_INPUT = select.EPOLLIN | select.EPOLLRDHUP


class Connection:
    """A connection. Its requests run in other threads, so may its reports.

    :param rearm: called with the events to wait for from now on.
    """

    def __init__(self, sock: socket.socket, client: Client, rearm: Callable[[Connection, int], None]) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.client = client
        self.fd = sock.fileno()
        self.active = time.monotonic()
        self.waits = False
        """True when it was last heard of for a Wait: then it isn't idle."""
        self._rearm = rearm
        self._lock = threading.Lock()
        self._decoder = framing.Decoder()
        self._requests: deque[bytes] = deque()
        self._output = bytearray()
        self._processing = False
        self._sync_wait = False
        self._closed = False
        self._events = _INPUT

    # -- input -----------------------------------------------------------------------------------------------------

    def receive(self) -> bool:
        """Take in what has come; False when the connection is over."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        self.active = time.monotonic()
        try:
            self._requests.extend(self._decoder.feed(data))
        except ProtocolError as err:
            logger.warning("client %s (%d): %s", self.client.comm, self.client.pid, err)
            return False
        with self._lock:
            self._update_events()
        return True

    def next_request(self) -> bytes | None:
        """A request to be worked on now; None while another is, or there is none."""
        with self._lock:
            if self._processing or not self._requests or self._closed:
                return None
            self._processing = True
            return self._requests.popleft()

    # -- output ----------------------------------------------------------------------------------------------------

    def answer(self, response: pb.TContainerResponse) -> bool:
        """Send the answer to the request being worked on; True when the next can be."""
        with self._lock:
            self._processing = self._sync_wait = False
            self._send(_encode(response))
            return bool(self._requests) and not self._closed

    def await_report(self) -> None:
        """The request being worked on is answered by a report, sooner or later."""
        with self._lock:
            self._sync_wait = True

    def visible_name(self, name: str) -> str | None:
        return self.client.visible_name(name)

    def report(self, report: Report, *, asynchronous: bool) -> None:
        """Send a report, or queue it."""
        response = pb.TContainerResponse(error=pb.Success)
        wait = response.AsyncWait if asynchronous else response.wait
        wait.name, wait.state, wait.when = report.name, report.state, report.when
        if report.label:
            wait.label = report.label
            if report.value:
                wait.value = report.value
        with self._lock:
            if not asynchronous:
                if not self._sync_wait:
                    return  # answered already
                self._processing = self._sync_wait = False
            self._send(_encode(response))
            more = not asynchronous and bool(self._requests)
        if more:
            self._rearm(self, -1)

    def flush(self) -> bool:
        """Send what is left; False when the connection is over."""
        with self._lock:
            return self._flush()

    def _send(self, data: bytes) -> None:
        if self._closed:
            return
        self._output += data
        self._flush()

    def _flush(self) -> bool:
        try:
            while self._output:
                sent = self.socket.send(self._output)
                del self._output[:sent]
        except BlockingIOError:
            if len(self._output) > _UNSENT_MAX:
                logger.warning("client %s (%d) doesn't read its answers", self.client.comm, self.client.pid)
                self._shut()
                return False
        except OSError:
            self._shut()
            return False
        self._update_events()
        return True

    def _shut(self) -> None:
        """The server's thread sees to the rest."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _update_events(self) -> None:
        if self._closed:
            return
        events = select.EPOLLOUT if self._output else 0
        if len(self._requests) < _PIPELINE_MAX:
            events |= _INPUT
        if events != self._events:
            self._events = events
            self._rearm(self, events)

    # -- the end ---------------------------------------------------------------------------------------------------

    @property
    def idle_s(self) -> float:
        """For how long nothing was asked; 0 while something is going on."""
        if self._processing or self.waits or self._output:
            return 0.0
        return time.monotonic() - self.active

    def close(self) -> bool:
        """Close; True when no request is being worked on any more."""
        with self._lock:
            self._closed = True
            self.socket.close()
            if self._sync_wait:
                self._processing = self._sync_wait = False
            return not self._processing

    @property
    def closed(self) -> bool:
        return self._closed


def _encode(response: pb.TContainerResponse) -> bytes:
    try:
        return framing.encode(response)
    except ProtocolError as err:
        return framing.encode(pb.TContainerResponse(error=pb.Unknown, errorMsg=str(err)))
