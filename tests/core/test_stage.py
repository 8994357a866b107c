"""The stage that root tests run on."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import stage

pytestmark = pytest.mark.root

STAGE = [sys.executable, "-m", "tools.stage"]


def test_gives_the_exit_status_back(pytestconfig: pytest.Config) -> None:
    result = subprocess.run([*STAGE, "sh", "-c", "exit 7"], cwd=pytestconfig.rootpath, check=False)
    assert result.returncode == 7


def test_kill_9_takes_processes_mounts_and_namespaces_along(pytestconfig: pytest.Config) -> None:
    script = "ip netns add gone; mount -t tmpfs x /mnt; sleep 1000 & echo $!; echo ready; wait"
    with subprocess.Popen(
        [*STAGE, "sh", "-c", script], cwd=pytestconfig.rootpath, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            pass
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        # The pipe closes when the last process that holds it ends.
        assert process.stdout.read() == ""
    assert "gone" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert children
    # A process closes its files some moments before it has ended.
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lock_that_another_stage_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages start at once: the one that cleans up may come between the other's making a lock and locking it."""
    monkeypatch.setattr(stage, "LOCK_DIRECTORY", tmp_path)
    lock, taken = fcntl.flock, list[int]()

    def late(fd: int, operation: int) -> None:
        if not taken:
            (path,) = tmp_path.iterdir()
            path.unlink()
        taken.append(fd)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    name, fd = stage._claim_name()
    os.close(fd)
    assert len(taken) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
