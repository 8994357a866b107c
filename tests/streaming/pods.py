"""TCP servers that stand for pods."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

Answer = Callable[[socket.socket], None]


class Pod:
    """A TCP server; each connection is given to a function in a thread of its own."""

    def __init__(self, answer: Answer) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._sock.getsockname()[1]
        self._answer = answer
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            self.connections.append(sock)
            threading.Thread(target=self._one, args=(sock,), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        try:
            self._answer(sock)
        except OSError:
            pass

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join()
        for sock in self.connections:
            sock.close()


def echo(sock: socket.socket) -> None:
    with sock:
        while data := sock.recv(65536):
            sock.sendall(data)


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


Pods = Callable[[Answer], Pod]
"""The fixture ``pods``: makes a pod that ends with the test."""
