"""The client's connection, TLS or not: what goes out waits here, what comes in is handed on as it comes."""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Protocol

from shim_streaming.loop import Loop, Timer
from shim_streaming.pipes import Source

RECEIVE_BYTES = 256 * 1024
HIGH_WATER_BYTES = 256 * 1024
"""What waits for the client before sources rest."""

LOW_WATER_BYTES = 64 * 1024
"""What waits for the client when sources go on."""

REPLY_LIMIT_BYTES = 1024 * 1024
"""What waits for the client before it isn't read either: one that asks (pings) and takes no answers."""

_MAX_SLICES = 64
_TLS_SLICE_BYTES = 64 * 1024

Buffer = bytes | bytearray | memoryview


class Receiver(Protocol):
    """Who is told what the client does."""

    def received(self, data: bytes) -> None:
        """The client has sent this."""

    def hung_up(self) -> None:
        """The client has closed its side, while it wasn't read: what it sent before still comes when it is."""

    def lost(self) -> None:
        """The client is gone, and everything it sent has been received. Not called after ``finish``."""


class Transport:
    """A connected socket in a loop. It is a :class:`~shim_streaming.pipes.Gate` to the sources that feed it.

    :param sock: non-blocking; belongs to the transport from now on.
    :param linger_s: how long the client may take to close its side once the server has said all it had to say.
    """

    def __init__(self, loop: Loop, sock: socket.socket, receiver: Receiver, linger_s: float) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._receiver = receiver
        self._linger_s = linger_s
        self._out: deque[Buffer] = deque()
        self._out_bytes = 0
        self._flush_due = False
        self._parked: set[Source] = set()
        self._held = False
        self._reading = False
        self._finishing: Callable[[], None] | None = None
        self._said_all = False
        self._linger: Timer | None = None
        self._closed = False

    # -- incoming ------------------------------------------------------------------------------------------------------

    def start(self, early: bytes) -> None:
        """Begin to read. ``early`` came in before."""
        self._loop.on_hangup(self._fd, self._hung_up)
        if early:
            self._deliver(early)
        self._update_reading()

    def hold(self, held: bool) -> None:
        """Stop and go: what was received can't be passed on at present."""
        self._held = held
        self._update_reading()

    def _update_reading(self) -> None:
        if not self._closed:
            self._set_reading(self._said_all or not (self._held or self._out_bytes > REPLY_LIMIT_BYTES))

    def _set_reading(self, reading: bool) -> None:
        if reading == self._reading:
            return
        self._reading = reading
        self._loop.on_readable(self._fd, self._readable if reading else None)
        if reading and self._tls is not None and self._tls.pending():
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        if self._closed or not self._reading:
            return
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self._lost()
            return
        if not data:
            self._lost()
            return
        # TLS has decrypted more than was taken: epoll knows nothing of that.
        if self._tls is not None and self._tls.pending():
            self._loop.call_soon(self._readable)
        self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        if not self._closed and self._finishing is None:
            self._receiver.received(data)

    def _hung_up(self) -> None:
        # While it is read, the end comes in its turn, after the data before it.
        if not self._reading:
            self._loop.on_hangup(self._fd, None)
            self._receiver.hung_up()

    def _lost(self) -> None:
        if self._closed:
            return
        finishing = self._finishing
        self.close()
        if finishing is not None:
            finishing()
        else:
            self._receiver.lost()

    # -- outgoing ------------------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """True while so much waits for the client that sources should rest."""
        return self._out_bytes >= HIGH_WATER_BYTES

    @property
    def waiting_bytes(self) -> int:
        """What the client hasn't taken yet."""
        return self._out_bytes

    def park(self, source: Source) -> None:
        """Wake this source when the client has taken enough."""
        self._parked.add(source)

    def write(self, *buffers: Buffer) -> None:
        """Send, in this order, at the end of this round of the loop."""
        if self._closed or self._said_all:
            return
        for buffer in buffers:
            if buffer:  # of an empty one nothing could ever be sent
                self._out.append(buffer)
                self._out_bytes += len(buffer)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._closed:
            return
        try:
            if self._tls is not None:
                self._send_tls(self._tls)
            else:
                self._send_plain()
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError:
            self._lost()
            return
        self._loop.on_writable(self._fd, self._flush if self._out else None)
        self._update_reading()
        if self._parked and self._out_bytes <= LOW_WATER_BYTES:
            parked, self._parked = self._parked, set()
            for source in parked:
                source.resume()
        if self._finishing is not None and not self._out:
            self._say_no_more()

    def _send_plain(self) -> None:
        out = self._out
        while out:
            sent = self._sock.sendmsg([out[i] for i in range(min(len(out), _MAX_SLICES))])
            self._out_bytes -= sent
            while sent:
                first = out[0]
                if sent < len(first):
                    out[0] = memoryview(first)[sent:]
                    break
                sent -= len(first)
                out.popleft()

    def _send_tls(self, sock: ssl.SSLSocket) -> None:
        out = self._out
        while out:
            # A record each for an 8-byte header and its data would cost more than the copy.
            size, batch = 0, []
            while out and size < _TLS_SLICE_BYTES:
                batch.append(out.popleft())
                size += len(batch[-1])
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            # OpenSSL wants the same bytes again when it could not send them.
            out.appendleft(data)
            sent = sock.send(data)
            self._out_bytes -= sent
            if sent < len(data):
                out[0] = memoryview(data)[sent:]
            else:
                out.popleft()

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, on_finished: Callable[[], None]) -> None:
        """Send what waits, tell the client that this was all, and wait a little for it to close.

        Closing at once, with something of the client's unread, could take the last words back from it (TCP reset).

        :param on_finished: called once the connection is closed.
        """
        if self._closed:
            on_finished()
            return
        self._finishing = on_finished
        self._loop.call_soon(self._flush)

    def _say_no_more(self) -> None:
        if self._said_all:
            return
        self._said_all = True
        self._loop.on_writable(self._fd, None)
        self._linger = self._loop.call_later(self._linger_s, self._lost)
        try:
            if self._tls is not None:
                try:
                    self._tls.unwrap()
                except (ssl.SSLError, ValueError):
                    pass  # ours is sent; the client's own goodbye isn't waited for, nor what it sends instead
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._lost()
            return
        # After shutdown() the TLS socket is a plain one: whatever comes is thrown away.
        self._tls = None
        self._update_reading()

    def close(self) -> None:
        """Close now, whatever waits."""
        if self._closed:
            return
        self._closed = True
        if self._linger is not None:
            self._linger.cancel()
        self._loop.forget(self._fd)
        self._sock.close()
        self._out.clear()
        self._out_bytes = 0
        # What they read from now on goes nowhere, but whoever writes it isn't held up.
        parked, self._parked = self._parked, set()
        for source in parked:
            source.resume()
