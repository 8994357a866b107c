"""The keeper killed: containers go on, and there is another one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from porto_api import Client, errors
from tests.embedded_porto.daemon import Daemon
from tests.porto.support import eventually, result, root_pid, run, shell, start, state

pytestmark = pytest.mark.root


def kill_keeper(daemon: Daemon) -> None:
    """Returns when it is gone."""
    pid = daemon.keeper_pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}").exists() or _zombie(pid))


def _zombie(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


def starts_again(porto: Client) -> bool:
    """True once there is a keeper that starts containers."""
    try:
        return run(porto, "probe", ["echo", "x"]).stdout == "x\n"
    except errors.PortoError:
        if "probe" in porto.list_containers():
            porto.destroy("probe")
        return False


def test_containers_go_on_and_new_ones_start(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    start(porto, "b", isolate=False)
    pids = [root_pid(porto, name) for name in ("a", "b")]
    kill_keeper(daemon)
    eventually(lambda: starts_again(porto))
    assert [root_pid(porto, name) for name in ("a", "b")] == pids
    assert [state(porto, name) for name in ("a", "b")] == ["running", "running"]
    assert run(porto, "a/x", ["echo", "hello"], isolate=False).stdout == "hello\n"


def test_ends_are_noticed_and_inits_leave_word(daemon: Daemon, porto: Client, tmp_path: Path) -> None:
    script = f"while ! test -e {tmp_path}/go; do sleep 0.01; done; exit 3"
    start(porto, "isolated", shell(script))
    start(porto, "shared", shell(script), isolate=False)
    kill_keeper(daemon)
    eventually(lambda: starts_again(porto))
    (tmp_path / "go").touch()
    assert result(porto, "isolated").exit_code == 3
    # There was nobody who could have known, unless the kernel remembers.
    assert result(porto, "shared").exit_code == (3 if _kernel() >= (6, 15) else 0)


def test_with_the_daemon(daemon: Daemon, porto: Client, tmp_path: Path) -> None:
    start(porto, "a", shell(f"while ! test -e {tmp_path}/go; do sleep 0.01; done; exit 3"))
    start(porto, "b")
    kill_keeper(daemon)
    daemon.kill()
    (tmp_path / "go").touch()
    daemon.start()
    assert result(porto, "a").exit_code == 3
    assert state(porto, "b") == "running"
    porto.kill("b", signal.SIGKILL)
    assert porto.wait(["b"], 60).state == "dead"


def test_while_the_daemon_is_away(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    daemon.kill()
    kill_keeper(daemon)
    daemon.start()
    assert state(porto, "a") == "running"
    assert starts_again(porto)


def test_it_ends_when_it_has_nothing_to_look_after(daemon: Daemon, porto: Client) -> None:
    start(porto, "a", "true")
    porto.wait(["a"], 60)
    assert daemon.keeper_pid()
    daemon.end()
    eventually(lambda: not daemon.keeper_pid())
    daemon.start()
    assert porto.get_property("a", "exit_code") == "0"
    assert starts_again(porto)


def test_a_container_cant_change_the_interpreter(daemon: Daemon, porto: Client) -> None:
    """Its init is a program of the machine's: whoever runs as root in there mustn't be able to write it."""
    found = run(porto, "a", shell("exec 3>> /proc/1/exe && echo writable; ls -l /proc/1/exe > /dev/null; true"))
    assert "writable" not in found.stdout


def test_an_init_has_nothing_open(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    start(porto, "m", "")
    (init,) = [pid for pid in _processes_of(porto, "a") if pid != root_pid(porto, "a")]
    # The file its last word goes to, and nothing else.
    assert [os.readlink(path).split("/")[-2] for path in Path(f"/proc/{init}/fd").iterdir()] == ["exits"]
    assert list(Path(f"/proc/{root_pid(porto, 'm')}/fd").iterdir()) == []


def _kernel() -> tuple[int, ...]:
    return tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])


def _processes_of(porto: Client, name: str) -> list[int]:
    directory = porto.get_property(name, "cgroups[freezer]")
    return [int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()]
