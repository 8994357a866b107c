"""The socket: who connects, whose turn it is, which thread does it."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from google.protobuf.message import DecodeError

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import client as clients
from shim_embedded_porto import limits, states
from shim_embedded_porto.connection import Connection
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, permission
from shim_embedded_porto.porto import Porto
from shim_embedded_porto.rpc import dispatch
from shim_embedded_porto.rpc.call import Kind

logger = logging.getLogger("shim.embedded_porto.server")

_ALIVE = frozenset({states.RUNNING, states.STARTING, states.STOPPING, states.META})
_RESUME = -1
_SHUTDOWN_S = 30.0


class Server:
    """Serves the protocol on a Unix socket: one thread waits for all connections, pools of threads do the work."""

    def __init__(self, porto: Porto) -> None:
        self._porto = porto
        self._path = porto.options.socket
        self._listener: socket.socket | None = None
        self._epoll = select.epoll()
        self._wake, self.waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._resumed: list[Connection] = []
        self._connections: dict[int, Connection] = {}
        self._per_container: Counter[int] = Counter()
        self._stopping = threading.Event()
        self._pools = {
            Kind.WRITE: ThreadPoolExecutor(limits.WRITE_THREADS, "rw"),
            Kind.READ: ThreadPoolExecutor(limits.READ_THREADS, "ro"),
            Kind.IO: ThreadPoolExecutor(limits.IO_THREADS, "io"),
            Kind.VOLUMES: ThreadPoolExecutor(limits.VOLUME_THREADS, "vl"),
        }

    def listen(self) -> None:
        """:raises OSError: the socket can't be made."""
        temporary = f"{self._path}.new"
        os.makedirs(os.path.dirname(self._path), 0o755, exist_ok=True)
        if os.path.lexists(temporary):
            os.unlink(temporary)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(temporary)
        # Everybody may connect: what a client may do follows from who it is.
        os.chmod(temporary, 0o666)  # noqa: S103
        listener.listen(128)
        listener.setblocking(False)
        os.rename(temporary, self._path)
        self._listener = listener
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        assert self._listener is not None
        while not self._stopping.is_set():
            for fd, events in self._epoll.poll():
                if fd == self._wake:
                    self._resume_all()
                elif fd == self._listener.fileno():
                    self._accept()
                else:
                    connection = self._connections.get(fd)
                    if connection is not None:
                        self._serve(connection, events)
        self._shut_down()

    def stop(self) -> None:
        """End :meth:`run` once the requests being worked on are answered. From any thread, or a signal handler."""
        self._stopping.set()
        self._wake_up()

    def _wake_up(self) -> None:
        try:
            os.write(self.waker, b"x")
        except BlockingIOError:
            pass  # it is to wake up anyway

    # -- connections -----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # gone already
        self._porto.statistics.add("clients_connected")
        try:
            client = self._identify(sock)
            self._make_room(client)
        except Fault as fault:
            logger.info("connection refused: %s", fault)
            sock.close()
            return
        connection = Connection(sock, client, self._rearm)
        self._connections[connection.fd] = connection
        self._per_container[id(client.container)] += 1
        self._porto.statistics.clients = len(self._connections)
        self._epoll.register(connection.fd, select.EPOLLIN | select.EPOLLRDHUP)

    def _identify(self, sock: socket.socket) -> clients.Client:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = memoryview(data).cast("i")
        name = self._porto.cgroups.locate(pid)
        if name is None:
            raise permission(f"no process {pid}")
        container: Container = self._porto.tree.find(name or limits.ROOT)
        return clients.identify(self._porto.tree, pid, uid % (1 << 32), gid % (1 << 32), container)

    def _make_room(self, client: clients.Client) -> None:
        """See that there aren't too many connections: the longest idle one goes.

        :raises Fault: none is idle.
        """
        extra = limits.SUPERUSER_EXTRA if client.superuser else 0
        if self._per_container[id(client.container)] >= limits.CLIENTS_IN_CONTAINER_MAX + extra:
            self._drop_idle(client.container)
        if len(self._connections) >= limits.CLIENTS_MAX + extra:
            self._drop_idle(None)

    def _drop_idle(self, container: Container | None) -> None:
        candidates = [
            connection
            for connection in self._connections.values()
            if container is None or connection.client.container is container
        ]
        victim = max(candidates, key=lambda connection: connection.idle_s)
        if victim.idle_s < limits.CLIENT_IDLE_S:
            raise Fault(pb.ResourceNotAvailable, "All client slots are active")
        logger.info("connection of %s (%d) is idle and makes room", victim.client.comm, victim.client.pid)
        self._close(victim)

    def _close(self, connection: Connection) -> None:
        self._epoll.unregister(connection.fd)
        del self._connections[connection.fd]
        self._per_container[id(connection.client.container)] -= 1
        self._porto.statistics.clients = len(self._connections)
        done = connection.close()
        self._porto.waiters.forget(connection)
        if done:
            self._gone(connection)

    def _gone(self, connection: Connection) -> None:
        weak, connection.client.weak = connection.client.weak, []
        self._porto.events.client_gone(weak)

    # -- requests --------------------------------------------------------------------------------------------------

    def _serve(self, connection: Connection, events: int) -> None:
        alive = True
        if events & select.EPOLLOUT:
            alive = connection.flush()
        if alive and events & ~select.EPOLLOUT:
            alive = connection.receive()  # tells a peer that is gone from an event of an earlier connection
        if alive:
            alive = self._start_next(connection)
        if not alive:
            self._close(connection)

    def _start_next(self, connection: Connection) -> bool:
        """Begin with the next request, if there is one; False when the client is to be dropped."""
        data = connection.next_request()
        if data is None:
            return True
        try:
            request = pb.TContainerRequest.FromString(data)
        except DecodeError:
            logger.warning("client %s (%d): not a request", connection.client.comm, connection.client.pid)
            return False
        if connection.client.container.state not in _ALIVE:
            return False
        connection.waits = request.HasField("wait") or request.HasField("AsyncWait")
        self._porto.statistics.requests_queued += 1
        self._pools[dispatch.kind(request)].submit(self._work, connection, request)
        return True

    def _work(self, connection: Connection, request: pb.TContainerRequest) -> None:
        self._porto.statistics.requests_queued -= 1
        try:
            response = dispatch.handle(self._porto, connection, request)
            more = connection.answer(response) if response is not None else False
        except Exception:
            logger.exception("a request failed")
            more = connection.answer(pb.TContainerResponse(error=pb.Unknown, errorMsg="internal error"))
        connection.active = time.monotonic()
        if connection.closed:
            self._porto.waiters.forget(connection)
            self._gone(connection)
        elif more:
            self._rearm(connection, _RESUME)

    def _rearm(self, connection: Connection, events: int) -> None:
        """Change what is waited for on a connection, or (-1) have it looked at. From any thread."""
        if events == _RESUME:
            self._resumed.append(connection)
            self._wake_up()
            return
        try:
            self._epoll.modify(connection.fd, events)
        except OSError:
            pass  # closed meanwhile

    def _resume_all(self) -> None:
        os.read(self._wake, 4096)
        while self._resumed:
            connection = self._resumed.pop()
            if not connection.closed and not self._start_next(connection):
                self._close(connection)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _shut_down(self) -> None:
        assert self._listener is not None
        self._listener.close()
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass
        deadline = time.monotonic() + _SHUTDOWN_S
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for thread in threading.enumerate():
            if thread.name.startswith(("rw_", "ro_", "io_", "vl_")):
                thread.join(max(0.0, deadline - time.monotonic()))
        # Weak containers go with their client, not with us.
        for connection in list(self._connections.values()):
            connection.flush()
            connection.socket.close()
        self._epoll.close()
