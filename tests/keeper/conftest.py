"""A stream keeper of its own for each test, and processes that write into it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shim_porto_runtime.keeper import ContainerStreams, KeeperClient, KeeperStats

from tests.keeper import crirecords

WRITER = """
import os, sys, time
stop, pause, number = sys.argv[1], float(sys.argv[2]), 0
while not os.path.exists(stop):
    lines = b"".join(b"%d\\n" % n for n in range(number, number + 500))
    number += 500
    while lines:
        lines = lines[os.write(1, lines):]
    if pause:
        time.sleep(pause)
sys.stderr.write(f"wrote {number}\\n")
"""
"""Writes numbered lines until a file appears, then says on stderr how many. With a pause of 0 as fast as it can."""


def eventually(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it hasn't happened in time"
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Whether a process has ended and been reaped."""
    return not Path(f"/proc/{pid}").exists()


class Node:
    """A keeper, a directory for logs, and what runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path / "keeper"
        self.logs = path / "pods"
        self.client = KeeperClient(self.directory, idle_exit_s=30.0)
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def stats(self) -> KeeperStats:
        stats = self.client.stats()
        assert stats is not None
        return stats

    def open(self, container_id: str = "c", **options: bool) -> ContainerStreams:
        return self.client.open(container_id, log_directory=str(self.logs), log_path=f"{container_id}/0.log", **options)

    def log(self, container_id: str = "c") -> Path:
        return self.logs / container_id / "0.log"

    def read(self, container_id: str = "c") -> dict[str, bytes]:
        """The streams of a container over all files of its log, oldest first."""
        rotated = sorted(self.log(container_id).parent.glob("0.log.*"), key=lambda path: int(path.suffix[1:]))
        return crirecords.read(*rotated, self.log(container_id))

    def rotate(self, container_id: str = "c") -> None:
        """What kubelet does with a log that is too long."""
        log = self.log(container_id)
        count = len(list(log.parent.glob("0.log.*")))
        log.rename(log.with_name(f"0.log.{count + 1}"))
        self.client.reopen(container_id)

    def run(self, streams: ContainerStreams, *command: str) -> subprocess.Popen[bytes]:
        """Run a command as a container; its streams are then its own."""
        process = subprocess.Popen(
            command,
            stdin=streams.stdin if streams.stdin is not None else subprocess.DEVNULL,
            stdout=streams.stdout,
            stderr=streams.stderr,
            start_new_session=True,
        )
        streams.close()
        self.processes.append(process)
        return process

    def python(self, streams: ContainerStreams, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self.run(streams, sys.executable, "-c", program, *arguments)

    def write_numbers(self, container_id: str = "c", pause_s: float = 0.002) -> Callable[[], None]:
        """Run a container that writes numbered lines: hundreds of thousands a second, without a pause some millions.

        :returns: ends it, and checks that each of its numbers is in the log once, and in order.
        """
        stop = self.path / f"stop-{container_id}"
        process = self.python(self.open(container_id), WRITER, str(stop), str(pause_s))

        def stop_and_check() -> None:
            eventually(lambda: self.log(container_id).stat().st_size > 0)
            stop.touch()
            assert self.finished(process, container_id) == 0, "EPIPE or SIGPIPE would have ended it"
            text = self.read(container_id)
            wrote = int(text["stderr"].split()[1])
            found = [int(line) for line in text["stdout"].splitlines()]
            assert len(found) == wrote
            assert found == list(range(wrote))

        return stop_and_check

    def kill_worker(self) -> None:
        """kill -9, and wait until another does its work."""
        before = self.stats
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: self.stats.pid != before.pid)

    def kill_holder(self) -> None:
        before = self.stats
        os.kill(before.holder_pid, signal.SIGKILL)
        eventually(lambda: self.stats.holder_pid != before.holder_pid)

    def finished(self, process: subprocess.Popen[bytes], container_id: str = "c") -> int:
        """The exit status of a container whose output is in its log."""
        status = process.wait(60)
        self.client.flush(container_id)
        return status

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stats = self.client.stats()
        self.client.stop(force=True)
        if stats is not None:
            eventually(lambda: not Path(f"/proc/{stats.pid}").exists())
            eventually(lambda: not Path(f"/proc/{stats.holder_pid}").exists())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()
