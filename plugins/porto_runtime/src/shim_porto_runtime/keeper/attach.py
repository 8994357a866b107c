"""Attached clients: output fanned out to them, and their input fed to the container.

A client never holds up the container, its log or another client. What it hasn't taken yet waits in its own buffer of at
most :data:`BUFFER_BYTES`; a client whose buffer is full is disconnected (``slow``), since to skip some of the output
unnoticed would be worse, and to wait would stop the container.

Input moves by ``splice`` from the client's descriptor into the container's, so that no byte of it is in this process's
memory, and only as fast as the container reads.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from binascii import b2a_base64
from collections import deque

from shim_porto_runtime.keeper import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim_porto_runtime.keeper.container import Container
    from shim_porto_runtime.keeper.loop import Loop

BUFFER_BYTES = 1024 * 1024
MAX_CLIENTS = 16
"""Clients of one container at a time."""
_CHUNK_BYTES = 64 * 1024
_TERMINAL_BYTES = 4096


class Client:
    """An attached client.

    :param connection: open as long as the client stays; it hears why the session has ended on it.
    :param fds: the session's ends by name: ``stdin`` is read, ``stdout`` and ``stderr`` are written. They belong to the
        client from now on.
    :param on_end: called once.
    :raises OSError: a descriptor can't be used; all are closed.
    """

    def __init__(
        self,
        loop: Loop,
        container: Container,
        connection: socket.socket,
        fds: dict[str, int],
        *,
        on_end: Callable[[Client], None],
        on_stdin_end: Callable[[Container], None],
    ) -> None:
        self.container = container
        self.connection = connection
        self._loop = loop
        self._on_end: Callable[[Client], None] | None = on_end
        self._on_stdin_end = on_stdin_end
        self._ending: str | None = None
        self.input: Input | None = None
        self.sinks: dict[str, Sink] = {}
        left = dict(fds)
        try:
            for name in fds:
                if name == "stdin":
                    self.input = Input(loop, container, left.pop(name), self._input_ended)
                else:
                    self.sinks[name] = Sink(loop, left[name], self._after_write)
                    # A socket is used as it is, everything else opened anew.
                    if self.sinks[name].fd != left[name]:
                        os.close(left[name])
                    del left[name]
        except OSError:
            self._close()
            for fd in left.values():
                os.close(fd)
            raise

    def start(self) -> None:
        """Begin to feed the container's stdin."""
        if self.input is not None:
            self.input.start()

    def offer(self, name: str, data: bytes) -> None:
        """Output of the container."""
        sink = self.sinks.get(name)
        if sink is None:
            return
        sink.put(data)
        if sum(sink.waiting for sink in self.sinks.values()) > BUFFER_BYTES:
            self.end("slow")
        else:
            self._after_write()

    def finish(self, reason: str) -> None:
        """There will be no more output: end once the client has taken what there is."""
        self._ending = reason
        self._after_write()

    def end(self, reason: str) -> None:
        """End the session now, and say why."""
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        self._close()
        on_end(self)
        try:
            protocol.send(self.connection, {"end": reason})
        except OSError:
            pass  # it has left
        self._loop.forget(self.connection.fileno())
        self.connection.close()

    def pending(self) -> dict[str, bytes]:
        """Output not taken yet, by stream."""
        return {name: b"".join(sink.queue) for name, sink in self.sinks.items() if sink.queue}

    def entry(self) -> tuple[dict[str, Any], list[int]]:
        """What a successor needs to go on with the session, the connection's descriptor first."""
        fds = {name: sink.fd for name, sink in self.sinks.items()}
        if self.input is not None and self.input.fd is not None:
            fds["stdin"] = self.input.fd
        description = {"id": self.container.id, "fds": list(fds), "ending": self._ending}
        if self.input is not None:
            description["input"] = b2a_base64(self.input.rest, newline=False).decode()
        return description, [self.connection.fileno(), *fds.values()]

    def resume(self, pending: dict[str, bytes], rest: bytes, ending: str | None) -> None:
        """Go on where the keeper that handed this session over has stopped."""
        if self.input is not None:
            self.input.rest = rest
        for name, data in pending.items():
            if name in self.sinks:
                self.sinks[name].put(data)
        self._ending = ending
        self._after_write()

    def _after_write(self) -> None:
        for name in [name for name, sink in self.sinks.items() if sink.broken]:
            self.sinks.pop(name).close()
            if not self.sinks and self.input is None:
                self.end("gone")
                return
        if self._ending is not None and not any(sink.waiting for sink in self.sinks.values()):
            self.end(self._ending)

    def _input_ended(self) -> None:
        self.input = None
        self._on_stdin_end(self.container)
        if not self.sinks:
            self.end("gone")

    def _close(self) -> None:
        if self.input is not None:
            self.input.close()
            self.input = None
        while self.sinks:
            self.sinks.popitem()[1].close()


