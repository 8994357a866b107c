"""A SPDY/3.1 client, and kubectl exec and attach on it."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shim_streaming.spdy import DICTIONARY  # a constant of the specification; test_spdy holds it to its checksum

from tests.streaming.wire import (
    TIMEOUT_S,
    Closed,
    exit_code,
    upgrade,
)


@dataclass
class Stream:
    """One SPDY stream, or WebSocket channel."""

    number: int
    data: bytearray = field(default_factory=bytearray)
    replied: bool = False
    ended: bool = False
    reset: int | None = None


class SpdyClient:
    """The client's end of SPDY/3.1. A thread reads; waiting happens on its condition.

    :param transport: a connected socket, or something with its ``sendall``, ``recv`` and ``close``.
    """

    def __init__(self, transport: Any, early: bytes = b"") -> None:
        self._sock = transport
        self._deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, 0, DICTIONARY)
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._early = early
        self._next_id = 1
        self._write_lock = threading.Lock()
        self.changed = threading.Condition()
        self.streams: dict[int, Stream] = {}
        self.pings: list[int] = []
        self.goaway: int | None = None
        self.window_updates = 0
        self.closed = False
        self.problem: BaseException | None = None
        self.reading = threading.Event()
        self.reading.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    # -- frames out

    def open(self, **headers: str) -> Stream:
        """Open a stream, and wait for the reply."""
        with self._write_lock:
            stream = Stream(self._next_id)
            self._next_id += 2
            self.streams[stream.number] = stream
            payload = struct.pack("!IIH", stream.number, 0, 0) + self._block(headers)
            self._control(1, payload, 0)
        self.wait(lambda: stream.replied or stream.reset is not None, "a reply to a new stream")
        return stream

    def send(self, stream: Stream, data: bytes, *, fin: bool = False) -> None:
        with self._write_lock:
            self._sock.sendall(struct.pack("!II", stream.number, (1 if fin else 0) << 24 | len(data)) + data)

    def end(self, stream: Stream) -> None:
        self.send(stream, b"", fin=True)

    def reset(self, stream: Stream, status: int = 5) -> None:
        with self._write_lock:
            self._control(3, struct.pack("!II", stream.number, status))

    def ping(self, number: int) -> None:
        with self._write_lock:
            self._control(6, struct.pack("!I", number))

    def go_away(self) -> None:
        with self._write_lock:
            self._control(7, struct.pack("!II", 0, 0))

    def raw(self, data: bytes) -> None:
        with self._write_lock:
            self._sock.sendall(data)

    def close(self) -> None:
        # shutdown wakes the reader; close alone would not.
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.reading.set()
        self._reader.join(TIMEOUT_S)
        self._sock.close()

    def _block(self, headers: Mapping[str, str]) -> bytes:
        plain = struct.pack("!I", len(headers))
        for name, value in headers.items():
            for text in (name.lower().encode(), value.encode()):
                plain += struct.pack("!I", len(text)) + text
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def _control(self, kind: int, payload: bytes, flags: int = 0) -> None:
        self._sock.sendall(struct.pack("!HHI", 0x8003, kind, flags << 24 | len(payload)) + payload)

    # -- frames in

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until a condition holds; it is looked at whenever something came in."""
        with self.changed:
            self.changed.wait_for(lambda: condition() or self.closed, timeout_s)
            if not condition():
                state = f"closed ({self.problem})" if self.closed else "timeout"
                raise Closed(f"{state} while waiting for {what}")

    def wait_closed(self, timeout_s: float = TIMEOUT_S) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.closed, timeout_s), "the server has not closed"

    def _read(self) -> None:
        try:
            while True:
                self._frame()
        except (OSError, EOFError) as err:
            self.problem = err
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def _exactly(self, count: int) -> bytes:
        data = self._early[:count]
        self._early = self._early[count:]
        parts, have = [data], len(data)
        while have < count:
            self.reading.wait()
            more = self._sock.recv(min(count - have, 1 << 18))
            if not more:
                raise EOFError("end of the connection")
            parts.append(more)
            have += len(more)
        return b"".join(parts)

    def _frame(self) -> None:
        first, flags_length = struct.unpack("!II", self._exactly(8))
        payload = self._exactly(flags_length & 0xFFFFFF)
        fin = bool(flags_length >> 24 & 1)
        with self.changed:
            if first >> 31:
                self._control_frame(first & 0xFFFF, payload)
            else:
                stream = self.streams[first]
                # As in moby/spdystream: data before the reply is lost.
                assert stream.replied, "data before the reply"
                stream.data += payload
                stream.ended = stream.ended or fin
            self.changed.notify_all()

    def _control_frame(self, kind: int, payload: bytes) -> None:
        if kind == 2:
            block = self._inflate.decompress(payload[4:])
            assert block == bytes(4), "a reply with headers, or one cut short"
            self.streams[int.from_bytes(payload[:4], "big")].replied = True
        elif kind == 3:
            number, status = struct.unpack("!II", payload)
            self.streams[number].reset = status
        elif kind == 6:
            self.pings.append(int.from_bytes(payload, "big"))
        elif kind == 7:
            self.goaway = int.from_bytes(payload[4:], "big")
        elif kind == 9:
            self.window_updates += 1
        else:
            raise EOFError(f"unexpected frame {kind}")


