"""The client's connection: order, congestion, and its end."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_streaming import transport
from shim_streaming.loop import Loop
from shim_streaming.transport import Transport

from tests.streaming.test_loop import run
from tools.certificates import CertificateAuthority


class Receiver:
    def __init__(self) -> None:
        self.data = bytearray()
        self.events: list[str] = []

    def received(self, data: bytes) -> None:
        self.data += data

    def hung_up(self) -> None:
        self.events.append("hung up")

    def lost(self) -> None:
        self.events.append("lost")


class Wire:
    """A transport and the client's socket, whose buffer is small: what it doesn't take stays with the server."""

    def __init__(self, loop: Loop, directory: Path | None = None) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.client = socket.socket()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self.client.settimeout(60)
        self.client.connect(listener.getsockname())
        sock, _ = listener.accept()
        listener.close()
        if directory is not None:
            sock = self._encrypt(sock, directory)
        sock.setblocking(False)
        self.receiver = Receiver()
        self.transport = Transport(loop, sock, self.receiver, linger_s=0.3)

    def _encrypt(self, sock: socket.socket, directory: Path) -> ssl.SSLSocket:
        authority = CertificateAuthority(directory)
        certificate = authority.issue("server", ["127.0.0.1"])
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate.cert_path, certificate.key_path)
        client = ssl.create_default_context(cafile=str(authority.path))
        self.client = client.wrap_socket(self.client, server_hostname="127.0.0.1", do_handshake_on_connect=False)
        thread = threading.Thread(target=self.client.do_handshake)
        thread.start()
        encrypted = server.wrap_socket(sock, server_side=True)
        thread.join()
        return encrypted

    def close(self) -> None:
        self.transport.close()
        self.client.close()


@pytest.fixture
def wire(loop: Loop) -> Iterator[Wire]:
    made = Wire(loop)
    yield made
    made.close()


def test_what_came_early_comes_first(loop: Loop, wire: Wire) -> None:
    wire.client.sendall(b"second")
    wire.transport.start(b"first,")
    run(loop, lambda: len(wire.receiver.data) == 12)
    assert wire.receiver.data == b"first,second"


def test_buffers_go_out_in_order(loop: Loop, wire: Wire) -> None:
    wire.transport.start(b"")
    expected = b""
    for number in range(300):
        wire.transport.write(b"%d:" % number, memoryview(b"x" * number), bytearray(b";"))
        expected += b"%d:" % number + b"x" * number + b";"
    run(loop, lambda: wire.transport.waiting_bytes == 0)
    received = b""
    while len(received) < len(expected):
        received += wire.client.recv(65536)
    assert received == expected


@pytest.mark.parametrize("tls", [False, True])
def test_an_empty_buffer_comes_to_nothing(loop: Loop, tls: bool, tmp_path: Path) -> None:
    wire = Wire(loop, tmp_path if tls else None)
    wire.transport.start(b"")
    wire.transport.write(b"")
    wire.transport.write(b"data", memoryview(b""))
    run(loop, lambda: wire.transport.waiting_bytes == 0)
    assert wire.client.recv(100) == b"data"
    wire.close()


def test_congestion(loop: Loop, wire: Wire) -> None:
    wire.transport.start(b"")
    total = 0
    while not wire.transport.congested:
        wire.transport.write(bytes(100_000))
        total += 100_000
        loop.call_later(0, lambda: None)
        loop._round()
    assert wire.transport.waiting_bytes >= transport.HIGH_WATER_BYTES
    # A window smaller than a loopback segment would have TCP wait for its own timers again and again.
    wire.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    received: list[int] = []
    reader = threading.Thread(target=lambda: received.append(len(wire.client.makefile("rb").read(total))))
    reader.start()
    run(loop, lambda: wire.transport.waiting_bytes == 0)
    reader.join()
    assert received == [total]
    assert not wire.transport.congested


def test_a_client_that_leaves(loop: Loop, wire: Wire) -> None:
    wire.transport.start(b"")
    wire.client.sendall(b"last words")
    wire.client.close()
    run(loop, lambda: wire.receiver.events)
    assert wire.receiver.data == b"last words"
    assert wire.receiver.events == ["lost"]


def test_a_client_that_leaves_while_it_is_not_read(loop: Loop, wire: Wire) -> None:
    wire.transport.start(b"")
    wire.transport.hold(True)
    wire.client.sendall(b"last words")
    wire.client.close()
    run(loop, lambda: wire.receiver.events)
    assert wire.receiver.events == ["hung up"]
    assert wire.receiver.data == b""
    wire.transport.hold(False)
    run(loop, lambda: len(wire.receiver.events) == 2)
    assert wire.receiver.data == b"last words"
    assert wire.receiver.events == ["hung up", "lost"]


def test_a_client_that_breaks_off(loop: Loop, wire: Wire) -> None:
    wire.transport.start(b"")
    wire.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.client.close()
    run(loop, lambda: wire.receiver.events)
    assert wire.receiver.events == ["lost"]


@pytest.mark.parametrize("tls", [False, True])
def test_the_end_waits_for_what_is_under_way(loop: Loop, tls: bool, tmp_path: Path) -> None:
    """And the client's data, which nobody reads any more, doesn't take it back."""
    wire = Wire(loop, tmp_path if tls else None)
    finished: list[bool] = []
    wire.transport.start(b"")
    wire.transport.hold(True)
    wire.client.sendall(bytes(200_000))
    wire.transport.write(bytes(1_000_000), b"status")
    wire.transport.finish(lambda: finished.append(True))
    # The kernel takes it all, and the client is so slow that it has read nothing when the server is done with it.
    run(loop, lambda: finished)
    received = bytearray()
    while data := wire.client.recv(65536):
        received += data
    assert len(received) == 1_000_006
    assert received.endswith(b"status")
    assert wire.receiver.events == []
    wire.close()


def test_a_client_that_does_not_close_is_closed(loop: Loop, wire: Wire) -> None:
    finished: list[bool] = []
    wire.transport.start(b"")
    wire.transport.write(b"bye")
    wire.transport.finish(lambda: finished.append(True))
    run(loop, lambda: finished)
    assert wire.client.recv(10) == b"bye"


def test_nothing_is_sent_after_the_end(loop: Loop, wire: Wire) -> None:
    wire.transport.start(b"")
    wire.transport.close()
    wire.transport.write(b"x")
    wire.transport.finish(lambda: wire.receiver.events.append("finished"))
    assert wire.receiver.events == ["finished"]
    assert wire.client.recv(10) == b""
