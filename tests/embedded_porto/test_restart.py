"""The daemon killed and started again: what ran goes on, and what happened meanwhile is known."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.embedded_porto.daemon import Daemon
from tests.porto.support import eventually, refused, root_pid, run, shell, spec, start, state, states

pytestmark = pytest.mark.root

HOW = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@HOW
def test_containers_go_on(daemon: Daemon, porto: Client, archive: str, number: signal.Signals) -> None:
    porto.import_layer("base", archive)
    root = rpc_pb2.TVolumeSpec(backend="overlay", layers=["base"])
    root.links.add(container="pod/a", container_root=True)
    start(porto, "pod", "", hostname="pod", labels={"TEST.x": "1"})
    script = shell("echo before; while ! test -e /go; do sleep 0.01; done; echo after; sleep 1000")
    porto.create_from_spec(spec("pod/a", script, private="own", memory_limit=1 << 28), [root], start=True)
    eventually(lambda: porto.get_property("pod/a", "stdout") == "before\n")
    path = porto.get_property("pod/a", "root")
    names = [
        "state",
        "root_pid",
        "private",
        "memory_limit",
        "labels",
        "hostname",
        "root",
        "creation_time",
        "id",
        "cgroups",
    ]
    before = porto.get(["pod", "pod/a"], names)

    daemon.end(number)
    assert all(exists(int(str(values["root_pid"]))) for values in before.values())
    Path(path, "go").touch()
    daemon.start()

    assert porto.get(["pod", "pod/a"], names) == before
    eventually(lambda: porto.get_property("pod/a", "stdout") == "before\nafter\n")
    assert [volume.path for volume in porto.list_volumes()] == [path]
    assert run(porto, "pod/a/x", ["hostname"], isolate=False).stdout == "pod\n"
    with refused(errors.Busy):
        porto.remove_layer("base")
    porto.destroy("pod")
    assert porto.list_volumes() == []
    porto.remove_layer("base")


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("end", "code"), [("exit 3", 3), ("exit 0", 0), ("kill -9 $$", -9)])
def test_what_ends_meanwhile_has_its_exit_code(
    daemon: Daemon, porto: Client, tmp_path: Path, end: str, code: int, isolate: bool
) -> None:
    start(porto, "a", shell(f"while ! test -e {tmp_path}/go; do sleep 0.01; done; echo end; {end}"), isolate=isolate)
    pid = root_pid(porto, "a")
    daemon.kill()
    (tmp_path / "go").touch()
    ended = time.time()
    eventually(lambda: not exists(pid))
    daemon.start()
    assert porto.wait(["a"], 60).state == "dead"
    assert porto.get_property("a", "exit_code") == str(code)
    assert porto.get_property("a", "stdout") == "end\n"
    assert abs(int(porto.get_property("a", "death_time[raw]")) - ended) <= 2
    # It is known for good.
    daemon.restart()
    assert porto.get_property("a", "exit_code") == str(code)


def test_what_ran_out_of_memory_meanwhile(daemon: Daemon, porto: Client, tmp_path: Path) -> None:
    eat = f"while ! test -e {tmp_path}/go; do sleep 0.01; done; exec dd if=/dev/zero of=/dev/null bs=200M count=1"
    start(porto, "a", shell(eat), memory_limit=32 << 20)
    pid = root_pid(porto, "a")
    daemon.kill()
    (tmp_path / "go").touch()
    eventually(lambda: not exists(pid))
    daemon.start()
    assert porto.get_property("a", "exit_code") == "-99"
    assert porto.get_property("a", "oom_killed") == "true"


def test_states(daemon: Daemon, porto: Client) -> None:
    for name in ("running", "paused", "dead", "stopped", "again"):
        porto.create_from_spec(spec(name, "true" if name == "dead" else "sleep 1000"))
    start(porto, "meta", "")
    start(porto, "meta/child")
    for name in ("running", "paused", "dead", "again"):
        porto.start(name)
    porto.wait(["dead"], 60)
    porto.pause("paused")
    porto.stop("again")
    before = states(porto)
    assert before == {
        **{name: name for name in ("running", "paused", "dead", "stopped", "meta")},
        "again": "stopped",
        "meta/child": "running",
    }
    daemon.restart()
    assert states(porto) == before
    porto.resume("paused")
    assert state(porto, "paused") == "running"
    porto.start("again")
    porto.start("stopped")


def test_a_stop_that_was_under_way_has_to_be_asked_for_again(daemon: Daemon, porto: Client) -> None:
    start(porto, "a", shell("trap 'echo term' TERM; echo up; while :; do sleep 0.02; done"))
    pid = root_pid(porto, "a")
    eventually(lambda: "up" in porto.get_property("a", "stdout"))
    stopping = threading.Thread(target=_stop_quietly, args=(porto, "a"))
    stopping.start()
    eventually(lambda: "term" in porto.get_property("a", "stdout"))
    daemon.kill()
    stopping.join()
    daemon.start()
    assert state(porto, "a") == "running"
    porto.stop("a", kill_after_s=0)
    assert not exists(pid)


def _stop_quietly(porto: Client, name: str) -> None:
    try:
        porto.stop(name, kill_after_s=60)
    except errors.PortoError:
        pass


def test_weak_containers_go(daemon: Daemon, porto: Client) -> None:
    with porto.session() as connection:
        porto.create_from_spec(spec("weak", "sleep 1000", weak=True), start=True, connection=connection)
        start(porto, "kept")
        pid = root_pid(porto, "weak")
        daemon.restart()
        assert porto.list_containers() == ["kept"]
        assert not exists(pid)


def test_a_respawn_goes_on(daemon: Daemon, porto: Client, tmp_path: Path) -> None:
    script = shell(f"while ! test -e {tmp_path}/go; do sleep 0.01; done; rm {tmp_path}/go; exit 1")
    start(porto, "a", script, respawn=True, respawn_delay=1)
    pid = root_pid(porto, "a")
    daemon.kill()
    (tmp_path / "go").touch()
    eventually(lambda: not exists(pid))
    daemon.start()
    eventually(lambda: state(porto, "a") == "running")
    assert porto.get_property("a", "respawn_count") == "1"


def test_ends_after_the_restart_are_noticed(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    start(porto, "b", isolate=False)
    daemon.restart()
    for name in ("a", "b"):
        porto.kill(name, signal.SIGTERM)
        assert porto.wait([name], 60).state == "dead"
        assert porto.get_property(name, "exit_code") == "-15"


def test_running_out_of_memory_after_the_restart_is_noticed(daemon: Daemon, porto: Client, tmp_path: Path) -> None:
    eat = f"while ! test -e {tmp_path}/go; do sleep 0.01; done; dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 100"
    start(porto, "a", shell(eat), memory_limit=32 << 20)
    daemon.restart()
    (tmp_path / "go").touch()
    assert porto.wait(["a"], 60).state == "dead"
    assert porto.get_property("a", "exit_code") == "-99"


def test_volumes_of_all_kinds(daemon: Daemon, porto: Client, archive: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    porto.import_layer("base", archive)
    kinds = [
        {"backend": "plain", "private": "own"},
        {"backend": "tmpfs", "space_limit": "1M"},
        {"backend": "overlay", "layers": "base"},
        {"backend": "bind", "storage": str(tmp_path)},
        {"storage": "kept"},
    ]
    paths = [porto.create_volume(None, kind).path for kind in kinds]
    for path in paths:
        Path(path, "written").write_text("x")
    porto.create("a")
    porto.link_volume(paths[0], "a")
    porto.link_volume(paths[1], "a", target="/mnt/x")
    before = [(volume.path, sorted(volume.containers)) for volume in porto.list_volumes()]
    daemon.restart()
    assert [(volume.path, sorted(volume.containers)) for volume in porto.list_volumes()] == before
    for path in paths:
        assert Path(path, "written").read_text() == "x"
    porto.destroy("a")
    for path in paths:
        porto.unlink_volume(path)
        assert not os.path.exists(path)
    assert porto.list_volumes() == []


def test_links_in_running_containers(daemon: Daemon, porto: Client, archive: str) -> None:
    porto.import_layer("base", archive)
    root = porto.create_volume(None, {"layers": "base"}).path
    data = porto.create_volume(None, {}).path
    Path(data, "file").write_text("hello\n")
    start(porto, "a", root=root)
    porto.link_volume(data, "a", target="/mnt")
    daemon.restart()
    assert run(porto, "a/x", ["cat", "/mnt/file"], isolate=False).stdout == "hello\n"
    porto.unlink_volume(data, "a", target="/mnt")
    assert run(porto, "a/x", ["ls", "/mnt"], isolate=False).stdout == ""
    porto.link_volume(data, "a", target="/mnt")
    assert run(porto, "a/x", ["ls", "/mnt"], isolate=False).stdout == "file\n"


def test_ids_of_containers_and_volumes_arent_given_twice(daemon: Daemon, porto: Client) -> None:
    porto.create("a")
    volume = porto.create_volume(None, {}).path
    daemon.restart()
    porto.create("b")
    assert porto.get_property("a", "id") != porto.get_property("b", "id")
    assert porto.create_volume(None, {}).path != volume


def test_many_times(daemon: Daemon, porto: Client) -> None:
    for number in range(4):
        start(porto, f"c{number}", ["sleep", "1000"] if number % 2 else "true")
        daemon.restart()
    eventually(lambda: list(states(porto).values()).count("dead") == 2)
    assert list(states(porto).values()).count("running") == 2
    assert len(daemon.records()) == 4


def test_another_one_is_refused(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    done = subprocess.run(daemon.command(), timeout=20)
    assert done.returncode == 1
    assert "another daemon works with" in daemon.log.read_text()
    assert state(porto, "a") == "running"


def test_a_start_is_not_taken_for_an_earlier_one(daemon: Daemon, porto: Client) -> None:
    """A container that has the number of one before it isn't ended by what is told of that one, late."""
    known: list[tuple[str, str]] = []
    for _ in range(2):
        start(porto, "a", "sleep 1000")
        (key,) = os.listdir(daemon.state / "exits")
        known.append((porto.get_property("a", "id"), key))
        porto.destroy("a")
        daemon.restart()
    (first_id, first), (second_id, second) = known
    assert first_id == second_id
    assert first != second
