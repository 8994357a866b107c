"""A Porto made of scripted answers, on a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from porto_api import framing, rpc_pb2

Answer = Callable[[rpc_pb2.TContainerRequest, socket.socket], rpc_pb2.TContainerResponse | None]


class ScriptedPorto:
    """Answers each request with what ``answer`` returns; None answers nothing. Remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.requests: list[rpc_pb2.TContainerRequest] = []
        self.connections = 0
        self.answer: Answer = lambda request, peer: ok()
        self._peers: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.start()

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        Path(self.path).unlink(missing_ok=True)
        self._listener.bind(self.path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Close the listener and every connection, as a portod that goes away does."""
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers:
            hang_up(peer)
        self._peers.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self._peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        decoder = framing.Decoder()
        with peer:
            while True:
                try:
                    data = peer.recv(65536)
                except OSError:
                    return
                if not data:
                    return
                for payload in decoder.feed(data):
                    request = rpc_pb2.TContainerRequest.FromString(payload)
                    self.requests.append(request)
                    response = self.answer(request, peer)
                    if response is not None:
                        try:
                            peer.sendall(framing.encode(response))
                        except BrokenPipeError:
                            return  # the client didn't wait


def ok() -> rpc_pb2.TContainerResponse:
    return rpc_pb2.TContainerResponse(error=rpc_pb2.Success)


def hang_up(peer: socket.socket) -> None:
    try:
        peer.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


@pytest.fixture
def porto(tmp_path: Path) -> Iterator[ScriptedPorto]:
    made = ScriptedPorto(tmp_path / "porto.sock")
    yield made
    made.stop()
