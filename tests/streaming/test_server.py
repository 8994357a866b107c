"""The listener on a hostile network: what comes before a token was shown."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from shim_streaming import greeting

from shim_core.errors import StartupError, Unavailable
from tests.streaming import wire
from tests.streaming.conftest import open_descriptors, streaming_threads
from tests.streaming.harness import Harness, eventually, limits
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocket
from tests.streaming.wire import UpgradeRefused

Serve = Callable[..., Harness]
SPDY = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": "v4.channel.k8s.io"}


def raw(harness: Harness, data: bytes, *, end: bool = False) -> bytes:
    """What the server answers to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", harness.port), timeout=15) as sock:
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while more := sock.recv(65536):
                answer += more
        except ConnectionResetError:
            pass
        return answer


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


# -- URLs --------------------------------------------------------------------------------------------------------------


def test_urls_are_absolute_and_on_loopback(harness: Harness) -> None:
    parts = urlsplit(harness.exec_url("true"))
    assert (parts.scheme, parts.hostname, parts.port) == ("http", "127.0.0.1", harness.port)
    assert parts.path.startswith("/exec/")


def test_it_listens_on_loopback_alone(harness: Harness) -> None:
    sock = harness.server._sock
    assert sock is not None
    assert sock.getsockname()[0] == "127.0.0.1"


def test_where_it_listens_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    serve()
    assert "neither TLS nor an address is configured" in caplog.text
    caplog.clear()
    serve({"Address": "[::]"})
    assert "without TLS" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"


def test_all_addresses(serve: Serve) -> None:
    harness = serve({"Address": "[::]"})
    for address in ("127.0.0.1", "::1"):
        with socket.create_connection((address, harness.port), timeout=60):
            pass
    assert SpdyCommand(harness.exec_url("true")).exit_code() == 0


def test_advertised_url(serve: Serve) -> None:
    harness = serve({"AdvertiseURL": "http://node7.example:1234/cri"})
    url = harness.exec_url("true")
    assert url.startswith("http://node7.example:1234/cri/exec/")
    path = urlsplit(url).path
    headers = SPDY | {"Host": "node7.example:1234"}
    sock, _, _ = wire.upgrade(f"http://127.0.0.1:{harness.port}{path}", headers)
    sock.close()


def test_a_port_that_is_taken(harness: Harness, serve: Serve) -> None:
    with pytest.raises(StartupError, match=f"port {harness.port} is taken by another process"):
        serve({"Port": harness.port})


def test_an_address_the_node_does_not_have(serve: Serve) -> None:
    with pytest.raises(StartupError, match="no such address"):
        serve({"Address": "192.0.2.1"})


def test_no_urls_before_the_start_and_after_the_stop(harness: Harness) -> None:
    harness.close()
    with pytest.raises(Unavailable, match="not running"):
        harness.exec_url("true")


def test_stop_twice(harness: Harness) -> None:
    harness.close()
    harness.close()


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_token_is_good_once(harness: Harness) -> None:
    url = harness.exec_url("true")
    assert SpdyCommand(url).exit_code() == 0
    with pytest.raises(UpgradeRefused) as raised:
        SpdyCommand(url)
    assert raised.value.answer.status == 404


def test_of_many_clients_with_one_token_one_gets_in(harness: Harness) -> None:
    url, barrier, statuses = harness.exec_url("true"), threading.Barrier(8), []

    def knock() -> None:
        barrier.wait()
        try:
            sock, answer, _ = wire.upgrade(url, SPDY)
            sock.close()
        except UpgradeRefused as err:
            answer = err.answer
        statuses.append(answer.status)

    threads = [threading.Thread(target=knock) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [101] + [404] * 7


def test_refusals_are_told(harness: Harness) -> None:
    answer = wire.ask(harness.exec_url("true"), SPDY | {"X-Stream-Protocol-Version": "v9.channel.k8s.io"})
    assert answer.status == 403
    assert b"unable to upgrade" in answer.body
    assert answer.headers["connection"] == "close"
    assert wire.ask(harness.exec_url("true"), {}, "GET").status == 400
    assert wire.ask(harness.exec_url("true"), SPDY, "DELETE").status == 405
    assert wire.ask(harness.exec_url("true"), SPDY | {"Host": "attacker.example"}).status == 403
    with pytest.raises(UpgradeRefused, match="403"):
        WebSocket(harness.exec_url("true"), "v5.channel.k8s.io", headers={"Origin": "http://attacker.example"})


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"garbage\r\n\r\n", 400),
        (b"\x00" * 200 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
    ],
)
def test_requests_that_are_none(harness: Harness, data: bytes, status: int) -> None:
    assert status_of(raw(harness, data)) == status
    assert SpdyCommand(harness.exec_url("true")).exit_code() == 0


