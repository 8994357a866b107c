"""A thousand sessions: those that end tell the right exit code, and nothing stays of any."""

from __future__ import annotations

import queue
import random
import resource
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from shim_core.context import CallContext
from shim_core.types import ExecSession
from tests.streaming import wire
from tests.streaming.conftest import open_descriptors, streaming_threads
from tests.streaming.forward_client import Forwarder
from tests.streaming.harness import Harness, eventually
from tests.streaming.pods import Pods, closed_port, echo
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand

Serve = Callable[..., Harness]
SESSIONS = 1000
WORKERS = 12


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


class Chaos:
    """One random session after the other."""

    def __init__(self, harness: Harness, port: int, seed: int) -> None:
        self.harness = harness
        self.port = port
        self.rng = random.Random(seed)

    def command(self, *command: str, tty: bool = False) -> SpdyCommand | WebSocketCommand:
        url = self.harness.exec_url(*command, stdin=True, tty=tty)
        if self.rng.random() < 0.5:
            return WebSocketCommand(url, "v5.channel.k8s.io")
        return SpdyCommand(url, stdin=True, tty=tty)

    def one(self) -> str:
        name = self.rng.choice(sorted(name for name in dir(self) if name.startswith("case_")))
        getattr(self, name)()
        return name

    def case_exit_code(self) -> None:
        code = self.rng.randrange(256)
        client = self.command("sh", "-c", f"echo out; exit {code}")
        assert client.exit_code() == code
        assert client.out == b"out\n"

    def case_half_close(self) -> None:
        code, data = self.rng.randrange(256), self.rng.randbytes(self.rng.choice([0, 1, 100, 50_000, 400_000]))
        client = self.command("sh", "-c", f"cat; exit {code}")
        client.write(data)
        client.close_stdin()
        assert client.exit_code() == code
        assert client.out == data

    def case_terminal(self) -> None:
        code = self.rng.randrange(256)
        client = self.command("sh", "-c", f"read line; echo $line; exit {code}", tty=True)
        client.resize(80, 24)
        client.write(b"typed\n")
        assert client.exit_code() == code
        assert client.out == b"typed\r\ntyped\r\n"

    def case_slow_reader(self) -> None:
        code = self.rng.randrange(256)
        client = self.command("sh", "-c", f"head -c 3000000 /dev/zero; exit {code}")
        client.stall()
        threading.Event().wait(self.rng.random() / 20)
        client.resume()
        assert client.exit_code() == code
        assert len(client.out) == 3_000_000

    def case_stalled_reader_that_goes(self) -> None:
        client = self.command("cat", "/dev/zero")
        client.stall()
        threading.Event().wait(self.rng.random() / 20)
        client.close()

    def case_disconnect(self) -> None:
        client = self.command("sh", "-c", "cat; sleep 60")
        client.write(bytes(self.rng.choice([0, 10, 100_000])))
        threading.Event().wait(self.rng.choice([0, 0.01]))
        client.close()

    def case_reset(self) -> None:
        client = self.command("sleep", "60")
        sock = client.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    def case_unused_url(self) -> None:
        self.harness.exec_url("true")

    def case_connection_without_an_upgrade(self) -> None:
        wire.connect(self.harness.server.base_url).close()

    def case_too_few_streams(self) -> None:
        SpdyCommand(self.harness.exec_url("true", stdin=True)).close()

    def case_forward(self) -> None:
        forwarder = Forwarder(self.harness.forward_url(), tunnel=self.rng.random() < 0.5)
        connections = [forwarder.connect(self.port) for _ in range(self.rng.randrange(1, 4))]
        data = self.rng.randbytes(20_000)
        for connection in connections:
            connection.send(data)
            connection.end()
        for connection in connections:
            assert connection.wait_end() == data
        forwarder.close()

    def case_forward_that_goes(self) -> None:
        forwarder = Forwarder(self.harness.forward_url())
        forwarder.connect(self.port).send(b"x" * 1000)
        forwarder.connect(closed_port())
        forwarder.close()


def test_a_thousand_sessions(serve: Serve, pods: Pods) -> None:
    harness, pod = serve(), pods(echo)
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    Chaos(harness, pod.port, 0).case_exit_code()
    eventually(lambda: harness.sessions() == 0, "the first is over")
    eventually(lambda: open_descriptors() < 100, "its descriptors are closed")
    before_threads, before_descriptors = len(streaming_threads()), open_descriptors()
    before_all_threads = threading.active_count()
    problems: queue.Queue[BaseException] = queue.Queue()
    done: Counter[str] = Counter()

    def work(number: int) -> None:
        chaos = Chaos(harness, pod.port, seed + number)
        try:
            for _ in range(SESSIONS // WORKERS + 1):
                done[chaos.one()] += 1
        except BaseException as err:
            problems.put(err)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if not problems.empty():
        raise problems.get()
    assert done.total() >= SESSIONS
    eventually(lambda: harness.sessions() == 0, "all sessions are over")
    eventually(lambda: harness.runtime.running == 0, "all commands have ended")
    eventually(lambda: len(streaming_threads()) == before_threads, "threads are back to the start")
    eventually(lambda: threading.active_count() <= before_all_threads, "all threads are")
    for sock in pod.connections:
        sock.close()
    eventually(lambda: open_descriptors() <= before_descriptors, "descriptors are back to the start")
    assert SpdyCommand(harness.exec_url("true")).exit_code() == 0


def test_a_thousand_idle_sessions_cost_little(serve: Serve) -> None:
    harness = serve()

    def wait(session: ExecSession, context: CallContext) -> int:
        while not context.wait(3600):
            pass
        return 0

    harness.runtime.on_exec = wait
    threads, memory_kib, descriptors_ = threading.active_count(), resident_kib(), open_descriptors()
    socks = []
    for _ in range(SESSIONS):
        headers = {
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "v5.channel.k8s.io",
        }  # fmt: skip
        sock, _, _ = wire.upgrade(harness.exec_url("wait", stdin=True), headers, "GET")
        socks.append(sock)
    eventually(lambda: harness.runtime.running == SESSIONS, "all commands run")
    assert threading.active_count() - threads == 2 * SESSIONS
    assert resident_kib() - memory_kib < 100 * SESSIONS
    print(f"{(resident_kib() - memory_kib) / SESSIONS:.0f} KiB a session")
    for sock in socks:
        sock.close()
    eventually(lambda: harness.sessions() == 0, "all sessions are over", 20)
    eventually(lambda: threading.active_count() <= threads, "threads are back to the start", 20)
    eventually(lambda: open_descriptors() <= descriptors_, "descriptors are back to the start")
