"""Answers the requests of clients: one at a time, none of which waits for anything."""

from __future__ import annotations

import os
import select
import socket
import struct
import time

from shim_porto_runtime.keeper import process, protocol
from shim_porto_runtime.keeper.protocol import Refusal
from shim_porto_runtime.keeper.streams import status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim_porto_runtime.keeper.worker import Worker

    Message = dict[str, Any]
    Answer = tuple[Message, list[int]] | None
    """A packet; None when the operation has taken the connection."""
    Operation = Callable[[Message, list[int], socket.socket], Answer]

_MAX_CONNECTIONS = 1024
_DEAF_S = 1.0
"""How long no connection is accepted when there are no descriptors for it."""
_ANY_VERSION = ("stats", "hand-over")


class Server:
    """Everything that comes in at the keeper's socket.

    :param listening: the socket; stays the caller's.
    """

    def __init__(self, worker: Worker, listening: int) -> None:
        self._worker = worker
        self._loop = worker.loop
        self._streams = worker.streams
        self._connections: set[socket.socket] = set()
        self._deaf_until: float | None = None
        self._listener = socket.socket(fileno=os.dup(listening))
        self._listener.setblocking(False)
        self._operations: dict[str, Operation] = {
            "open": self._open,
            "reopen": self._reopen,
            "flush": self._flush,
            "attach": self._attach,
            "resize": self._resize,
            "close-stdin": self._close_stdin,
            "close": self._close,
            "list": self._list,
            "stats": self._stats,
            "hand-over": self._hand_over,
            "stop": self._stop,
        }
        self._listen()

    @property
    def connected(self) -> bool:
        """Whether anybody is there who may ask for something."""
        return bool(self._connections)

    def look_after(self) -> float:
        """Listen again, if that is due; in how many seconds to ask next."""
        if self._deaf_until is None:
            return 60.0
        left = self._deaf_until - time.monotonic()
        if left > 0:
            return left
        self._deaf_until = None
        self._listen()
        return 60.0

    def _listen(self) -> None:
        self._loop.watch(self._listener.fileno(), select.EPOLLIN, self._accept)

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as err:
            process.log(f"no connection can be accepted: {err.strerror}")
            self._loop.forget(self._listener.fileno())  # or it would be ready again at once, and for ever
            self._deaf_until = time.monotonic() + _DEAF_S
            return
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()) or len(self._connections) >= _MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        self._loop.watch(connection.fileno(), select.EPOLLIN, lambda _events: self._receive(connection))

    def _drop(self, connection: socket.socket) -> None:
        self._release(connection)
        connection.close()

    def _release(self, connection: socket.socket) -> None:
        """The connection is somebody else's from now on."""
        self._connections.discard(connection)
        self._loop.forget(connection.fileno())

    def _receive(self, connection: socket.socket) -> None:
        try:
            packet = protocol.receive(connection)
        except BlockingIOError:
            return
        except (OSError, protocol.ProtocolError):
            packet = None
        if packet is None:
            self._drop(connection)
            return
        answer = self._answer(packet[0], packet[1], connection)
        if answer is None:
            return
        try:
            protocol.send(connection, *answer)
        except OSError:
            self._drop(connection)
        finally:
            protocol.close_all(answer[1])

    def _answer(self, message: Message, fds: list[int], connection: socket.socket) -> Answer:
        name = message.get("op")
        operation = self._operations.get(name) if isinstance(name, str) else None
        try:
            if operation is None:
                raise Refusal("UNIMPLEMENTED", f"this stream keeper doesn't know {name!r}: hand over to a newer one")
            if message.get("v") != protocol.VERSION and name not in _ANY_VERSION:
                raise Refusal("UNIMPLEMENTED", f"this stream keeper speaks version {protocol.VERSION} of its protocol")
            return operation(message, fds, connection)
        except Refusal as refusal:
            return {"ok": False, "code": refusal.code, "message": refusal.message}, []
        except Exception as err:
            import traceback  # costs memory that a keeper without bugs doesn't need

            process.log(f"{name!r}: {traceback.format_exc()}")
            return {"ok": False, "code": "INTERNAL", "message": f"the stream keeper: {err!r}"}, []
        finally:
            protocol.close_all(fds)  # an operation that keeps some takes them out

    # -- operations ----------------------------------------------------------------------------------------------------

    def _open(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        theirs = self._streams.open(
            message["id"],
            message["log_directory"],
            message["log_path"],
            tty=message["tty"],
            stdin=message["stdin"],
            stdin_once=message["stdin_once"],
        )
        return {"ok": True, "fds": list(theirs)}, list(theirs.values())

    def _reopen(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        self._streams.reopen(self._streams.find(message["id"]))
        return {"ok": True}, []

    def _flush(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        self._streams.drain(self._streams.find(message["id"]))
        return {"ok": True}, []

    def _attach(self, message: Message, fds: list[int], connection: socket.socket) -> Answer:
        container = self._streams.find(message["id"])
        names = message["fds"]
        if len(names) != len(fds) or not set(names) <= {"stdin", "stdout", "stderr"}:
            raise Refusal("INVALID_ARGUMENT", f"attach: {len(fds)} descriptors for the streams {names}")
        session = dict(zip(names, fds, strict=True))
        fds.clear()
        client = self._streams.attach(container, connection, session)
        self._connections.discard(connection)
        try:
            protocol.send(connection, {"ok": True})
        except OSError:
            client.end("gone")
        client.start()
        if not container.running:
            client.finish("ended")
        return None

    def _resize(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        self._streams.resize(self._streams.find(message["id"]), message["columns"], message["rows"])
        return {"ok": True}, []

    def _close_stdin(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        self._streams.close_stdin(self._streams.find(message["id"]))
        return {"ok": True}, []

    def _close(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        self._streams.discard(self._streams.find(message["id"]))
        return {"ok": True}, []

    def _list(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        """The containers whose ids come after the given one, as many as fit."""
        found: list[Message] = []
        room = protocol.LIST_BYTES
        for container_id in sorted(self._streams.containers):
            if container_id > message["after"]:
                item = status(self._streams.containers[container_id])
                room -= len(item["id"]) + len(item["log"]) + 200
                if room < 0 and found:
                    return {"ok": True, "containers": found, "more": True}, []
                found.append(item)
        return {"ok": True, "containers": found, "more": False}, []

    def _stats(self, _message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        return {
            "ok": True,
            "protocol": protocol.VERSION,
            "build": self._worker.keep.build,
            "pid": os.getpid(),
            "holder_pid": self._worker.holder.pid,
            "resident_bytes": process.resident_bytes(),
            "descriptors": len(os.listdir("/proc/self/fd")) - 1,
            "containers": len(self._streams.containers),
            "running": self._streams.running,
            "clients": len(self._streams.clients),
            "dropped_bytes": self._streams.dropped_bytes,
        }, []

    def _hand_over(self, message: Message, _fds: list[int], connection: socket.socket) -> Answer:
        self._release(connection)
        with connection:
            self._worker.hand_over(connection, message)
        return None

    def _stop(self, message: Message, _fds: list[int], _connection: socket.socket) -> Answer:
        running = self._streams.running
        if running and not message["force"]:
            raise Refusal("FAILED_PRECONDITION", f"{running} containers use the stream keeper")
        for container in list(self._streams.containers.values()):
            self._streams.discard(container)
        self._worker.leave("it was told to")
        return {"ok": True}, []