def test_tokens_never_reach_the_log(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    urls = [harness.exec_url("true") for _ in range(4)]
    tokens = [url.rsplit("/", 1)[1] for url in urls]
    SpdyCommand(urls[0]).finish()
    wire.ask(urls[1], SPDY, "DELETE")
    wire.ask(urls[2], SPDY | {"Host": "attacker.example"})
    raw(harness, f"GET /exec/{tokens[3]} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".encode())
    assert caplog.text
    assert not any(token in caplog.text for token in tokens)


def test_early_bytes_are_not_lost(harness: Harness) -> None:
    """A client that doesn't wait for 101 before it speaks."""
    ping = bytes.fromhex("800300060000000400000001")
    with wire.connect(harness.exec_url("sleep", "9")) as sock:
        sock.sendall(wire.request(harness.exec_url("sleep", "9"), SPDY) + ping)
        _, rest = wire.read_answer(sock)
        while len(rest) < len(ping):
            rest += sock.recv(100)
        assert rest == ping


# -- slow and many -----------------------------------------------------------------------------------------------------


def test_slow_heads_are_cut_off(serve: Serve) -> None:
    harness = serve(limits=limits(head_timeout_s=0.3))
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", harness.port), timeout=60) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        try:
            while not sock.send(b"X: y\r\n") or time.monotonic() - started < 3:
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - started < 2


def test_silent_connections_are_cut_off(serve: Serve) -> None:
    harness = serve(limits=limits(head_timeout_s=0.2))
    assert raw(harness, b"") == b""


def test_clients_that_leave_at_once(harness: Harness) -> None:
    before = open_descriptors()
    for _ in range(200):
        socket.create_connection(("127.0.0.1", harness.port), timeout=60).close()
    eventually(lambda: open_descriptors() <= before, "descriptors are closed")


def test_a_flood_of_connections_keeps_nobody_out(serve: Serve) -> None:
    harness = serve(limits=limits(greetings=20))
    threads = len(streaming_threads())
    idle = []
    for _ in range(200):
        idle.append(socket.create_connection(("127.0.0.1", harness.port), timeout=60))
        idle[-1].sendall(b"GET / HTTP/1.1\r\n")
    eventually(lambda: len(harness.server._greetings) == 20, "the rest is cut off")
    assert len(streaming_threads()) == threads  # nobody gets a thread without a token
    for _ in range(5):
        assert SpdyCommand(harness.exec_url("true")).exit_code() == 0
    for sock in idle:
        sock.close()


def test_answers_that_are_not_taken_hold_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "_LINGER_S", 0.2)
    harness = serve(limits=limits(head_timeout_s=0.3))
    before = open_descriptors()
    socks = [socket.create_connection(("127.0.0.1", harness.port), timeout=60) for _ in range(20)]
    for sock in socks:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    eventually(lambda: open_descriptors() <= before + 20, "the server's sides are closed", 5)
    for sock in socks:
        sock.close()


def test_sessions_are_limited(serve: Serve) -> None:
    harness = serve(limits=limits(sessions=2))
    first, second = (SpdyCommand(harness.exec_url("sleep", "60")) for _ in range(2))
    with pytest.raises(UpgradeRefused, match="too many sessions") as raised:
        SpdyCommand(harness.exec_url("true"))
    assert raised.value.answer.status == 503
    first.close()
    eventually(lambda: harness.sessions() == 1, "one is over")
    assert SpdyCommand(harness.exec_url("true")).exit_code() == 0
    second.close()


def test_running_out_of_descriptors_is_survived(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    url = harness.exec_url("true")
    client = socket.socket()
    client.settimeout(10)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 10, before[1]))
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        client.connect(("127.0.0.1", harness.port))
        client.sendall(wire.request(url, SPDY))
        eventually(lambda: "no connection can be accepted" in caplog.text, "the lack is noticed")
        # It rests meanwhile, and doesn't ask again and again.
        assert caplog.text.count("no connection can be accepted") < 3
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    answer, _ = wire.read_answer(client)
    assert answer.status == 101
    client.close()


def test_no_descriptors_for_a_session(harness: Harness) -> None:
    """A session that can't have its pipes says so, and the next one works."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = SpdyCommand(harness.exec_url("true", stdin=True), stdin=False)  # waits for its last stream
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 1, before[1]))
        client.stdin = client.spdy.open(streamType="stdin")
        assert b"no streams can be opened on the node: Too many open files" in client.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert SpdyCommand(harness.exec_url("true")).exit_code() == 0
