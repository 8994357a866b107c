"""What containers write, while everything around them comes and goes, read as kubelet and crictl read it.

With ``SHIM_TEST_LONG=1`` as often and as much as the keeper has to stand; otherwise enough to notice what is broken.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from shim_porto_runtime.keeper import KeeperClient

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.conftest import pull, require_crictl
from tests.e2e.pods import Pods, until
from tools.node import Node
from tools.registry import LocalRegistry

pytestmark = pytest.mark.root
LONG = bool(os.environ.get("SHIM_TEST_LONG"))
NUMBERS = "i=0; while [ ! -e /dev/shm/stop ]; do seq $i $((i + 49999)); i=$((i + 50000)); done; echo end"
_PIECE_BYTES = 64 << 10


@pytest.fixture
def own(registry: LocalRegistry, tmp_path: Path) -> Iterator[Node]:
    """A node of the test's own, to be killed."""
    made = Node(tmp_path / "node", registry=registry)
    made.directory.mkdir()
    made.start()
    yield made
    if not made.running:
        made.start()
    made.remove_pods()
    made.close()


class Rotation:
    """Rotates a log every second as kubelet does, and checks what was in each file: numbers, each once, in order."""

    def __init__(self, node: Node, container: str, log: Path) -> None:
        self._node = node
        self._container = container
        self._log = log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        self.next = 0
        self.files = 0

    def __enter__(self) -> Rotation:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._ended.wait(1.0):
                self._rotate()
        except BaseException as err:
            self._error = err

    def _rotate(self) -> None:
        rotated = self._log.with_suffix(".rotated")
        self._log.rename(rotated)
        try:
            request = pb.ReopenContainerLogRequest(container_id=self._container)
            self._node.cri.ReopenContainerLog(request, timeout=60)
        except grpc.RpcError as err:
            assert err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), err
            # The call may have been carried out all the same: then the new file goes on, and both are read in order.
            if not self._log.exists():
                rotated.rename(self._log)
                return
        self.read(rotated)
        rotated.unlink()

    def read(self, path: Path) -> list[bytes]:
        """Check a file; what else than numbers is in it.

        Piece by piece, many lines at a step: what isn't read as fast as the container writes grows without end, and a
        step that takes long holds up the other threads.
        """
        others: list[bytes] = []
        self.files += 1
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES) + file.readline():
                others += self._check(path, piece[: piece.rfind(b"\n") + 1].split())
        return others

    def _check(self, path: Path, fields: list[bytes]) -> list[bytes]:
        """Check the fields of whole records, four each."""
        texts = fields[3::4]
        assert fields[1::4].count(b"stdout") == fields[2::4].count(b"F") == len(texts), path
        others = [text for text in texts if not text.isdigit()]
        numbers = [int(text) for text in texts if text.isdigit()]
        expected = range(self.next, self.next + len(numbers))
        if numbers != list(expected):
            found, wanted = next(pair for pair in zip(numbers, expected, strict=True) if pair[0] != pair[1])
            pytest.fail(f"{path}: {found} where {wanted} was to be")
        self.next = expected.stop
        return others


def test_numbered_lines_while_shim_and_keeper_die(own: Node, registry: LocalRegistry) -> None:
    kills, hand_overs, keeper_kills = (20, 5, 2) if LONG else (4, 2, 1)
    pods = Pods(own, pull(own, f"{registry.address}/public/busybox:1"))
    sandbox = pods.run()
    container = pods.container(sandbox, "sh", "-c", NUMBERS)
    log = Path(pods.status(container).log_path)
    keeper = KeeperClient(own.directory / "state" / "keeper")
    rng = random.Random(4)
    steps = ["shim"] * kills + ["hand over"] * hand_overs + ["kill the keeper"] * keeper_kills
    rng.shuffle(steps)
    with Rotation(own, container, log) as rotation:
        for step in steps:
            time.sleep(rng.uniform(0.0, 1.0))
            if step == "shim":
                own.kill()
                own.start()
            elif step == "hand over":
                keeper.hand_over()
            else:
                stats = keeper.stats()
                assert stats is not None
                os.kill(stats.pid, signal.SIGKILL)
    pods.shell(container, "touch /dev/shm/stop")
    assert pods.exited(container).exit_code == 0
    assert rotation.read(log) == [b"end"]
    assert rotation.files > 1
    assert rotation.next % 50000 == 0


