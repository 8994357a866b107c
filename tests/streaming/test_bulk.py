"""100 MB, byte for byte, over every way they can go."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.streaming.forward_client import Forwarder
from tests.streaming.harness import Harness
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand

TOTAL_BYTES = 100_000_000
BLOCK = hashlib.shake_256(b"streaming").digest(1 << 20)


def blocks() -> Iterator[bytes]:
    """100 MB that don't repeat at any boundary of pipes or frames."""
    left = TOTAL_BYTES
    for number in range(1 << 20):
        block = number.to_bytes(8, "big") + BLOCK[8 + number % 1000 :]
        yield block[:left]
        left -= len(block)
        if left <= 0:
            return


def digest_of(data: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for block in data:
        digest.update(block)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def expected() -> str:
    return digest_of(blocks())


@pytest.mark.parametrize("kind", ["spdy", "websocket"])
def test_exec_stdin_to_stdout(harness: Harness, expected: str, kind: str) -> None:
    url = harness.exec_url("cat", stdin=True)
    client: SpdyCommand | WebSocketCommand
    client = SpdyCommand(url, stdin=True) if kind == "spdy" else WebSocketCommand(url, "v5.channel.k8s.io")
    for block in blocks():
        client.write(block)
    client.close_stdin()
    assert client.exit_code(120) == 0
    assert digest_of([client.out]) == expected


@pytest.mark.parametrize("tunnel", [False, True], ids=["spdy", "tunnel"])
def test_port_forward_there_and_back(harness: Harness, expected: str, tunnel: bool) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def echo() -> None:
        sock, _ = listener.accept()
        with sock:
            while data := sock.recv(1 << 18):
                sock.sendall(data)

    thread = threading.Thread(target=echo)
    thread.start()
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    connection = forwarder.connect(listener.getsockname()[1])
    for block in blocks():
        connection.send(block)
    connection.end()
    assert digest_of([connection.wait_end(120)]) == expected
    assert connection.wait_error() == b""
    forwarder.close()
    thread.join()
    listener.close()
