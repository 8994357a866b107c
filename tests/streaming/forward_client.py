"""kubectl port-forward: pairs of SPDY streams, on a connection or in a tunnel."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from tests.streaming.spdy_client import SpdyClient, Stream
from tests.streaming.websocket_client import WebSocket
from tests.streaming.wire import (
    TIMEOUT_S,
    upgrade,
)


class _Tunnel:
    """SPDY's bytes in binary WebSocket messages, as client-go's tunnelling connection has them."""

    def __init__(self, socket_: WebSocket) -> None:
        self._socket = socket_
        self._left = b""

    def sendall(self, data: bytes) -> None:
        self._socket.send(data)

    def recv(self, count: int) -> bytes:
        while not self._left:
            message = self._socket.recv()
            if message is None:
                return b""
            self._left = message
        data, self._left = self._left[:count], self._left[count:]
        return data

    def shutdown(self, how: int) -> None:
        self._socket.sock.shutdown(how)

    def close(self) -> None:
        self._socket.close()


class Forwarder:
    """kubectl port-forward: a pair of streams for each connection."""

    def __init__(self, url: str, *, tunnel: bool = False, tls: ssl.SSLContext | None = None) -> None:
        self._request_id = 0
        if tunnel:
            self.websocket: WebSocket | None = WebSocket(url, "SPDY/3.1+portforward.k8s.io", tls=tls)
            self.protocol = self.websocket.protocol
            self.spdy = SpdyClient(_Tunnel(self.websocket))
        else:
            self.websocket = None
            headers = {
                "Connection": "Upgrade",
                "Upgrade": "SPDY/3.1",
                "X-Stream-Protocol-Version": "portforward.k8s.io",
            }
            sock, answer, early = upgrade(url, headers, tls=tls)
            self.protocol = answer.headers["x-stream-protocol-version"]
            self.spdy = SpdyClient(sock, early)

    def connect(self, port: int | str, *, request_id: bool = True) -> Forwarded:
        headers = {"port": str(port)}
        if request_id:
            headers["requestID"] = str(self._request_id)
            self._request_id += 1
        error = self.spdy.open(streamType="error", **headers)
        self.spdy.end(error)
        data = self.spdy.open(streamType="data", **headers)
        return Forwarded(self, data, error)

    def close(self) -> None:
        self.spdy.close()


@dataclass
class Forwarded:
    """One forwarded connection."""

    forwarder: Forwarder
    data: Stream
    error: Stream

    def send(self, data: bytes) -> None:
        for start in range(0, len(data), 32768):
            self.forwarder.spdy.send(self.data, data[start : start + 32768])

    def end(self) -> None:
        self.forwarder.spdy.end(self.data)

    def reset(self) -> None:
        self.forwarder.spdy.reset(self.data)

    def wait_data(self, count: int, timeout_s: float = TIMEOUT_S) -> bytes:
        self.forwarder.spdy.wait(lambda: len(self.data.data) >= count, f"{count} bytes", timeout_s)
        return bytes(self.data.data)

    def wait_end(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """All data, once the pod has closed its side."""
        self.forwarder.spdy.wait(lambda: self.data.ended or self.data.reset is not None, "the end", timeout_s)
        return bytes(self.data.data)

    def wait_error(self, timeout_s: float = TIMEOUT_S) -> bytes:
        """What the error stream holds when it ends."""
        self.forwarder.spdy.wait(lambda: self.error.ended, "the end of the error stream", timeout_s)
        return bytes(self.error.data)
