"""Nothing is lost: containers write at full speed while everything around them is killed, replaced and rotated."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from shim_porto_runtime.keeper import KeeperClient, client, connection
from shim_porto_runtime.keeper.journal import Claim

from shim_core import errors
from tests.keeper.conftest import Node, eventually, is_gone


def test_the_worker_is_killed_again_and_again(node: Node) -> None:
    check = node.write_numbers(pause_s=0.0)
    for _ in range(5):
        node.kill_worker()
    check()


def test_the_holder_is_killed_again_and_again(node: Node) -> None:
    check = node.write_numbers()
    for _ in range(10):
        node.kill_holder()
    node.kill_worker()
    check()


def test_worker_and_holder_take_turns_in_dying(node: Node) -> None:
    check = node.write_numbers()
    for _ in range(6):
        node.kill_worker()
        node.kill_holder()
    assert node.client.list()[0].running
    assert node.stats.descriptors < 40
    check()


def test_handed_over_again_and_again(node: Node) -> None:
    check = node.write_numbers()
    for _ in range(5):
        before = node.stats
        node.client.hand_over()
        after = node.stats
        assert {after.pid, after.holder_pid}.isdisjoint({before.pid, before.holder_pid})
        assert after.descriptors <= before.descriptors
        for pid in (before.pid, before.holder_pid):
            eventually(partial(is_gone, pid))
    check()


def test_everything_at_once(node: Node) -> None:
    """Shims come and go, the keeper is killed and handed over, logs are rotated, and three containers write."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    ids = ["a", "b", "c"]
    checks = [node.write_numbers(container_id, pause_s=0.005) for container_id in ids]
    ended = threading.Event()

    def rotate() -> None:
        while not ended.wait(0.15):
            for container_id in ids:
                node.rotate(container_id)

    rotator = threading.Thread(target=rotate)
    rotator.start()
    shims = [shim(node) for _ in range(2)]
    try:
        for _ in range(12):
            rng.choice([node.kill_worker, node.kill_holder, node.client.hand_over])()
            victim = shims.pop(0)
            victim.kill()
            victim.wait()
            shims.append(shim(node))
    finally:
        ended.set()
        rotator.join(60)
        for process in shims:
            process.kill()
            process.wait()
    for check in checks:
        check()


def shim(node: Node) -> subprocess.Popen[bytes]:
    """A shim that asks the keeper all the time, to be killed."""
    program = (
        "import sys; from shim_porto_runtime.keeper import KeeperClient as K; k = K(sys.argv[1])\n"
        "while True: k.flush('a'); k.list()"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(node.directory)], stderr=subprocess.DEVNULL)


def test_as_kubelet_does(node: Node) -> None:
    """20 shims killed, 5 hand-overs, 2 kills of the keeper, and rotations all the time."""
    check = node.write_numbers()
    ended = threading.Event()

    def rotate() -> None:
        while not ended.wait(0.2):
            node.rotate()

    rotator = threading.Thread(target=rotate)
    rotator.start()
    for number in range(20):
        victim = shim(node)
        if number % 4 == 0:
            node.client.hand_over()
        if number in (7, 14):
            node.kill_worker()
        time.sleep(0.2)
        victim.kill()
        victim.wait()
    ended.set()
    rotator.join()
    check()


# -- hand-overs that don't come to their end ---------------------------------------------------------------------------


def test_a_successor_that_vanishes_changes_nothing(node: Node) -> None:
    check = node.write_numbers()
    before = node.stats
    for answers in range(4):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as successor:
            successor.connect(str(node.directory / "keeper.sock"))
            successor.send(json.dumps({"v": 1, "op": "hand-over", "format": 1}).encode())
            for _ in range(answers):
                successor.recv(65536)
    node.client.flush("c")
    assert (node.stats.pid, node.stats.holder_pid) == (before.pid, before.holder_pid)
    check()


@pytest.mark.parametrize("victim", ["pid", "holder_pid"])
def test_an_older_keeper_killed_in_a_hand_over_goes_on(node: Node, victim: str) -> None:
    check = node.write_numbers()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as successor:
        successor.connect(str(node.directory / "keeper.sock"))
        successor.send(json.dumps({"v": 1, "op": "hand-over", "format": 1}).encode())
        _, fds, _, _ = socket.recv_fds(successor, 65536, 16)
        before_kill = node_pids(node)
        os.kill(before_kill[victim], signal.SIGKILL)
    eventually(lambda: node.client.stats() is not None)
    node.client.flush("c")
    assert not Claim(fds[2]).take(1), "the offer has been taken back"
    for fd in fds:
        os.close(fd)
    check()


