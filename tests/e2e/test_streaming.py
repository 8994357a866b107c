"""Exec, attach and port-forward of real containers, as crictl and other clients use them, over both transports.

With ``SHIM_TEST_LONG=1`` a thousand sessions that break off in every way; otherwise enough to notice what is broken.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import tarfile
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from shim_porto_runtime.linux import CLONE_NEWNET, in_thread, setns

from porto_api import Client
from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull, require_crictl
from tests.e2e.pods import Pods, until
from tests.streaming import chaos
from tests.streaming.pods import Pod, echo
from tests.streaming.spdy_client import SpdyCommand
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root
LONG = bool(os.environ.get("SHIM_TEST_LONG"))
MB = 1_000_000
ECHO_PORT, CLOSED_PORT = 9000, 9001
ECHO = ("nc", "-ll", "-p", str(ECHO_PORT), "-e", "cat")
TRANSPORTS = pytest.mark.parametrize("transport", ["spdy", "websocket"])
PATIENCE_S = 60.0
CLIENTS = 12
"""At once, of a thousand."""
_CHUNK = 1 << 20


@pytest.fixture(autouse=True)
def _needs_crictl() -> None:
    require_crictl()


@pytest.fixture(scope="module")
def bulk() -> Iterator[tuple[IO[bytes], str]]:
    """100 MB that don't repeat, and their digest."""
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        for _ in range(100):
            block = os.urandom(MB)
            digest.update(block)
            file.write(block)
        file.flush()
        yield file, digest.hexdigest()


def digest_of(read: Callable[[int], bytes]) -> str:
    digest = hashlib.sha256()
    while data := read(_CHUNK):
        digest.update(data)
    return digest.hexdigest()


# -- exec --------------------------------------------------------------------------------------------------------------


@TRANSPORTS
def test_100_mb_through_exec(pods: Pods, node: Node, bulk: tuple[IO[bytes], str], transport: str) -> None:
    container = pods.container(pods.run())
    file, expected = bulk
    file.seek(0)
    command = node.crictl_command("exec", "--transport", transport, "-i", container, "cat")
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert digest_of(process.stdout.read) == expected
    assert process.returncode == 0


# 128+n is what a shell ends with whose command has died of signal n; portod takes 162+n for a core dump.
@pytest.mark.parametrize("code", [0, 1, 126, 127, 128, 129, 137, 143, 162, 163, 164, 171, 177, 191, 195, 196, 255])
def test_exit_codes(pods: Pods, node: Node, code: int) -> None:
    """Of a container's command, of ExecSync, and of a streamed exec."""
    sandbox = pods.run()
    container = pods.container(sandbox, "sh", "-c", f"while [ ! -e /dev/shm/end ]; do sleep 0.01; done; exit {code}")
    assert pods.exec(container, "sh", "-c", f"exit {code}").exit_code == code
    client = SpdyCommand(NodeUrls(node, sandbox, container).exec_url("sh", "-c", f"exit {code}"))
    assert client.exit_code(PATIENCE_S) == code
    pods.shell(container, "touch /dev/shm/end")
    assert pods.exited(container).exit_code == code


@TRANSPORTS
def test_a_terminal_of_the_clients_size(pods: Pods, node: Node, transport: str) -> None:
    """crictl sits on a terminal of ours; its size, and what is typed, reach the one in the container."""
    container = pods.container(pods.run())
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 101, 0, 0))
    script = "tty; while [ \"$(stty size)\" != '41 101' ]; do sleep 0.05; done; read line; echo sized $line; exit 3"
    command = node.crictl_command("exec", "--transport", transport, "-i", "-t", container, "sh", "-c", script)
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        os.write(master, b"typed\n")
        seen = b"".join(_until_closed(master))
        os.close(master)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert re.search(rb"/dev/(pts/\d+|console)\r\n", seen), seen
    assert b"sized typed\r\n" in seen
    assert b"exit code 3" in errors


