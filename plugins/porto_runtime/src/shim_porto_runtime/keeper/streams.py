"""All containers and their streams: what the requests do, and what happens when output comes or ends."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios

from shim_porto_runtime.keeper.attach import MAX_CLIENTS, Client
from shim_porto_runtime.keeper.container import PIPE_BYTES, Container, make_streams
from shim_porto_runtime.keeper.journal import CHUNK_BYTES, Journal, Staging
from shim_porto_runtime.keeper.logfile import open_log
from shim_porto_runtime.keeper.loop import COLD, HOT, URGENT, Loop
from shim_porto_runtime.keeper.protocol import Refusal, close_all
from shim_porto_runtime.keeper.pump import Output, Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim_porto_runtime.keeper.holder import Entries, HolderLink, Keep

_BUSY_BYTES = PIPE_BYTES // 4
"""A round that brings this much of a stream moves it up a tier."""
_CALM_BYTES = PIPE_BYTES // 64
_CALM_ROUNDS = 20
"""So many rounds with less than that move it down."""
_TERMINAL_BYTES = 128 * 1024
"""More than a terminal can hold."""
_MAX_ID_LENGTH = 256


class Streams:
    """All containers.

    :param entries: those there are already, as the holder has them. What a killed worker left unfinished is brought to
        its end at once.
    """

    def __init__(self, loop: Loop, keep: Keep, entries: Entries, holder: HolderLink) -> None:
        self.containers = {container_id: Container.from_entry(*entry) for container_id, entry in entries.items()}
        self.clients: set[Client] = set()
        self._loop = loop
        self._holder = holder
        self._journal = Journal(keep.state)
        self._staging = Staging(keep.staging, keep.transit)
        self._pump = Pump(self._journal, self._staging)
        self._recover()
        for container in self.containers.values():
            self._watch(container)

    @property
    def running(self) -> int:
        """How many containers have output that somebody may still write to."""
        return sum(container.running for container in self.containers.values())

    @property
    def dropped_bytes(self) -> int:
        return sum(output.dropped for container in self.containers.values() for output in container.outputs)

    def entries(self) -> Entries:
        """What a holder needs."""
        return {container.id: container.entry() for container in self.containers.values()}

    def cell(self, output: Output) -> tuple[int, int, bytes]:
        """What a stream's cell holds, for a successor."""
        return self._journal.cell(output.cell)

    def find(self, container_id: str) -> Container:
        """:raises Refusal: NOT_FOUND."""
        container = self.containers.get(container_id)
        if container is None:
            raise Refusal("NOT_FOUND", f"container {container_id}: the stream keeper has no streams of it")
        return container

    def _recover(self) -> None:
        batch = self._journal.under_way()
        by_cell = {output.cell: (c, output) for c in self.containers.values() for output in c.outputs}
        for _, output in by_cell.values():
            self._pump.adopt(output)
        if batch is not None:
            found = by_cell.get(batch.cell)
            if found is not None:
                self._pump.recover(batch, found[1], found[0].log)
            else:
                self._staging.left_behind(batch.start)  # its container is gone
        self._journal.adopt(set(by_cell))

    # -- what clients ask for ------------------------------------------------------------------------------------------

    def open(
        self, container_id: str, directory: str, path: str, *, tty: bool, stdin: bool, stdin_once: bool
    ) -> dict[str, int]:
        """Make a container's streams; its ends by name, which belong to the caller.

        :raises Refusal: the id or the log is no good, or there are no descriptors.
        """
        if not isinstance(container_id, str) or not 0 < len(container_id) <= _MAX_ID_LENGTH:
            raise Refusal("INVALID_ARGUMENT", f"container id {container_id!r}: give 1 to {_MAX_ID_LENGTH} characters")
        log = open_log(directory, path) if path else None
        try:
            if container_id in self.containers:
                self.discard(self.containers[container_id])
            container, theirs = make_streams(
                container_id, directory, path, log, self._journal, tty=tty, stdin=stdin, stdin_once=stdin_once
            )
        except OSError as err:
            if log is not None:
                log.close()
            raise Refusal("RESOURCE_EXHAUSTED", f"container {container_id}: no streams: {err.strerror}") from err
        self.containers[container_id] = container
        self._holder.hold(container)
        self._watch(container)
        return theirs

    def reopen(self, container: Container) -> None:
        """Open the container's log anew. :raises Refusal: it can't be; the log goes on as it was."""
        if container.log is None:
            why = "its streams have ended" if container.log_path else "it has no log"
            raise Refusal("FAILED_PRECONDITION", f"container {container.id}: {why}: no log to reopen")
        old, container.log = container.log, open_log(container.log_directory, container.log_path)
        self._holder.hold(container)
        old.close()

    def drain(self, container: Container) -> None:
        """Bring everything that has been written so far to the log, an unfinished line too."""
        for output in container.outputs:
            if output.fd is not None:
                # Not what is written from now on: a process that writes faster than we read would never let us go.
                waiting = _waiting_bytes(output.fd)
                while waiting > 0 and output.fd is not None:
                    size = self._move(container, output)
                    waiting -= size or waiting
            self._pump.finish_line(output, container.log)

    def close_stdin(self, container: Container) -> None:
        """Let the container read end-of-file."""
        if container.close_stdin(self._loop):
            self._holder.hold(container)

    def resize(self, container: Container, columns: int, rows: int) -> None:
        """Set the size of the container's terminal. :raises Refusal: it has none, or the size is none."""
        if not container.tty:
            raise Refusal("FAILED_PRECONDITION", f"container {container.id}: has no terminal to resize")
        if not (0 < columns < 65536 and 0 < rows < 65536):
            raise Refusal("INVALID_ARGUMENT", f"a terminal of {columns} columns and {rows} rows: give 1 to 65535")
        terminal = container.outputs[0].fd
        if terminal is None:
            raise Refusal("FAILED_PRECONDITION", f"container {container.id}: its terminal is closed")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def discard(self, container: Container) -> None:
        """Forget a container, after everything it has written is in its log."""
        self.drain(container)
        del self.containers[container.id]
        for output in container.outputs:
            self._close_output(output)
        self._streams_ended(container)
        self._holder.drop(container.id)
        for output in container.outputs:
            self._journal.release(output.cell)

    def attach(self, container: Container, connection: socket.socket, session: dict[str, int]) -> Client:
        """Attach a client, which has the connection and the descriptors from now on; it has still to be started.

        :raises Refusal: there are too many, or its descriptors can't be used; they are closed, the connection isn't.
        """
        if len(container.clients) >= MAX_CLIENTS:
            close_all(session.values())
            raise Refusal("RESOURCE_EXHAUSTED", f"container {container.id}: {MAX_CLIENTS} clients are attached already")
        try:
            client = Client(
                self._loop,
                container,
                connection,
                session,
                on_end=self._client_ended,
                on_stdin_end=self._client_stdin_ended,
            )
        except OSError as err:
            raise Refusal("RESOURCE_EXHAUSTED", f"container {container.id}: can't attach: {err.strerror}") from err
        self._loop.watch(connection.fileno(), select.EPOLLIN, lambda _events: client.end("gone"))
        self.clients.add(client)
        container.clients.append(client)
        for output in container.outputs:
            self._place(output, URGENT)
        return client

    # -- output --------------------------------------------------------------------------------------------------------

    def _watch(self, container: Container) -> None:
        for output in container.outputs:
            if output.fd is not None:
                output.tier = URGENT if container.tty else COLD
                self._loop.watch(output.fd, select.EPOLLIN, self._server(container, output), output.tier)

    def _server(self, container: Container, output: Output) -> Callable[[int], None]:
        return lambda _events: self._serve(container, output)

    def _serve(self, container: Container, output: Output) -> None:
        """A stream has output: move some of it, and see how often it has to be looked at."""
        taken = 0
        while taken < PIPE_BYTES and output.fd is not None:
            size = self._move(container, output)
            taken += size
            if size < CHUNK_BYTES:
                break  # likely all there is: save the call that would say so
        if output.fd is None or output.tier == URGENT:
            return
        if taken >= _BUSY_BYTES:
            output.calm_rounds = 0
            if output.tier == COLD:
                self._place(output, HOT)
            elif taken >= PIPE_BYTES // 2:
                self._loop.hurry(HOT)
        elif output.tier == HOT and taken < _CALM_BYTES:
            output.calm_rounds += 1
            if output.calm_rounds >= _CALM_ROUNDS:
                self._place(output, COLD)

    def _place(self, output: Output, tier: int) -> None:
        output.tier = tier
        output.calm_rounds = 0
        if output.fd is not None:
            self._loop.move(output.fd, tier)

    def _move(self, container: Container, output: Output) -> int:
        """Move one batch to the log and to the attached clients; its size."""
        try:
            data = self._pump.take(output, container.log)
        except BlockingIOError:
            return 0
        if data:
            for client in list(container.clients):
                client.offer(output.name, data)
        else:
            self._output_ended(container, output)
        return len(data)

    def _output_ended(self, container: Container, output: Output) -> None:
        self._pump.finish_line(output, container.log)
        self._close_output(output)
        if not container.running:
            self._streams_ended(container)
        self._holder.hold(container)

    def _close_output(self, output: Output) -> None:
        if output.fd is not None:
            self._loop.forget(output.fd)
            os.close(output.fd)
            output.fd = None

    def _streams_ended(self, container: Container) -> None:
        if container.log is not None:
            container.log.close()
            container.log = None
        container.close_stdin(self._loop)
        for client in list(container.clients):
            client.finish("ended")

    # -- clients -------------------------------------------------------------------------------------------------------

    def _client_ended(self, client: Client) -> None:
        self.clients.discard(client)
        container = client.container
        container.clients.remove(client)
        if not container.clients and not container.tty:
            for output in container.outputs:
                self._place(output, COLD)

    def _client_stdin_ended(self, container: Container) -> None:
        # A terminal's input has no end: to close it would be to hang up on the container.
        if container.stdin_once and not container.tty:
            self.close_stdin(container)


def _waiting_bytes(fd: int) -> int:
    """What a pipe holds; of a terminal, as much as it can hold."""
    if os.isatty(fd):
        return _TERMINAL_BYTES
    size: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    return size


def status(container: Container) -> dict[str, Any]:
    """What ``list`` answers of a container."""
    return {
        "id": container.id,
        "log": f"{container.log_directory}/{container.log_path}" if container.log_path else "",
        "tty": container.tty,
        "running": container.running,
        "stdin": container.stdin is not None,
        "clients": len(container.clients),
        "dropped_bytes": sum(output.dropped for output in container.outputs),
    }
