"""One connection to portod, and the pool that lends connections to calls.

Porto answers the requests of one connection in order, and ties weak containers to the connection that made them.
So a connection carries one call at a time; calls in parallel use connections of their own.
"""

from __future__ import annotations

import enum
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError

from porto_api import errors, framing, rpc_pb2
from porto_api.cancel import CancelToken

READ_ONLY = frozenset(
    {
        "list", "getProperty", "getData", "propertyList", "dataList", "version", "get", "wait", "FindLabel",
        "ListContainersBy", "listVolumeProperties", "listVolumes", "GetVolume", "checkVolume", "listLayers",
        "getlayerprivate", "listStorage", "convertPath", "locateProcess", "GetSystem", "dockerImageStatus",
        "listDockerImages",
    }
)  # fmt: skip
"""Requests that change nothing in Porto: the only ones that are ever sent a second time."""

_CHUNK = 65536


class State(enum.Enum):
    NEW = "NEW"
    IDLE = "IDLE"
    ACTIVE = "ACTIVE"
    CLOSED = "CLOSED"


class Connection:
    """A connected stream socket that speaks one request and one answer at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.state = State.NEW
        self.calls = 0
        self._socket: socket.socket | None = None
        self._decoder = framing.Decoder()
        self._pending: deque[rpc_pb2.TContainerResponse] = deque()

    def __repr__(self) -> str:
        return f"<Connection {self.path} {self.state.value} calls={self.calls}>"

    def connect(self, deadline: float | None = None) -> None:
        """Connect to the socket.

        :raises errors.SocketUnavailable: there is no socket, or nobody listens on it.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(_remaining(deadline))
            sock.connect(self.path)
        except OSError as err:
            sock.close()
            raise errors.SocketUnavailable(f"can't connect to {self.path}: {err.strerror or err}") from err
        self._socket = sock
        self.state = State.IDLE

    def call(
        self,
        request: rpc_pb2.TContainerRequest,
        deadline: float | None = None,
        cancel: CancelToken | None = None,
    ) -> rpc_pb2.TContainerResponse:
        """Send a request and read its answer. Any failure of the transport closes the connection.

        :param deadline: in seconds of ``time.monotonic``.
        :returns: the answer, whatever its ``error`` says.
        """
        self.send(request, deadline, cancel)
        return self.receive(deadline, cancel)

    def send(
        self,
        request: rpc_pb2.TContainerRequest,
        deadline: float | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        frame = framing.encode(request)
        with self._transfer(deadline, cancel) as sock:
            self.calls += 1
            sock.sendall(frame)

    def receive(self, deadline: float | None = None, cancel: CancelToken | None = None) -> rpc_pb2.TContainerResponse:
        """The next answer of this connection; asynchronous ones come between."""
        while not self._pending:
            with self._transfer(deadline, cancel) as sock:
                data = sock.recv(_CHUNK)
                if not data:
                    raise errors.SocketError("portod closed the connection")
                for payload in self._decoder.feed(data):
                    response = rpc_pb2.TContainerResponse()
                    try:
                        response.ParseFromString(payload)
                    except DecodeError as err:
                        raise errors.ProtocolError("portod sent a message that can't be parsed") from err
                    self._pending.append(response)
            deadline_passed = deadline is not None and time.monotonic() >= deadline
            if deadline_passed and not self._pending:
                self.close()
                raise errors.SocketTimeout("no answer from portod in time")
        if self._socket is not None:
            self.state = State.IDLE
        return self._pending.popleft()

    def fileno(self) -> int:
        """The socket, to be polled for an answer that is to be received.

        :raises errors.SocketError: the connection is closed.
        """
        if self._socket is None:
            raise errors.SocketError("the connection is closed")
        return self._socket.fileno()

    def healthy(self) -> bool:
        """False once the peer has closed, or sent something nobody asked for."""
        if self._socket is None or self._pending or self._decoder.partial:
            return False
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLHUP)
        return not poller.poll(0)

    def close(self) -> None:
        self.state = State.CLOSED
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @contextmanager
    def _transfer(self, deadline: float | None, cancel: CancelToken | None) -> Iterator[socket.socket]:
        """The socket for one send or receive, with the deadline set and errors made ours."""
        if cancel is not None and cancel.cancelled:
            self.close()
            raise errors.Cancelled("the call was cancelled")
        sock = self._socket
        if sock is None:
            raise errors.SocketError("the connection is closed")

        def interrupt() -> None:
            # Wakes the thread that is blocked on the socket; closing it here would race with that thread.
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

        self.state = State.ACTIVE
        if cancel is not None:
            cancel.add(interrupt)
        try:
            sock.settimeout(_remaining(deadline))
            yield sock
        except (OSError, errors.PortoError) as err:
            self.close()
            if cancel is not None and cancel.cancelled:
                raise errors.Cancelled("the call was cancelled") from err
            if isinstance(err, TimeoutError):
                raise errors.SocketTimeout("no answer from portod in time") from err
            if isinstance(err, OSError):
                raise errors.SocketError(f"connection to portod lost: {err.strerror or err}") from err
            raise
        finally:
            if cancel is not None:
                cancel.discard(interrupt)
                if cancel.cancelled:
                    # The callback may still be about to run: this connection must never serve another call.
                    self.close()


class Pool:
    """Connections to one portod, lent to one call each.

    :param max_connections: how many may be in use at once; further calls wait for one, within their deadline.
        portod takes 1000 clients (500 from one container).
    :param max_idle: how many are kept open between calls.
    """

    def __init__(self, path: str, max_connections: int = 256, max_idle: int = 16) -> None:
        self.path = path
        self._max_idle = max_idle
        self._slots = threading.BoundedSemaphore(max_connections)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Pool {self.path} idle={len(self._idle)}{' CLOSED' if self._closed else ''}>"

    @contextmanager
    def connection(self, deadline: float | None = None, *, fresh: bool = False) -> Iterator[Connection]:
        """A connection for one call; it goes back to the pool unless the call broke or closed it.

        :param fresh: never one that was used before.
        :raises errors.SocketTimeout: none became free in time.
        :raises errors.SocketUnavailable: portod can't be reached.
        """
        if not self._slots.acquire(timeout=_remaining(deadline)):
            raise errors.SocketTimeout("all connections to portod are in use")
        try:
            connection = None if fresh else self._take_idle()
            if connection is None:
                connection = Connection(self.path)
                connection.connect(deadline)
            try:
                yield connection
            finally:
                self._give_back(connection)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Close what is idle now, and every lent connection when it comes back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take_idle(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            # A restarted portod has closed it: found out before a request is sent, so nothing needs sending twice.
            if connection.healthy():
                return connection
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        if connection.state is State.IDLE:
            with self._lock:
                if not self._closed and len(self._idle) < self._max_idle:
                    self._idle.append(connection)
                    return
        connection.close()


def _remaining(deadline: float | None) -> float | None:
    """Seconds left, never 0: a socket timeout of 0 would mean non-blocking."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.001)