def _until_closed(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            return  # its other end is closed
        if not data:
            return
        yield data


@TRANSPORTS
def test_copying_as_kubectl_does(pods: Pods, node: Node, transport: str) -> None:
    """`kubectl cp` is a tar through exec, in and out again."""
    container = pods.container(pods.run())
    content = os.urandom(3 * MB)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("dir/file")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    options = ("exec", "--transport", transport, "-i", container)
    into = node.crictl_command(*options, "tar", "xmf", "-", "-C", "/tmp")
    subprocess.run(into, input=packed.getvalue(), check=True, timeout=PATIENCE_S, capture_output=True)
    out = node.crictl_command("exec", "--transport", transport, container, "tar", "cf", "-", "-C", "/tmp", "dir")
    done = subprocess.run(out, check=True, timeout=PATIENCE_S, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        unpacked = tar.extractfile("dir/file")
        assert unpacked is not None
        assert unpacked.read() == content


@TRANSPORTS
def test_the_exec_is_the_containers_user(pods: Pods, crictl: Callable[..., str], transport: str) -> None:
    """User, groups, environment, directory and capabilities are the container's, not the daemon's."""
    config = pods.config()
    context = pb.LinuxContainerSecurityContext(
        run_as_user=pb.Int64Value(value=1000), run_as_group=pb.Int64Value(value=100), supplemental_groups=[200, 3000]
    )
    container = pods.container(
        pods.run(config),
        "sh",
        "-c",
        "grep CapBnd /proc/self/status; exec sleep 1000",
        envs=[pb.KeyValue(key="MARK", value=b"a b=c")],
        working_dir="/dev/shm",
        linux=pb.LinuxContainerConfig(security_context=context),
    )
    script = 'id -u; id -g; id -G; pwd; echo "$MARK"; grep CapEff /proc/self/status; grep CapBnd /proc/self/status'
    mine = crictl("exec", "--transport", transport, container, "sh", "-c", script).splitlines()
    assert mine[:2] == ["1000", "100"]
    assert sorted(map(int, mine[2].split())) == [100, 200, 3000]
    assert mine[3:6] == ["/dev/shm", "a b=c", "CapEff:\t0000000000000000"]
    assert mine[6] == pods.log(container).strip()


# -- attach ------------------------------------------------------------------------------------------------------------


@TRANSPORTS
def test_attach_carries_everything_both_ways(pods: Pods, node: Node, transport: str) -> None:
    content = os.urandom(3 * MB)
    script = "sha256sum; echo err >&2"
    container = pods.container(pods.run(), "sh", "-c", script, stdin=True, stdin_once=True)
    done = subprocess.run(
        node.crictl_command("attach", "--transport", transport, "-i", container),
        input=content, capture_output=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    assert done.stdout.split()[0].decode() == hashlib.sha256(content).hexdigest()
    assert b"err\n" in done.stderr
    assert pods.exited(container).exit_code == 0


# -- port-forward ------------------------------------------------------------------------------------------------------


@contextmanager
def forwarding(node: Node, transport: str, sandbox: str, port: int) -> Iterator[int]:
    """crictl port-forward; the local port."""
    process = node.crictl_process("port-forward", "--transport", transport, sandbox, f":{port}")
    try:
        assert process.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+) ->", process.stdout.readline())
        assert found, process.stderr and process.stderr.read()
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


@TRANSPORTS
@pytest.mark.parametrize("host_network", [False, True], ids=["pod", "host"])
def test_100_mb_through_port_forward(
    pods: Pods, node: Node, bulk: tuple[IO[bytes], str], transport: str, host_network: bool
) -> None:
    """The client ends its side, and only then does the pod answer the rest: half-closes are kept."""
    config = pods.config()
    if host_network:
        config.linux.security_context.namespace_options.network = pb.NODE
    sandbox = pods.run(config)
    container = pods.container(sandbox, *ECHO)
    until(lambda: listens(pods, container))
    file, expected = bulk
    with forwarding(node, transport, sandbox, ECHO_PORT) as port, connected(port) as sock:

        def send() -> None:
            file.seek(0)
            sock.sendfile(file)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert digest_of(sock.recv) == expected
        sender.join()


def listens(pods: Pods, container: str) -> bool:
    """Whether the echo server is there yet."""
    wanted = f":{ECHO_PORT:04X} "
    return any(wanted in line and " 0A " in line for line in pods.shell(container, "cat /proc/net/tcp*").splitlines())


@TRANSPORTS
def test_many_connections_of_one_forward(pods: Pods, node: Node, transport: str) -> None:
    sandbox = pods.run()
    container = pods.container(sandbox, *ECHO)
    until(lambda: listens(pods, container))
    with forwarding(node, transport, sandbox, ECHO_PORT) as port:
        socks = []
        for number in range(30):
            socks.append(connected(port))
            # Busybox's server takes no more than two that wait.
            socks[-1].sendall(b"%d\n" % number)
            assert received(socks[-1], 1) == (b"%d\n" % number)[:1]
        for number, sock in reversed(list(enumerate(socks))):
            with sock:
                sock.sendall(b"%d" % number * 1000)
                sock.shutdown(socket.SHUT_WR)
                assert received(sock) == (b"%d\n" % number)[1:] + b"%d" % number * 1000


def received(sock: socket.socket, size: int = 1 << 30) -> bytes:
    """So many bytes, or all there are."""
    data = b""
    while len(data) < size and (more := sock.recv(min(size - len(data), 65536))):
        data += more
    return data


@TRANSPORTS
def test_a_port_where_nobody_listens(pods: Pods, node: Node, transport: str) -> None:
    sandbox = pods.run()
    process = node.crictl_process("port-forward", "--transport", transport, sandbox, f":{CLOSED_PORT}")
    assert process.stdout is not None
    found = re.search(r"127\.0\.0\.1:(\d+) ->", process.stdout.readline())
    assert found
    with connected(int(found[1])) as sock:
        sock.sendall(b"x")
        try:
            assert sock.recv(10) == b""
        except ConnectionResetError:
            pass
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert "onnection refused" in errors


# -- many --------------------------------------------------------------------------------------------------------------


@contextmanager
def echoing(netns_path: str) -> Iterator[Pod]:
    """An echo server in a network namespace. Busybox's nc would let two wait, and the kernel resets the others."""

    def make() -> Pod:
        setns(netns_path, CLONE_NEWNET)
        return Pod(echo)

    server = in_thread(make)
    try:
        yield server
    finally:
        server.close()


class NodeUrls:
    """Asks a node for sessions in one container, and in its sandbox."""

    def __init__(self, node: Node, sandbox: str, container: str) -> None:
        self._cri = node.cri
        self._sandbox = sandbox
        self._container = container

    def state(self) -> dict[str, Any]:
        """What the streaming server says about itself."""
        state: dict[str, Any] = json.loads(self._cri.Status(pb.StatusRequest(verbose=True)).info["streaming"])
        return state

    @property
    def base_url(self) -> str:
        return str(self.state()["baseURL"])

    @property
    def netns_path(self) -> str:
        """The pod's network namespace."""
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=self._sandbox, verbose=True)
        info = json.loads(self._cri.PodSandboxStatus(request).info["info"])
        return str(info["network"]["netns_path"])

    def exec_url(self, *command: str, **fields: Any) -> str:
        fields = {"stdout": True, "stderr": not fields.get("tty", False), **fields}
        request = pb.ExecRequest(cmd=command, container_id=self._container, **fields)
        return str(self._cri.Exec(request).url)

    def forward_url(self) -> str:
        return str(self._cri.PortForward(pb.PortForwardRequest(pod_sandbox_id=self._sandbox)).url)


@pytest.mark.timeout(1800 if LONG else 300)
def test_a_thousand_sessions(registry: LocalRegistry, tmp_path: Path) -> None:
    """Nothing stays of any: no session, thread or descriptor of the daemon, no process, no container of Porto's."""
    (tmp_path / "node").mkdir()
    with Node(tmp_path / "node", registry=registry) as own:
        pods = Pods(own, pull(own, f"{registry.address}/public/busybox:1"))
        sandbox = pods.run()
        container = pods.container(sandbox)
        urls = NodeUrls(own, sandbox, container)

        def used() -> tuple[int, int]:
            return len(os.listdir(f"/proc/{own.pid}/fd")), len(os.listdir(f"/proc/{own.pid}/task"))

        def processes() -> list[str]:
            return sorted(pods.shell(container, "cd /proc; for p in [0-9]*; do cat $p/comm; done 2>/dev/null").split())

        def run(sessions: int) -> None:
            assert chaos.run(urls, server.port, CLOSED_PORT, sessions, CLIENTS, PATIENCE_S).total() >= sessions
            until(lambda: urls.state()["sessions"], lambda now: now == 0, PATIENCE_S)
            until(lambda: all(sock.fileno() < 0 for sock in server.connections), timeout_s=PATIENCE_S)
            until(lambda: containers_of(own), lambda now: now == before_porto, PATIENCE_S)
            until(processes, lambda now: now == before, PATIENCE_S)

        # portod removes what ran there when it notices that its client has gone.
        before_porto = until(lambda: containers_of(own), lambda now: len(now) == 3)
        before = processes()
        with echoing(urls.netns_path) as server:
            run(36)
            before_used = used()
            run(1000 if LONG else 72)
            # Pools grow to what was needed at once, and stay: a thread for each call, 16 connections to Porto.
            until(
                used, lambda now: all(n <= b + 2 * CLIENTS for n, b in zip(now, before_used, strict=True)), PATIENCE_S
            )
        pods.remove_all()


def containers_of(node: Node) -> list[str]:
    with Client(node.porto_socket or str(node.directory / "porto.sock")) as porto:
        return sorted(porto.list_containers())
