"""The stage that root tests run on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
        # The pipe closes when the last process that holds it has ended: no sleep is needed to know it.
        assert process.stdout.read() == ""
    assert "gone" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert children
    assert not [pid for pid in children if _alive(pid)]


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