class Sink:
    """Where a client's output goes: a pipe, a socket, a terminal or a file.

    :param on_progress: called when something that waited has been written, or the other side has gone.
    """

    def __init__(self, loop: Loop, fd: int, on_progress: Callable[[], None]) -> None:
        self._loop = loop
        self._on_progress = on_progress
        self._socket: socket.socket | None = None
        self.queue: deque[bytes | memoryview] = deque()
        self.waiting = 0
        """Bytes in the queue."""
        self.broken = False
        self._watched = True
        # Not to wait is a property of our own, and not of the description that the client shares.
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._socket = socket.socket(fileno=fd)
            self.fd = fd
        else:
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            loop.watch(self.fd, 0, self._ready)  # errors and hang-ups are told without being asked for
        except PermissionError:
            self._watched = False  # a regular file: never waits, never goes away

    def put(self, data: bytes) -> None:
        """Write, or keep for later."""
        if self.broken:
            return
        rest: bytes | memoryview = data
        if not self.queue:
            size = self._write(data)
            if size == len(data) or self.broken:
                return
            if not self._watched:
                self._break()  # its disk is full
                return
            rest = memoryview(data)[size:] if size else data
            self._loop.change(self.fd, select.EPOLLOUT)
        self.queue.append(rest)
        self.waiting += len(rest)

    def close(self) -> None:
        self._loop.forget(self.fd)
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self.fd)

    def _ready(self, events: int) -> None:
        while self.queue and not self.broken:
            first = self.queue[0]
            size = self._write(first)
            self.waiting -= size
            if size < len(first):
                self.queue[0] = memoryview(first)[size:]
                break
            self.queue.popleft()
        if not self.queue and not self.broken:
            if events & (select.EPOLLERR | select.EPOLLHUP):
                self._break()
            else:
                self._loop.change(self.fd, 0)
        self._on_progress()

    def _write(self, data: bytes | memoryview) -> int:
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._break()
            return 0

    def _break(self) -> None:
        self.broken = True
        self.queue.clear()
        self.waiting = 0
        self._loop.forget(self.fd)


class Input:
    """A client's input on its way to the container's stdin.

    :param on_end: called when the client has no more, or the container takes no more.
    """

    def __init__(self, loop: Loop, container: Container, fd: int, on_end: Callable[[], None]) -> None:
        self.fd: int | None = fd
        self._loop = loop
        self._container = container
        self._on_end = on_end
        self._watched = False
        self._buffered = False
        """splice can't do it (a socket and a terminal): go through :attr:`rest`."""
        self.rest = b""
        """Taken from the client and not yet by the container; empty unless buffered."""

    def start(self) -> None:
        """Begin to forward."""
        if self.rest:
            self._buffered = True
            self._wait_for_container()
        else:
            self._wait_for_client()

    def close(self) -> None:
        """Forward no more; what the client has sent and we haven't taken stays where it is."""
        if self.fd is None:
            return
        if self in self._container.inputs:
            self._container.inputs.remove(self)
        if self._watched:
            self._loop.forget(self.fd)
        os.close(self.fd)
        self.fd = None

    def move(self, _events: int = 0) -> None:
        """Forward what there is, as far as the container takes it."""
        target = self._container.stdin
        if self.fd is None:
            return
        if target is None:
            self._end()
            return
        try:
            if self._buffered:
                size = self._copy(self.fd, target)
            else:
                size = os.splice(self.fd, target, _CHUNK_BYTES, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            self._wait(target)
            return
        except OSError as err:
            if err.errno == errno.EINVAL and not self._buffered:
                self._buffered = True
                self._wait_for_client()
            else:
                self._end()  # EPIPE: the container has closed its stdin; or the client's connection is broken
            return
        if size == 0:
            self._end()
        else:
            self._wait_for_client()  # one piece a round: others get their turn

    def _copy(self, source: int, target: int) -> int:
        if not self.rest:
            if not _ready(source, select.POLLIN):
                raise BlockingIOError(errno.EAGAIN, "nothing to read")
            self.rest = os.read(source, _TERMINAL_BYTES)
            if not self.rest:
                return 0
        size = os.write(target, self.rest)
        self.rest = self.rest[size:]
        if self.rest:
            raise BlockingIOError(errno.EAGAIN, "not all was taken")
        return size

    def _wait(self, target: int) -> None:
        """After EAGAIN: find out who has to be waited for."""
        assert self.fd is not None
        if not _ready(target, select.POLLOUT):
            self._wait_for_container()
        elif self.rest or (not self._buffered and _ready(self.fd, select.POLLIN)):
            # Both are ready, and still it didn't go: not a pair for splice.
            self._buffered = True
            self._wait_for_container()
        else:
            self._wait_for_client()

    def _wait_for_client(self) -> None:
        assert self.fd is not None
        if self._watched:
            return
        try:
            self._loop.watch(self.fd, select.EPOLLIN, self.move)
            self._watched = True
        except PermissionError:
            self._wait_for_container()  # a regular file: always ready

    def _wait_for_container(self) -> None:
        assert self.fd is not None
        if self._watched:
            self._loop.forget(self.fd)
            self._watched = False
        if self not in self._container.inputs:
            self._container.inputs.append(self)
            if len(self._container.inputs) == 1:
                self._container.watch_stdin(self._loop)

    def _end(self) -> None:
        self.close()
        self._on_end()


def _ready(fd: int, events: int) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))
