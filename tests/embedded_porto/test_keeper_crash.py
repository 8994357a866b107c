"""The keeper, or a process it has forked, killed in the middle of an operation, at moments spread over all of it.

The daemon stays. As when it is killed itself, see ``test_crash.py``, an operation has been carried out or not.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shim_embedded_porto import keeper

from porto_api import Client, errors
from tests.embedded_porto import crashing
from tests.embedded_porto.daemon import Daemon
from tests.embedded_porto.operations import OPERATIONS, clear, finish, make_pod
from tests.porto.support import eventually, run

pytestmark = pytest.mark.root

POINTS = 4
"""How many moments of each operation are tried."""

NAMES = ("create", "create a pod", "exec", "stop", "destroy a container")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counted", ["", "keeper"], ids=["by the daemon's steps", "by its own steps"])
def test_keeper(daemon: Daemon, archive: str, name: str, counted: str) -> None:
    operation = OPERATIONS[name]
    with _crashing(daemon, archive) as porto:
        make_pod(porto)
        daemon.arm(0, counted=counted)
        operation.do(porto, archive)
        calls = daemon.disarm(counted=counted)
        clear(porto)
        for point in range(POINTS):
            make_pod(porto)
            pid = daemon.keeper_pid()
            daemon.arm(1 + (calls - 1) * point // (POINTS - 1), victim=pid, counted=counted)
            _try(lambda: operation.do(porto, archive))
            daemon.disarm(counted=counted)
            _wait_for_keeper(daemon, porto)
            finish(daemon, porto, operation, archive)


@pytest.mark.parametrize("name", ["create", "create a pod", "exec"])
def test_what_it_forks(daemon: Daemon, archive: str, name: str) -> None:
    operation = OPERATIONS[name]
    with _crashing(daemon, archive) as porto:
        for point in range(POINTS):
            make_pod(porto)
            daemon.arm(1 + 20 * point, counted="forked")
            _try(lambda: operation.do(porto, archive))
            daemon.disarm(counted="forked")
            finish(daemon, porto, operation, archive)


def test_killed_while_it_starts(tmp_path: Path) -> None:
    """Whatever it has done by then: nothing of it is left that the next one could stumble over."""
    trigger = tmp_path / "trigger"
    directory = tmp_path / "state"
    directory.mkdir()
    boot = crashing.boot(str(trigger))
    package = str(Path(keeper.__file__).parent.parent)
    for call in range(1, 100):
        Path(f"{trigger}.keeper").write_text(f"{call} 0")
        command = [sys.executable, "-I", "-S", "-c", boot, str(directory / f"{call}.socket"), package]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            process.kill()
        assert str(directory) not in Path("/proc/self/mountinfo").read_text()
        assert {path.suffix for path in directory.iterdir()} <= {".socket"}
        if ready:
            break
    assert ready
    assert call > 5


def _crashing(daemon: Daemon, archive: str) -> Client:
    """Have a daemon in which things can be killed."""
    porto = Client(daemon.socket, timeout_s=30)
    porto.import_layer("base", archive)
    daemon.end()
    eventually(lambda: not daemon.keeper_pid())
    daemon.start(crashing=True)
    return porto


def _try(action: Callable[[], object]) -> None:
    try:
        action()
    except errors.PortoError:
        pass


def _wait_for_keeper(daemon: Daemon, porto: Client) -> None:
    def starts() -> bool:
        try:
            return run(porto, "probe", "true").exit_code == 0
        except errors.PortoError:
            if "probe" in porto.list_containers():
                porto.destroy("probe")
            return False

    eventually(starts, what="another keeper")
