"""A disk that is really full: a small tmpfs, filled up and freed again under a container that writes."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim_core import errors
from tests.keeper import crirecords
from tests.keeper.conftest import Node, eventually

pytestmark = pytest.mark.root


@pytest.fixture
def small_disk(node: Node) -> Iterator[Path]:
    node.logs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "small", str(node.logs)], check=True)
    yield node.logs
    node.close()
    subprocess.run(["umount", str(node.logs)], check=True)


def test_a_full_disk_never_blocks_the_container_and_the_log_recovers(node: Node, small_disk: Path) -> None:
    paused, go_on = node.path / "paused", node.path / "go-on"
    wait = f"touch {paused}; while [ ! -e {go_on} ]; do sleep 0.01; done"
    container = node.run(node.open(), "sh", "-c", f"seq 1 1000000; {wait}; echo again; seq 1 9")
    eventually(paused.exists)
    node.client.flush("c")
    full = node.read()["stdout"]
    lines = full.splitlines()
    assert lines == [b"%d" % number for number in range(1, len(lines) + 1)], "what fitted is whole, and in order"
    dropped = node.client.list()[0].dropped_bytes
    assert dropped == sum(len(b"%d\n" % number) for number in range(1, 1_000_001)) - len(full)
    node.log().unlink()  # an administrator, or kubelet's garbage collection
    node.client.reopen("c")
    go_on.touch()
    assert node.finished(container) == 0
    assert node.read()["stdout"] == b"again\n" + b"".join(b"%d\n" % number for number in range(1, 10))
    assert node.client.list()[0].dropped_bytes == dropped


def test_a_full_disk_does_not_stop_the_logs_of_others(node: Node, small_disk: Path, tmp_path: Path) -> None:
    node.run(node.open(), "yes", "x" * 200)
    other = node.client.open("other", log_directory=str(tmp_path / "elsewhere"), log_path="0.log")
    process = node.run(other, "seq", "1", "100000")
    assert node.finished(process, "other") == 0
    text = crirecords.read(tmp_path / "elsewhere/0.log")["stdout"]
    assert text == b"".join(b"%d\n" % number for number in range(1, 100_001))


def test_killed_with_a_full_disk(node: Node, small_disk: Path) -> None:
    container = node.run(node.open(), "yes", "x" * 200)
    eventually(lambda: node.client.list()[0].dropped_bytes > 0)
    before = node.client.list()[0].dropped_bytes
    node.kill_worker()
    assert node.client.list()[0].dropped_bytes >= before, "the count outlives the worker, too"
    container.kill()  # what is written while the disk is full is there in parts until it is taken back
    node.finished(container)
    *lines, last = crirecords.read(node.log())["stdout"].splitlines()
    assert set(lines) == {b"x" * 200}
    assert set(last) == set(b"x"), "it was killed somewhere in a line"


def test_a_container_cannot_be_opened_on_a_full_disk(node: Node, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"")
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:  # noqa: PT012
        while True:
            filler.write(bytes(65536))
    subprocess.run(["mount", "-o", "remount,nr_inodes=3", str(small_disk)], check=False)
    with pytest.raises(errors.ResourceExhausted):
        node.client.open("c", log_directory=str(small_disk), log_path="a/b/c/0.log")
    assert not node.client.list()


def test_attached_clients_see_what_the_disk_has_no_room_for(node: Node, small_disk: Path) -> None:
    output = (node.path / "attached").open("wb")
    streams = node.open()
    thread = threading.Thread(target=node.client.attach, args=("c",), kwargs={"stdout": output.fileno()})
    thread.start()
    eventually(lambda: node.client.list()[0].clients == 1)
    node.run(streams, "seq", "1", "300000")
    thread.join(60)
    output.close()
    assert (node.path / "attached").read_bytes() == b"".join(b"%d\n" % number for number in range(1, 300_001))
    assert node.client.list()[0].dropped_bytes > 0
