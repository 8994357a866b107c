"""The two ends of a copy: a source is read when there is something to read, a sink is written when it takes data.

Between them stands one client connection. Two rules bound what is held in memory for it: sources rest while the
connection's outgoing data is not taken (:class:`Gate`), and the connection isn't read while a sink is too full
(:class:`Pressure`). Nothing else is dropped or delayed, so the slow party costs only its own session.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from typing import Protocol

from shim_streaming.loop import Loop

READ_BYTES = 128 * 1024
"""What one read takes at most. A pipe holds 64 KiB unless it was made larger."""

SINK_LIMIT_BYTES = 1024 * 1024
"""What waits for one sink before the client is no longer read."""

CONNECTION_LIMIT_BYTES = 8 * 1024 * 1024
"""What waits for all sinks of one connection before the client is no longer read."""

_MAX_SLICES = 64


class Gate(Protocol):
    """The way to the client, as sources see it."""

    @property
    def congested(self) -> bool:
        """True while sources should rest."""

    def park(self, source: Source) -> None:
        """Call the source's ``resume`` once there is room again."""


class Source:
    """A descriptor that is read, made non-blocking here.

    :param on_data: called with what was read.
    :param on_end: called once, at the end of the data, with the error that ended it, if it was one.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        gate: Gate,
        on_data: Callable[[bytes], None],
        on_end: Callable[[OSError | None], None],
    ) -> None:
        os.set_blocking(fd, False)
        self._loop = loop
        self._fd = fd
        self._gate = gate
        self._on_data = on_data
        self._on_end = on_end
        self._closed = False
        self.resting = False
        """True while the client doesn't take what this source has."""
        loop.on_readable(fd, self._readable)

    def resume(self) -> None:
        """There is room again."""
        self.resting = False
        if not self._closed:
            self._loop.on_readable(self._fd, self._readable)

    def close(self) -> None:
        """Read no more. The descriptor stays open; it is its owner's."""
        if not self._closed:
            self._closed = True
            if not self.resting:
                self._loop.on_readable(self._fd, None)

    @property
    def closed(self) -> bool:
        """True after the end, or :meth:`close`."""
        return self._closed

    def _readable(self) -> None:
        if self._gate.congested:
            self.resting = True
            self._loop.on_readable(self._fd, None)
            self._gate.park(self)
            return
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as err:
            self.close()
            # A terminal's master end reports so that its other end was closed.
            self._on_end(None if err.errno == errno.EIO else err)
            return
        if data:
            self._on_data(data)
        else:
            self.close()
            self._on_end(None)


class Pressure:
    """What all sinks of one connection hold, and whether that is too much.

    :param on_change: called with True when the client should no longer be read, with False when it may be again.
    """

    def __init__(self, on_change: Callable[[bool], None]) -> None:
        self._on_change = on_change
        self._total_bytes = 0
        self._full = 0
        self._high = False

    def held(self, before_bytes: int, after_bytes: int) -> None:
        """One sink holds a different amount now."""
        self._total_bytes += after_bytes - before_bytes
        self._full += (after_bytes > SINK_LIMIT_BYTES) - (before_bytes > SINK_LIMIT_BYTES)
        high = self._full > 0 or self._total_bytes > CONNECTION_LIMIT_BYTES
        if high != self._high:
            self._high = high
            self._on_change(high)


class Sink:
    """A descriptor that is written. Data may come before the descriptor: it waits.

    :param on_finished: called once, when everything before :meth:`end` is written, or nobody will read it any more.
    """

    def __init__(self, loop: Loop, pressure: Pressure, on_finished: Callable[[], None]) -> None:
        self._loop = loop
        self._pressure = pressure
        self._on_finished = on_finished
        self._fd: int | None = None
        self._waiting: deque[memoryview] = deque()
        self._borrowed = 0  # how many of the last slices lie in a buffer of the caller's
        self._bytes = 0
        self._reported_bytes = 0
        self._ending = False
        self._finished = False

    @property
    def finished(self) -> bool:
        """True once nothing more will be written: everything is, or nobody reads it."""
        return self._finished

    def open(self, fd: int) -> None:
        """Write to this descriptor, made non-blocking here. It stays its owner's."""
        os.set_blocking(fd, False)
        self._fd = fd
        self.flush()

    def write(self, data: memoryview) -> None:
        """Take data that lies in a buffer of the caller's, who calls :meth:`flush` before letting go of it."""
        if data and not self._ending and not self._finished:
            self._waiting.append(data)
            self._borrowed += 1
            self._bytes += len(data)

    def end(self) -> None:
        """No more data will come."""
        self._ending = True
        self.flush()

    def flush(self) -> None:
        """Write what can be written now, and keep a copy of the rest."""
        if self._finished:
            return
        fd = self._fd
        if fd is not None:
            try:
                self._write_out(fd)
            except BlockingIOError:
                pass
            except OSError:
                # Nobody reads it any more.
                self.close()
                self._on_finished()
                return
        self._own_rest()
        self._report()
        if fd is not None:
            self._loop.on_writable(fd, self.flush if self._waiting else None)
            if self._ending and not self._waiting:
                self._finished = True
                self._on_finished()

    def close(self) -> None:
        """Drop what waits, and take no more."""
        if self._fd is not None and not self._finished:
            self._loop.on_writable(self._fd, None)
        self._finished = True
        self._waiting.clear()
        self._borrowed = self._bytes = 0
        self._report()

    def _write_out(self, fd: int) -> None:
        waiting = self._waiting
        while waiting:
            batch = [waiting[i] for i in range(min(len(waiting), _MAX_SLICES))]
            written = os.writev(fd, batch) if len(batch) > 1 else os.write(fd, batch[0])
            self._bytes -= written
            while written:
                first = waiting[0]
                if written < len(first):
                    waiting[0] = first[written:]
                    break
                written -= len(first)
                waiting.popleft()

    def _own_rest(self) -> None:
        count = min(self._borrowed, len(self._waiting))
        self._borrowed = 0
        if count:
            borrowed = [self._waiting.pop() for _ in range(count)]
            self._waiting.append(memoryview(b"".join(reversed(borrowed))))

    def _report(self) -> None:
        if self._bytes != self._reported_bytes:
            self._pressure.held(self._reported_bytes, self._bytes)
            self._reported_bytes = self._bytes