def node_pids(node: Node) -> dict[str, int]:
    """The keeper's processes, found without asking it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, line = (path / "comm").read_text().strip(), (path / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name in ("keeper", "keeper-holder") and str(node.directory) in line.split("\0"):
            found["pid" if name == "keeper" else "holder_pid"] = int(path.name)
    return found


def test_kills_at_any_moment_of_a_hand_over(node: Node) -> None:
    """Whoever is killed, one keeper remains, and it has everything."""
    check = node.write_numbers()
    rng = random.Random(7)
    for _ in range(8):
        hand_over = threading.Thread(target=try_hand_over, args=(node.client,))
        hand_over.start()
        time.sleep(rng.random() * 0.15)
        pids = list(node_pids(node).values())
        os.kill(rng.choice(pids), signal.SIGKILL)
        hand_over.join(30)
        eventually(lambda: node.client.stats() is not None)
        node.client.flush("c")
        eventually(lambda: running_keepers(node) == 2)
    check()


def try_hand_over(client: KeeperClient) -> None:
    try:
        client.hand_over(timeout_s=20)
    except errors.ShimError:
        pass


def running_keepers(node: Node) -> int:
    return sum(
        str(node.directory) in path.read_text().split("\0")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if still_there(path)
    )


def still_there(path: Path) -> bool:
    try:
        return bool(path.read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_hand_over_carries_everything(node: Node) -> None:
    streams = node.open(stdin=True, stdin_once=True)
    terminal = node.open("t", tty=True, stdin=True)
    ended = node.open("ended")
    ended.close()
    os.write(streams.stdout, b"an unfinished ")
    os.write(streams.stderr, b"e" * 16384)
    eventually(lambda: not next(s for s in node.client.list() if s.id == "ended").running)
    before = node.client.list()
    node.client.hand_over()
    assert node.client.list() == before
    os.write(streams.stdout, b"line\n")
    os.write(streams.stderr, b"\n")
    node.client.resize("t", 100, 30)
    os.write(terminal.stdout, b"on the terminal")
    node.client.flush("c")
    node.client.flush("t")
    assert node.log().read_bytes().count(b" P ") == 0, "lines go on as if nothing had been"
    assert node.read() == {"stdout": b"an unfinished line\n", "stderr": b"e" * 16384 + b"\n"}
    assert node.read("t")["stdout"] == b"on the terminal"
    node.client.close_stdin("c")
    assert os.read(streams.stdin or -1, 1) == b""
    streams.close()
    terminal.close()


def test_sessions_go_on_with_the_successor(node: Node) -> None:
    process = node.run(node.open(stdin=True, stdin_once=True), "cat")
    out_reading, out_writing = os.pipe()
    in_reading, in_writing = os.pipe()
    thread = threading.Thread(
        target=node.client.attach, args=("c",), kwargs={"stdin": in_reading, "stdout": out_writing}
    )
    thread.start()
    eventually(lambda: node.stats.clients == 1)
    data = os.urandom(600_000)  # more than the pipes hold: some of it waits in the keeper
    feeder = threading.Thread(target=write_all, args=(in_writing, data))
    feeder.start()
    for _ in range(3):
        node.client.hand_over()
        assert node.stats.clients == 1
    read = b""
    while len(read) < len(data):
        read += os.read(out_reading, 65536)
    assert read == data
    feeder.join(60)
    os.close(in_writing)
    assert process.wait(60) == 0
    thread.join(60)
    assert not thread.is_alive()
    for fd in (out_reading, out_writing, in_reading):
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data[:4096]) :]


def test_nobody_to_take_over_from(node: Node) -> None:
    with pytest.raises(errors.FailedPrecondition):
        node.client.hand_over()


def test_what_runs_is_compared_with_what_is_installed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert node.client.is_current()
    node.client.ensure_running()
    assert node.client.is_current()
    for module in (client, connection):
        monkeypatch.setattr(module, "source_digest", lambda: "another")
    assert not node.client.is_current()
    before = node.stats.pid
    assert node.client.upgrade()
    assert node.client.is_current()
    assert node.stats.pid != before
    assert not node.client.upgrade()
