"""A WebSocket client, and kubectl exec and attach on it."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Mapping

import wsproto.events as ws
from wsproto import connection
from wsproto.utilities import LocalProtocolError

from tests.streaming.wire import (
    TIMEOUT_S,
    Closed,
    Connection,
    exit_code,
    upgrade,
)


class WebSocket:
    """The client's end of a WebSocket; ``recv`` returns whole messages."""

    def __init__(
        self, url: str, *protocols: str, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        asked = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            **(headers or {}),
        }
        if protocols:
            asked["Sec-WebSocket-Protocol"] = ", ".join(protocols)
        self.sock, self.answer, early = upgrade(url, asked, "GET", tls)
        self.protocol = self.answer.headers.get("sec-websocket-protocol", "")
        self._connection = connection.Connection(connection.ConnectionType.CLIENT, trailing_data=early)
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._message: list[bytes] = []
        self.close_code: int | None = None
        self.pongs = 0
        self.reading = threading.Event()
        self.reading.set()

    def send(self, data: bytes | str, *, last: bool = True) -> None:
        event: ws.Event
        if isinstance(data, str):
            event = ws.TextMessage(data=data, message_finished=last)
        else:
            event = ws.BytesMessage(data=data, message_finished=last)
        self.send_event(event)

    def send_event(self, event: ws.Event) -> None:
        with self._write_lock:
            # Not held while sending: that may have to wait until something was read.
            with self._lock:
                try:
                    data = self._connection.send(event)
                except LocalProtocolError:
                    raise BrokenPipeError("the server has closed the WebSocket") from None
            self.sock.sendall(data)

    def recv(self) -> bytes | None:
        """The next message; None when the server has closed the WebSocket."""
        while True:
            for event in self._connection.events():
                if isinstance(event, ws.TextMessage | ws.BytesMessage):
                    data = event.data
                    self._message.append(data.encode() if isinstance(data, str) else bytes(data))
                    if event.message_finished:
                        message, self._message = b"".join(self._message), []
                        return message
                elif isinstance(event, ws.Pong):
                    self.pongs += 1
                elif isinstance(event, ws.CloseConnection):
                    self.close_code = int(event.code)
                    return None
            self.reading.wait()
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError("closed without a close frame")
            with self._lock:
                self._connection.receive_data(data)

    def shutdown(self) -> None:
        """Break the connection off; whoever reads it notices."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.reading.set()

    def close(self) -> None:
        self.shutdown()
        self.sock.close()


class WebSocketChannels:
    """Numbered channels over a WebSocket, read by a thread."""

    def __init__(self, socket_: WebSocket) -> None:
        self.socket = socket_
        self.base64 = "base64" in socket_.protocol
        self.channels: dict[int, bytearray] = {}
        self.messages: list[tuple[int, bytes]] = []
        self.changed = threading.Condition()
        self.closed = False
        self.problem: BaseException | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, channel: int, data: bytes) -> None:
        if self.base64:
            self.socket.send(chr(48 + channel) + base64.b64encode(data).decode())
        else:
            self.socket.send(bytes((channel,)) + data)

    def _read(self) -> None:
        try:
            while (message := self.socket.recv()) is not None:
                channel, data = message[0], message[1:]
                if self.base64:
                    channel, data = channel - 48, base64.b64decode(data, validate=True)
                with self.changed:
                    self.messages.append((channel, data))
                    self.channels.setdefault(channel, bytearray()).extend(data)
                    self.changed.notify_all()
        except (OSError, EOFError) as err:
            self.problem = err
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
        with self.changed:
            self.changed.wait_for(lambda: condition() or self.closed, timeout_s)
            if not condition():
                raise Closed(f"{'closed' if self.closed else 'timeout'} while waiting for {what}: {self.problem}")

    def close(self) -> None:
        self.socket.shutdown()
        self._reader.join(TIMEOUT_S)
        self.socket.close()


class WebSocketCommand:
    """kubectl exec or attach over WebSocket."""

    def __init__(self, url: str, *protocols: str, tls: ssl.SSLContext | None = None) -> None:
        self.socket = WebSocket(url, *protocols, tls=tls)
        self.protocol = self.socket.protocol
        self.channels = WebSocketChannels(self.socket)

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), 32768):
            self.channels.send(0, data[start : start + 32768])

    def close_stdin(self) -> None:
        self.socket.send(b"\xff\x00")

    def resize(self, columns: int, rows: int) -> None:
        self.channels.send(4, json.dumps({"Width": columns, "Height": rows}).encode())

    def wait_output(self, text: bytes) -> None:
        self.channels.wait(lambda: text in self.out, f"{text!r} on stdout")

    @property
    def out(self) -> bytes:
        return bytes(self.channels.channels.get(1, b""))

    @property
    def err(self) -> bytes:
        return bytes(self.channels.channels.get(2, b""))

    def finish(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """Wait until the server closes; what the error channel holds."""
        with self.channels.changed:
            assert self.channels.changed.wait_for(lambda: self.channels.closed, timeout_s), "not closed"
        assert self.socket.close_code == 1000, (self.socket.close_code, self.channels.problem)
        self.channels.close()
        return bytes(self.channels.channels.get(3, b""))

    def exit_code(self, timeout_s: float = TIMEOUT_S) -> int:
        return exit_code(self.finish(timeout_s))

    def stall(self) -> None:
        """Take nothing more, until ``resume``."""
        self.socket.reading.clear()

    def resume(self) -> None:
        self.socket.reading.set()

    @property
    def sock(self) -> Connection:
        """The connection itself."""
        return self.socket.sock

    def close(self) -> None:
        self.channels.close()