AWKWARD = (
    b"\0 nul\0\n" + b"\xff\xfe\xc3\x28 no utf-8\n" + b"cr lf\r\n" + b"x" * 16383 + b"\r\n" + b"y" * 16384 + b"\n"
    b"\n\n" + b"z" * 16385 + b"\r\n" + "ünïcödé".encode() + b"\n" + b"no newline at the end"
)


def test_awkward_bytes_through_crictl_and_the_file(pods: Pods, node: Node, tmp_path: Path) -> None:
    require_crictl()
    sandbox = pods.run()
    (tmp_path / "awkward").write_bytes(AWKWARD)
    mount = pb.Mount(host_path=str(tmp_path / "awkward"), container_path="/awkward", readonly=True)
    container = pods.container(sandbox, "cat", "/awkward", mounts=[mount])
    pods.exited(container)
    assert pods.log_bytes(container) == AWKWARD
    printed = subprocess.run(node.crictl_command("logs", container), capture_output=True, check=True).stdout
    # crictl ends the last line.
    assert printed in (AWKWARD, AWKWARD + b"\n")


def test_a_huge_line(pods: Pods, node: Node) -> None:
    require_crictl()
    size = (1 << 30) if LONG else (1 << 26)
    sandbox = pods.run()
    container = pods.container(sandbox, "sh", "-c", f"head -c {size} /dev/zero | tr '\\0' a; echo; echo end")
    pods.exited(container, 300)
    digest, length = hashlib.sha256(), 0
    with subprocess.Popen(node.crictl_command("logs", container), stdout=subprocess.PIPE) as printing:
        assert printing.stdout is not None
        while data := printing.stdout.read(1 << 20):
            digest.update(data)
            length += len(data)
    expected = hashlib.sha256()
    for _ in range(size >> 20):
        expected.update(b"a" * (1 << 20))
    expected.update(b"\nend\n")
    assert length == size + 5
    assert digest.digest() == expected.digest()
    Path(pods.status(container).log_path).unlink()


def test_attaching_and_leaving_costs_nothing(own: Node, registry: LocalRegistry) -> None:
    require_crictl()
    pods = Pods(own, pull(own, f"{registry.address}/public/busybox:1"))
    sandbox = pods.run()
    plain = pods.container(sandbox, "sh", "-c", "while :; do echo line; sleep 0.05; done", stdin=True)
    tty = pods.container(sandbox, "sh", "-c", "while :; do echo line; sleep 0.05; done", stdin=True, tty=True)
    stats = KeeperClient(own.directory / "state" / "keeper").stats()
    assert stats is not None
    processes = (own.pid, stats.pid)

    def attach(container: str, *options: str) -> None:
        ours, theirs = os.openpty() if "-t" in options else os.pipe()
        try:
            stdin = theirs if "-t" in options else subprocess.PIPE
            command = own.crictl_command("attach", *options, container)
            with subprocess.Popen(command, stdin=stdin, stdout=theirs, stderr=subprocess.PIPE) as process:
                os.close(theirs)
                assert process.stderr is not None
                heard = b""
                while b"line" not in heard and (data := os.read(ours, 100)):
                    heard += data
                process.kill()
                assert b"line" in heard, (options, process.stderr.read())
        finally:
            os.close(ours)

    def used() -> list[tuple[int, int]]:
        return [(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))) for pid in processes]

    ways: list[tuple[str, tuple[str, ...]]] = [(plain, ()), (plain, ("-i",)), (tty, ("-i",)), (tty, ("-i", "-t"))]
    for container, options in ways:
        attach(container, *options)
    before = settled(used)
    for number in range(1000 if LONG else 40):
        container, options = ways[number % len(ways)]
        attach(container, *options)
    # Threads of a pool that were not needed before may have come; never more than a handful.
    after = until(
        used, lambda now: all(n[0] <= b[0] + 2 and n[1] <= b[1] + 8 for n, b in zip(now, before, strict=True))
    )
    assert after
    for container in (plain, tty):
        assert pods.status(container).state == pb.CONTAINER_RUNNING


def settled(look: Callable[[], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """What ``look`` returns once it returns the same five times in a row."""
    same, last = 0, look()
    while same < 5:
        time.sleep(0.1)
        now = look()
        same, last = (same + 1, last) if now == last else (0, now)
    return last
