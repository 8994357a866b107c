"""crictl itself against a CRI socket, over both of its transports."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim_core.dispatch import Dispatcher
from shim_core.server import Server
from tests.streaming.harness import Harness, eventually
from tests.streaming.local_runtime import CONTAINER, SANDBOX, Container
from tests.streaming.pods import Pods, closed_port, echo

TOOL = shutil.which("crictl", path=f"{Path(__file__).parent.parent / 'tools' / 'bin'}{os.pathsep}{os.environ['PATH']}")
ATTACHED = "a" * 64

pytestmark = pytest.mark.skipif(TOOL is None, reason="needs crictl: `make test` builds it")
TRANSPORTS = pytest.mark.parametrize("transport", ["spdy", "websocket"])


class Client:
    """crictl, connected to a socket."""

    def __init__(self, path: Path) -> None:
        self._environment = {**os.environ, "CRI_CONFIG_FILE": "/dev/null", "NO_PROXY": "*"}
        self._command = [str(TOOL), "--runtime-endpoint", f"unix://{path}", "--timeout", "10s"]

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self._command, *arguments],
            input=stdin,
            capture_output=True,
            env=self._environment,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str, terminal: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._command, *arguments], env=self._environment, stdin=terminal, stdout=terminal,
            stderr=subprocess.PIPE, bufsize=0,
        )  # fmt: skip


@pytest.fixture
def harness() -> Iterator[Harness]:
    """Without a count of descriptors in the end: gRPC keeps some."""
    harness = Harness()
    yield harness
    harness.close()
    for container in harness.runtime.containers.values():
        container.close()


@pytest.fixture
def crictl(harness: Harness, tmp_path: Path) -> Iterator[Client]:
    server = Server(Dispatcher(harness.manager), str(tmp_path / "cri.sock"))
    server.start()
    yield Client(tmp_path / "cri.sock")
    server.stop(0)


def finish(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    process.terminate()
    return process.communicate(timeout=20)


@TRANSPORTS
def test_exec(crictl: Client, transport: str) -> None:
    done = crictl.run("exec", "--transport", transport, CONTAINER, "sh", "-c", "echo out; echo err >&2")
    assert (done.returncode, done.stdout) == (0, b"out\n")
    assert b"err\n" in done.stderr


@TRANSPORTS
def test_exec_exit_code(crictl: Client, transport: str) -> None:
    done = crictl.run("exec", "--transport", transport, CONTAINER, "sh", "-c", "exit 7")
    assert done.returncode != 0
    assert b"command terminated with exit code 7" in done.stderr


@TRANSPORTS
def test_exec_with_stdin(crictl: Client, transport: str) -> None:
    data = os.urandom(5_000_000)
    done = crictl.run("exec", "-i", "--transport", transport, CONTAINER, "cat", stdin=data)
    assert (done.returncode, done.stdout) == (0, data)


@TRANSPORTS
def test_exec_on_a_terminal(crictl: Client, transport: str) -> None:
    """crictl sits on a terminal of ours; its size reaches the one in the container."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 101, 0, 0))
    script = "tty; while [ \"$(stty size)\" != '41 101' ]; do sleep 0.05; done; read line; echo sized $line"
    process = crictl.start("exec", "-i", "-t", "--transport", transport, CONTAINER, "sh", "-c", script, terminal=slave)
    os.close(slave)
    os.write(master, b"typed\n")
    seen = b""
    try:
        while data := os.read(master, 65536):
            seen += data
    except OSError:
        pass  # crictl has closed its side
    os.close(master)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert re.search(rb"/dev/pts/\d+\r\n", seen)
    assert b"sized typed\r\n" in seen


@TRANSPORTS
def test_exec_of_what_is_not_there(crictl: Client, harness: Harness, transport: str) -> None:
    done = crictl.run("exec", "--transport", transport, "f" * 64, "true")
    assert b"NotFound" in done.stderr


@TRANSPORTS
def test_attach(crictl: Client, harness: Harness, transport: str) -> None:
    harness.runtime.containers[ATTACHED] = Container.run("sh")
    process = crictl.start("attach", "-i", "--transport", transport, ATTACHED)
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"echo hello\n")
    assert process.stdout.readline() == b"hello\n"
    process.stdin.write(b"exit\n")
    process.stdin.close()
    process.stdin = None
    process.communicate(timeout=20)
    assert process.returncode == 0


@TRANSPORTS
def test_port_forward(crictl: Client, pods: Pods, transport: str) -> None:
    pod, data = pods(echo), os.urandom(3_000_000)
    process = crictl.start("port-forward", "--transport", transport, SANDBOX, f":{pod.port}")
    assert process.stdout
    local = int(re.findall(rb"127.0.0.1:(\d+)", process.stdout.readline())[0])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", local), timeout=20) as sock:
            sock.sendall(data[:100_000])
            sock.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: sock.recv(65536), b"")) == data[:100_000]
    finish(process)


@TRANSPORTS
def test_port_forward_to_a_closed_port(crictl: Client, transport: str) -> None:
    process = crictl.start("port-forward", "--transport", transport, SANDBOX, f":{closed_port()}")
    assert process.stdout
    local = int(re.findall(rb"127.0.0.1:(\d+)", process.stdout.readline())[0])
    with socket.create_connection(("127.0.0.1", local), timeout=20) as sock:
        sock.sendall(b"x")
        try:
            assert sock.recv(10) == b""
        except ConnectionResetError:
            pass
    _, errors = finish(process)
    assert b"Connection refused" in errors


@TRANSPORTS
def test_a_client_that_is_killed(crictl: Client, harness: Harness, transport: str) -> None:
    process = crictl.start("exec", "-i", "--transport", transport, CONTAINER, "sleep", "60")
    eventually(lambda: harness.runtime.running == 1, "the command runs")
    process.kill()
    process.communicate()
    started = time.monotonic()
    eventually(lambda: harness.runtime.running == 0, "the command is gone")
    assert time.monotonic() - started < 10
