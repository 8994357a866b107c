"""port-forward: many connections over one, each with two directions of its own."""

from __future__ import annotations

import ctypes
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from shim_core.types import PortForwardSession
from tests.streaming.conftest import open_descriptors
from tests.streaming.forward_client import Forwarder
from tests.streaming.harness import Harness, eventually, limits
from tests.streaming.pods import Pods, closed_port, echo


def reverse_at_the_end(sock: socket.socket) -> None:
    """Answers only when the client has closed its direction."""
    with sock:
        received = b""
        while data := sock.recv(65536):
            received += data
        sock.sendall(received[::-1])


def speak_and_listen(sock: socket.socket) -> None:
    """Closes its own direction first, then counts what the client still sends."""
    with sock:
        sock.sendall(b"said all")
        sock.shutdown(socket.SHUT_WR)
        counts.append(sum(len(data) for data in iter(lambda: sock.recv(65536), b"")))


counts: list[int] = []


TRANSPORTS = pytest.mark.parametrize("tunnel", [False, True], ids=["spdy", "tunnel"])


@TRANSPORTS
def test_there_and_back(harness: Harness, pods: Pods, tunnel: bool) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    assert forwarder.protocol == ("SPDY/3.1+portforward.k8s.io" if tunnel else "portforward.k8s.io")
    connection = forwarder.connect(pod.port)
    connection.send(b"hello")
    assert connection.wait_data(5) == b"hello"
    connection.end()
    assert connection.wait_end() == b"hello"
    assert connection.wait_error() == b""
    forwarder.close()


@TRANSPORTS
def test_the_client_closes_its_direction_first(harness: Harness, pods: Pods, tunnel: bool) -> None:
    pod = pods(reverse_at_the_end)
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    connection = forwarder.connect(pod.port)
    connection.send(b"abc" * 100_000)
    connection.end()
    assert connection.wait_end() == b"cba" * 100_000
    assert connection.wait_error() == b""
    forwarder.close()


@TRANSPORTS
def test_the_pod_closes_its_direction_first(harness: Harness, pods: Pods, tunnel: bool) -> None:
    counts.clear()
    pod = pods(speak_and_listen)
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    connection = forwarder.connect(pod.port)
    assert connection.wait_end() == b"said all"
    assert not connection.error.ended
    connection.send(bytes(500_000))
    connection.end()
    assert connection.wait_error() == b""
    eventually(lambda: counts == [500_000], "the pod has got it all")
    forwarder.close()


@TRANSPORTS
def test_many_connections_at_once(harness: Harness, pods: Pods, tunnel: bool) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    connections = [forwarder.connect(pod.port) for _ in range(50)]
    for number, connection in enumerate(connections):
        connection.send(b"%d;" % number * 1000)
        connection.end()
    for number, connection in enumerate(connections):
        assert connection.wait_end() == b"%d;" % number * 1000
    forwarder.close()


def test_clients_that_send_no_request_id(harness: Harness, pods: Pods) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url())
    for _ in range(3):
        connection = forwarder.connect(pod.port, request_id=False)
        connection.send(b"x")
        connection.end()
        assert connection.wait_end() == b"x"
    forwarder.close()


def test_streams_in_the_other_order(harness: Harness, pods: Pods) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url())
    headers = {"port": str(pod.port), "requestID": "9"}
    data = forwarder.spdy.open(streamType="data", **headers)
    error = forwarder.spdy.open(streamType="error", **headers)
    forwarder.spdy.send(data, b"x", fin=True)
    forwarder.spdy.wait(lambda: data.ended and error.ended, "the end")
    assert bytes(data.data) == b"x"
    forwarder.close()


@TRANSPORTS
def test_a_closed_port_is_told_on_the_error_stream(harness: Harness, tunnel: bool) -> None:
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    connection = forwarder.connect(closed_port())
    assert b"Connection refused" in connection.wait_error()
    connection.wait_end()
    assert connection.data.reset == 5
    forwarder.close()


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999999999", "", "http", "\uff18\uff10"])
def test_what_is_no_port(harness: Harness, port: str) -> None:
    forwarder = Forwarder(harness.forward_url())
    connection = forwarder.connect(port)
    assert b"number from 1 to 65535" in connection.wait_error()
    assert harness.runtime.dialled == []
    forwarder.close()


def test_one_failure_leaves_the_others_alone(harness: Harness, pods: Pods) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url())
    good = forwarder.connect(pod.port)
    assert forwarder.connect(closed_port()).wait_error()
    good.send(b"still here")
    assert good.wait_data(10) == b"still here"
    forwarder.close()


def test_a_bug_of_the_runtime_stays_in_the_log(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_session: PortForwardSession) -> socket.socket:
        raise RuntimeError("password=hunter2")

    harness.runtime.on_dial = fail
    forwarder = Forwarder(harness.forward_url())
    assert b"hunter2" not in forwarder.connect(80).wait_error()
    assert "hunter2" in caplog.text
    forwarder.close()


