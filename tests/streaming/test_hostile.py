"""Clients with a token that break the protocol, take nothing, or send without end: each costs only itself."""

from __future__ import annotations

import resource
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator

import pytest
import wsproto.events as ws
from shim_streaming import pipes, transport
from shim_streaming.spdy import DICTIONARY

from shim_core.context import CallContext
from shim_core.types import ExecSession
from tests.streaming.forward_client import Forwarder
from tests.streaming.harness import Harness, eventually
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand


def control(kind: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("!HHI", 0x8003, kind, len(payload) if length is None else length) + payload


def header_bomb() -> bytes:
    deflate = zlib.compressobj(9, zdict=DICTIONARY)
    bomb = deflate.compress(struct.pack("!II", 1, 1) + b"a" + struct.pack("!I", 1 << 30))
    bomb += b"".join(deflate.compress(bytes(1 << 20)) for _ in range(64)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return control(1, struct.pack("!IIH", 99, 0, 0) + bomb)


def million_headers() -> bytes:
    deflate = zlib.compressobj(9, zdict=DICTIONARY)
    block = deflate.compress(struct.pack("!I", 1_000_000)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    return control(1, struct.pack("!IIH", 99, 0, 0) + block)


HOSTILE = {
    "SETTINGS with 2^32-1 entries": control(4, b"\xff\xff\xff\xff"),
    "SETTINGS of 16 MiB": control(4, b"", 0xFFFFFF),
    "a million headers": million_headers(),
    "a header bomb": header_bomb(),
    "an unknown frame": control(99, b""),
    "SPDY/2": b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01",
    "data on stream 0": struct.pack("!II", 0, 1) + b"x",
}


@pytest.fixture
def healthy(harness: Harness) -> Iterator[SpdyCommand]:
    """A session beside the hostile one, that has to go on as if nothing were."""
    client = SpdyCommand(harness.exec_url("cat", stdin=True), stdin=True)
    client.write(b"before")
    client.wait_output(b"before")
    yield client
    client.write(b"after")
    client.wait_output(b"after")
    client.close_stdin()
    assert client.exit_code() == 0


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("name", HOSTILE)
def test_frames_that_break_the_protocol_close_their_own_connection(harness: Harness, name: str) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    client = SpdyCommand(harness.exec_url("sleep", "60"))
    eventually(lambda: harness.runtime.running == 2, "the command runs")
    try:
        client.spdy.raw(HOSTILE[name])
    except OSError:
        pass
    client.spdy.wait_closed()
    assert client.spdy.goaway == 1
    client.close()
    eventually(lambda: harness.runtime.running == 1, "its command is gone", 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 32 * 1024


@pytest.mark.usefixtures("healthy")
def test_a_frame_that_is_cut_short(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("sleep", "60"))
    client.spdy.raw(control(1, b"", 100) + b"only this")
    client.close()
    eventually(lambda: harness.runtime.running == 1, "its command is gone", 5)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("data", [b"\x82\x01x", b"\xff\xff" + b"\xff" * 8, b"\x88\x81\0\0\0\0x"])
def test_broken_websocket_frames(harness: Harness, data: bytes) -> None:
    client = WebSocketCommand(harness.exec_url("sleep", "60"), "v5.channel.k8s.io")
    client.socket.sock.sendall(data)
    client.channels.wait(lambda: client.channels.closed, "the end")
    assert client.socket.close_code == 1002
    client.close()
    eventually(lambda: harness.runtime.running == 1, "its command is gone", 5)


@pytest.mark.usefixtures("healthy")
def test_broken_spdy_in_a_tunnel(harness: Harness) -> None:
    forwarder = Forwarder(harness.forward_url(), tunnel=True)
    forwarder.spdy.raw(control(4, b"\xff\xff\xff\xff"))
    forwarder.spdy.wait_closed()
    assert forwarder.spdy.goaway == 1
    forwarder.close()


def until_stuck(send: Callable[[], None]) -> None:
    """Send until the server takes no more."""
    try:
        while True:
            send()
    except (TimeoutError, BlockingIOError):
        pass


def in_flight(harness: Harness) -> int:
    """What the sessions of a server hold for their clients and processes, in bytes."""
    total = 0
    for session in list(harness.server._sessions):
        total += session.transport.waiting_bytes + session.pressure._total_bytes
    return total


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("websocket", [False, True])
def test_a_client_that_takes_nothing(harness: Harness, websocket: bool) -> None:
    """The process is slowed down; memory stays bounded; when the client goes, everything goes."""
    url = harness.exec_url("cat", "/dev/zero")
    client: SpdyCommand | WebSocketCommand
    client = WebSocketCommand(url, "v5.channel.k8s.io") if websocket else SpdyCommand(url)
    client.stall()
    eventually(lambda: in_flight(harness) >= transport.HIGH_WATER_BYTES, "the server waits")
    threading.Event().wait(0.3)
    assert in_flight(harness) <= transport.HIGH_WATER_BYTES + 2 * pipes.READ_BYTES
    client.close()
    eventually(lambda: harness.runtime.running == 1, "its command is gone", 5)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("websocket", [False, True])
def test_a_process_that_reads_nothing(harness: Harness, websocket: bool) -> None:
    """The client is slowed down; memory stays bounded; that it goes is noticed all the same."""
    url = harness.exec_url("sleep", "60", stdin=True)
    client: SpdyCommand | WebSocketCommand
    client = WebSocketCommand(url, "v5.channel.k8s.io") if websocket else SpdyCommand(url, stdin=True)
    client.sock.settimeout(0.5)
    until_stuck(lambda: client.write(bytes(32768)))
    assert in_flight(harness) <= pipes.SINK_LIMIT_BYTES + transport.RECEIVE_BYTES
    client.close()
    eventually(lambda: harness.runtime.running == 1, "its command is gone", 5)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("websocket", [False, True])
def test_a_client_that_asks_and_takes_no_answers(harness: Harness, websocket: bool) -> None:
    """Pings whose answers pile up: it isn't read any more."""
    url = harness.exec_url("sleep", "60")
    client: SpdyCommand | WebSocketCommand
    client = WebSocketCommand(url, "v5.channel.k8s.io") if websocket else SpdyCommand(url)
    client.stall()
    if isinstance(client, WebSocketCommand):
        batch = client.socket._connection.send(ws.Ping(payload=b"x" * 125)) * 500
    else:
        batch = struct.pack("!HHII", 0x8003, 6, 4, 1) * 5000
    client.sock.settimeout(0.5)
    until_stuck(lambda: client.sock.sendall(batch))
    assert in_flight(harness) <= transport.REPLY_LIMIT_BYTES + 2 * transport.RECEIVE_BYTES
    client.close()
    eventually(lambda: harness.runtime.running == 1, "its command is gone", 5)


def test_a_tty_command_that_cannot_start_leaves_nothing(harness: Harness) -> None:
    """CVE-2022-23471: what waited for window sizes stayed when the command didn't start."""
    harness.runtime.on_exec = lambda _session, _context: 127
    for _ in range(50):
        client = SpdyCommand(harness.exec_url("/nonexistent", tty=True, stdin=True), tty=True, stdin=True)
        assert client.exit_code() == 127
    eventually(lambda: harness.sessions() == 0, "all are over")


def test_a_hook_that_ignores_the_cancellation_holds_only_its_thread(harness: Harness) -> None:
    release = threading.Event()

    def ignore(_session: ExecSession, _context: CallContext) -> int:
        release.wait(60)
        return 0

    harness.runtime.on_exec = ignore
    client = SpdyCommand(harness.exec_url("true"))
    eventually(lambda: harness.runtime.running == 1, "the command runs")
    client.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)
    release.set()


def test_resets_of_single_streams(harness: Harness) -> None:
    """stdin's is its end; without stdout the process goes on; the exit code is told all the same."""
    client = SpdyCommand(harness.exec_url("sh", "-c", "cat; head -c 1000000 /dev/zero; exit 4", stdin=True), stdin=True)
    assert client.stdin
    assert client.stdout
    client.spdy.reset(client.stdout)
    client.spdy.reset(client.stdin)
    client.spdy.wait(lambda: client.error.ended, "the status")
    client.stdout = None
    assert client.exit_code() == 4


def test_goaway_of_the_client_lets_the_session_finish(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("cat", stdin=True), stdin=True)
    client.spdy.go_away()
    client.write(b"still here")
    client.wait_output(b"still here")
    client.close_stdin()
    assert client.exit_code() == 0


def test_streams_nobody_asked_for(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("cat", stdin=True, stderr=False), stdin=True)  # with a stderr all the same
    assert client.spdy.open(streamType="nonsense").reset == 3
    assert client.spdy.open(streamType="stdin").reset == 3
    resize = client.spdy.open(streamType="resize")
    client.spdy.send(resize, b'{"Width":1,"Height":1}')
    client.write(b"x")
    client.close_stdin()
    assert client.exit_code() == 0
    assert client.out == b"x"


def test_a_connection_that_is_reset(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("cat", "/dev/zero"))
    client.spdy._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.spdy._sock.close()
    client.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)
    eventually(lambda: harness.runtime.running == 0, "its command is gone", 5)
