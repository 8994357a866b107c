"""``make demo``: every step goes well and nothing stays, also after it was killed in its middle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tools import stage

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif("PORTO_SOCKET" in os.environ, reason="the demonstration brings its own Porto"),
]
COMMAND = [sys.executable, "-m", "tools.stage", sys.executable, "-m", "tools.demo"]
STEPS = ("pull", "runp", "inspectp", "create", "start", "logs", "exec", "stop", "rm", "stopp", "rmp", "rmi")


def machine() -> dict[str, set[str]]:
    """What a pod may leave behind."""
    return {
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "network namespaces": {path.name for path in Path("/run/netns").iterdir()},
        "leases": {str(path) for path in Path("/var/lib/cni").rglob("*")},
        "links": {name for _, name in socket.if_nameindex()},
        "processes": {path.name for path in Path("/proc").iterdir() if path.name.isdecimal()},
    }


def stages_of(pid: int) -> list[Path]:
    """cgroups and locks of the stage a process has made."""
    pattern = f"{stage.CGROUP_PREFIX}{pid}-*"
    return [*Path("/sys/fs/cgroup").glob(f"*/{pattern}"), *stage.LOCK_DIRECTORY.glob(pattern)]


def test_it_leaves_nothing_killed_or_not() -> None:
    before = machine()
    killed = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
    with killed:
        assert killed.stdout is not None
        assert any("start" in line for line in iter(killed.stdout.readline, "") if "crictl" in line)
        killed.send_signal(signal.SIGKILL)
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as whole:
        output, _ = whole.communicate()
    assert whole.returncode == 0, output
    for step in STEPS:
        assert f" {step} " in output
    assert "A pod has come and gone." in output
    # What earlier tests have left to the kernel to take away may go meanwhile.
    assert {kind: found - before[kind] for kind, found in machine().items()} == {kind: set() for kind in before}
    assert stages_of(killed.pid) == []
    assert stages_of(whole.pid) == []