def test_nobody_answers(harness: Harness) -> None:
    harness.runtime.on_dial = lambda _session: None
    forwarder = Forwarder(harness.forward_url())
    assert forwarder.connect(80).wait_error() == b"no runtime plugin forwards ports"
    forwarder.close()


def test_a_connection_that_breaks_off_in_the_pod(harness: Harness, pods: Pods) -> None:
    def break_off(sock: socket.socket) -> None:
        sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    pod = pods(break_off)
    forwarder = Forwarder(harness.forward_url())
    connection = forwarder.connect(pod.port)
    connection.send(b"x")
    connection.wait_end()
    assert connection.data.reset == 5
    assert connection.wait_error() == b""  # kubectl would close all connections over a message
    forwarder.close()


@TRANSPORTS
def test_a_connection_the_client_gives_up(harness: Harness, pods: Pods, tunnel: bool) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    connection = forwarder.connect(pod.port)
    connection.send(b"x")
    connection.wait_data(1)
    connection.reset()
    assert connection.wait_error() == b""
    eventually(lambda: pod.connections[0].fileno() == -1, "the pod's side has ended")
    again = forwarder.connect(pod.port)
    again.send(b"y")
    assert again.wait_data(1) == b"y"
    forwarder.close()


def test_a_pod_that_does_not_read_leaves_the_others_alone(harness: Harness, pods: Pods) -> None:
    """As long as what it doesn't read fits into its own buffer: beyond that SPDY has no way to slow one stream."""
    release = threading.Event()

    def stall(sock: socket.socket) -> None:
        release.wait(60)
        echo(sock)

    stalled, good = pods(stall), pods(echo)
    forwarder = Forwarder(harness.forward_url())
    first, second = forwarder.connect(stalled.port), forwarder.connect(good.port)
    first.send(bytes(800_000))
    second.send(b"through")
    assert second.wait_data(7) == b"through"
    release.set()
    first.end()
    assert len(first.wait_end()) == 800_000
    forwarder.close()


def test_a_slow_dial_does_not_hold_up_the_others(harness: Harness, pods: Pods) -> None:
    pod, release = pods(echo), threading.Event()

    def dial(session: PortForwardSession) -> socket.socket:
        if session.port == 1:
            release.wait(60)
        return socket.create_connection(("127.0.0.1", pod.port))

    harness.runtime.on_dial = dial
    forwarder = Forwarder(harness.forward_url())
    slow, quick = forwarder.connect(1), forwarder.connect(2)
    slow.send(b"sent before the connection is there")
    slow.end()
    quick.send(b"x")
    assert quick.wait_data(1) == b"x"
    release.set()
    assert slow.wait_end() == b"sent before the connection is there"
    forwarder.close()


def test_dials_are_bounded_and_all_are_made(serve: Callable[..., Harness], pods: Pods) -> None:
    harness, pod = serve(limits=limits(dials=2)), pods(echo)
    lock, now, most = threading.Lock(), [0], [0]

    def dial(_session: PortForwardSession) -> socket.socket:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return socket.create_connection(("127.0.0.1", pod.port))

    harness.runtime.on_dial = dial
    forwarder = Forwarder(harness.forward_url())
    connections = [forwarder.connect(1) for _ in range(10)]
    for connection in connections:
        connection.send(b"x")
        assert connection.wait_data(1) == b"x"
    assert most[0] == 2
    forwarder.close()


def test_more_connections_than_allowed_are_refused(serve: Callable[..., Harness], pods: Pods) -> None:
    harness, pod = serve(limits=limits(forwards=2)), pods(echo)
    forwarder = Forwarder(harness.forward_url())
    first, _ = forwarder.connect(pod.port), forwarder.connect(pod.port)
    assert forwarder.connect(pod.port).data.reset == 3
    first.send(b"x")
    first.end()
    first.wait_error()
    assert forwarder.connect(pod.port).data.reset is None
    forwarder.close()


def test_half_a_pair_is_given_up(serve: Callable[..., Harness]) -> None:
    harness = serve(limits=limits(creation_timeout_s=0.2))
    forwarder = Forwarder(harness.forward_url())
    error = forwarder.spdy.open(streamType="error", port="80", requestID="1")
    forwarder.spdy.wait(lambda: error.ended, "the end of the error stream")
    assert b"not opened both streams" in bytes(error.data)
    data = forwarder.spdy.open(streamType="data", port="80", requestID="2")
    forwarder.spdy.wait(lambda: data.reset is not None, "a reset")
    forwarder.close()


@pytest.mark.parametrize("headers", [{}, {"streamType": "stdin", "port": "80"}])
def test_streams_that_are_neither_data_nor_error(harness: Harness, headers: dict[str, str]) -> None:
    forwarder = Forwarder(harness.forward_url())
    assert forwarder.spdy.open(**headers).reset == 3
    forwarder.close()


