"""A thousand sessions: those that end tell the right exit code, and nothing stays of any."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator

import pytest

from shim_core.context import CallContext
from shim_core.types import ExecSession
from tests.streaming import chaos, wire
from tests.streaming.conftest import open_descriptors, streaming_threads
from tests.streaming.harness import Harness, eventually
from tests.streaming.pods import Pods, closed_port, echo
from tests.streaming.spdy_client import SpdyCommand

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


def test_a_thousand_sessions(serve: Serve, pods: Pods) -> None:
    harness, pod, closed = serve(), pods(echo), closed_port()
    chaos.Chaos(harness, pod.port, closed, 0).case_exit_code()
    eventually(lambda: harness.sessions() == 0, "the first is over")
    eventually(lambda: open_descriptors() < 100, "its descriptors are closed")
    before_threads, before_descriptors = len(streaming_threads()), open_descriptors()
    before_all_threads = threading.active_count()
    done = chaos.run(harness, pod.port, closed, SESSIONS, WORKERS, wire.TIMEOUT_S)
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