class SpdyCommand:
    """kubectl exec or attach over SPDY: the streams in the order in which client-go opens them."""

    def __init__(
        self,
        url: str,
        *protocols: str,
        stdin: bool = False,
        stdout: bool = True,
        stderr: bool = True,
        tty: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        offered = protocols or ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
        headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "Content-Length": "0"}
        headers["X-Stream-Protocol-Version"] = ", ".join(offered)
        sock, self.answer, early = upgrade(url, headers, tls=tls)
        self.protocol = self.answer.headers["x-stream-protocol-version"]
        self.spdy = SpdyClient(sock, early)
        self.error = self.spdy.open(streamType="error")
        self.stdin = self.spdy.open(streamType="stdin") if stdin else None
        self.stdout = self.spdy.open(streamType="stdout") if stdout else None
        self.stderr = self.spdy.open(streamType="stderr") if stderr and not tty else None
        resizes = tty and self.protocol[:2] in ("v3", "v4")
        self.resizes = self.spdy.open(streamType="resize") if resizes else None

    def write(self, data: bytes) -> None:
        assert self.stdin
        for start in range(0, len(data), 32768):
            self.spdy.send(self.stdin, data[start : start + 32768])

    def close_stdin(self) -> None:
        assert self.stdin
        self.spdy.end(self.stdin)

    def resize(self, columns: int, rows: int) -> None:
        assert self.resizes
        self.spdy.send(self.resizes, json.dumps({"Width": columns, "Height": rows}).encode() + b"\n")

    def wait_output(self, text: bytes) -> None:
        assert self.stdout
        self.spdy.wait(lambda: text in self.out, f"{text!r} on stdout")

    @property
    def out(self) -> bytes:
        return bytes(self.stdout.data) if self.stdout else b""

    @property
    def err(self) -> bytes:
        return bytes(self.stderr.data) if self.stderr else b""

    def finish(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """Wait for the end of output and of the error stream, as client-go does; what the error stream holds."""
        streams = [stream for stream in (self.stdout, self.stderr, self.error) if stream]
        self.spdy.wait(lambda: all(stream.ended for stream in streams), "the end", timeout_s)
        self.spdy.close()
        return bytes(self.error.data)

    def exit_code(self, timeout_s: float = TIMEOUT_S) -> int:
        return exit_code(self.finish(timeout_s))

    def stall(self) -> None:
        """Take nothing more, until ``resume``."""
        self.spdy.reading.clear()

    def resume(self) -> None:
        self.spdy.reading.set()

    @property
    def sock(self) -> socket.socket:
        """The connection itself."""
        sock: socket.socket = self.spdy._sock
        return sock

    def close(self) -> None:
        self.spdy.close()