def test_two_data_streams_of_one_request(harness: Harness) -> None:
    forwarder = Forwarder(harness.forward_url())
    headers = {"streamType": "data", "port": "80", "requestID": "1"}
    assert forwarder.spdy.open(**headers).reset is None
    assert forwarder.spdy.open(**headers).reset == 3
    forwarder.close()


@TRANSPORTS
def test_the_client_goes(harness: Harness, pods: Pods, tunnel: bool) -> None:
    pod = pods(echo)
    before = open_descriptors()
    forwarder = Forwarder(harness.forward_url(), tunnel=tunnel)
    for _ in range(5):
        connection = forwarder.connect(pod.port)
        connection.send(b"x")
        connection.wait_data(1)
    forwarder.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)
    eventually(lambda: all(sock.fileno() == -1 for sock in pod.connections), "the pod's connections are closed")
    eventually(lambda: open_descriptors() <= before, "descriptors are closed")


def test_the_client_goes_while_a_dial_is_under_way(harness: Harness, pods: Pods) -> None:
    pod, release = pods(echo), threading.Event()
    made: list[socket.socket] = []

    def dial(_session: PortForwardSession) -> socket.socket:
        release.wait(60)
        made.append(socket.create_connection(("127.0.0.1", pod.port)))
        return made[-1]

    harness.runtime.on_dial = dial
    forwarder = Forwarder(harness.forward_url())
    forwarder.connect(1)
    forwarder.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)
    release.set()
    eventually(lambda: made and made[0].fileno() == -1, "what was connected for it is closed")


@pytest.mark.parametrize("slow_dial", [False, True])
def test_what_the_client_sent_before_it_went_is_delivered(harness: Harness, pods: Pods, slow_dial: bool) -> None:
    received: list[bytes] = []

    def take_all(sock: socket.socket) -> None:
        with sock:
            received.append(b"".join(iter(lambda: sock.recv(65536), b"")))

    pod = pods(take_all)

    def dial(_session: PortForwardSession) -> socket.socket:
        eventually(lambda: gone, "the client has gone")
        return socket.create_connection(("127.0.0.1", pod.port))

    gone: list[bool] = []
    harness.runtime.on_dial = dial if slow_dial else None
    forwarder = Forwarder(harness.forward_url())
    connection = forwarder.connect(pod.port)
    connection.send(b"z" * 300_000)
    connection.end()
    forwarder.close()
    gone.append(True)
    eventually(lambda: received, "the pod has got it")
    assert received == [b"z" * 300_000]


def test_stop_of_the_daemon(harness: Harness, pods: Pods) -> None:
    pod = pods(echo)
    forwarder = Forwarder(harness.forward_url())
    connection = forwarder.connect(pod.port)
    connection.send(b"x")
    connection.wait_data(1)
    harness.close()
    assert forwarder.spdy.goaway == 0
    assert b"portoshim is stopping" in bytes(connection.error.data)
    forwarder.close()


def test_idle_forwards_are_closed(serve: Callable[..., Harness], pods: Pods) -> None:
    harness, pod = serve({"IdleTimeout": "300ms"}), pods(echo)
    forwarder = Forwarder(harness.forward_url())
    connection = forwarder.connect(pod.port)
    assert b"idle" in connection.wait_error(5)
    forwarder.close()


@pytest.mark.root
def test_ports_inside_a_network_namespace(harness: Harness) -> None:
    """The hook has a thread of its own for each connection, in which it may change the network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    port = closed_port()
    subprocess.run(["ip", "netns", "add", "pod"], check=True)
    subprocess.run(["ip", "-n", "pod", "link", "set", "lo", "up"], check=True)
    script = (
        "import socket; server = socket.create_server(('127.0.0.1', %d)); print(flush=True);"
        "sock, _ = server.accept(); sock.sendall(b'inside:' + sock.recv(100)); sock.close()"
    )
    command = ["ip", "netns", "exec", "pod", sys.executable, "-c", script % port]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout
    server.stdout.readline()

    def dial(session: PortForwardSession) -> socket.socket:
        with open("/run/netns/pod") as namespace:
            assert libc.setns(namespace.fileno(), 0x40000000) == 0
        return socket.create_connection(("127.0.0.1", session.port), timeout=60)

    harness.runtime.on_dial = dial
    forwarder = Forwarder(harness.forward_url())
    connection = forwarder.connect(port)
    connection.send(b"hello")
    assert connection.wait_end() == b"inside:hello"
    connection.end()
    forwarder.close()
    # Nobody else has moved: the port is still closed here.
    harness.runtime.on_dial = None
    again = Forwarder(harness.forward_url())
    assert b"Connection refused" in again.connect(port).wait_error()
    again.close()
    server.wait(60)
    server.stdout.close()
    subprocess.run(["ip", "netns", "del", "pod"], check=True)
