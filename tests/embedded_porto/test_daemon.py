"""The daemon as a process: how it starts, how it ends, and what it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from porto_api import Client, errors, rpc_pb2
from tests.embedded_porto.daemon import Daemon
from tests.porto.support import eventually, root_pid, spec, start, state

pytestmark = pytest.mark.root


def fill(porto: Client, archive: str) -> list[int]:
    """Containers and volumes of all kinds; the processes that run."""
    porto.import_layer("base", archive)
    start(porto, "pod", "", hostname="pod", net="none")
    root = rpc_pb2.TVolumeSpec(backend="overlay", layers=["base"])
    root.links.add(container="pod/a", container_root=True)
    porto.create_from_spec(spec("pod/a", "sleep 1000"), [root], start=True)
    start(porto, "b", isolate=False)
    start(porto, "paused")
    porto.pause("paused")
    porto.create("stopped")
    start(porto, "dead", "true")
    porto.wait(["dead"], 60)
    porto.create_volume(None, {"backend": "tmpfs", "space_limit": "1M"})
    return [root_pid(porto, name) for name in ("pod", "pod/a", "b", "paused")]


def alive(pids: list[int]) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


def gone(daemon: Daemon) -> bool:
    return not (daemon.cgroups() or daemon.mounts() or daemon.state.exists() or daemon.keeper_pid())


def test_sigint_destroys_everything(daemon: Daemon, porto: Client, archive: str) -> None:
    pids = fill(porto, archive)
    assert daemon.end(signal.SIGINT) == 0
    assert not alive(pids)
    eventually(lambda: gone(daemon))
    assert os.listdir(daemon.place / "porto_volumes") == []
    assert os.listdir(daemon.place / "porto") == []
    # Layers aren't containers'.
    assert "base" in os.listdir(daemon.place / "porto_layers")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_other_signals_leave_them(daemon: Daemon, porto: Client, archive: str, number: signal.Signals) -> None:
    pids = fill(porto, archive)
    assert daemon.end(number) == 0
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not Path(daemon.socket).exists()


def test_destroying_what_a_killed_one_left(daemon: Daemon, porto: Client, archive: str) -> None:
    pids = fill(porto, archive)
    daemon.kill()
    daemon.destroy_all()
    assert not alive(pids)
    eventually(lambda: gone(daemon))
    daemon.destroy_all()  # there is nothing left to do


def test_after_a_reboot(daemon: Daemon, porto: Client, archive: str) -> None:
    """As with portod nothing is remembered but what lies in its place, and what is left of the rest goes."""
    fill(porto, archive)
    daemon.kill()
    _kill_all(daemon)
    (daemon.state / "boot_id").write_text("another")
    daemon.start()
    assert porto.list_containers() == []
    assert porto.list_volumes() == []
    assert [layer.name for layer in porto.list_layers()] == ["base"]
    assert os.listdir(daemon.place / "porto_volumes") == []
    assert os.listdir(daemon.place / "porto") == []
    assert daemon.mounts() == []
    start(porto, "pod")
    assert state(porto, "pod") == "running"


def test_after_the_end_of_all_processes(daemon: Daemon, porto: Client, archive: str) -> None:
    """A PID namespace that was killed takes everybody along, and the kernel says nothing of it."""
    fill(porto, archive)
    daemon.kill()
    _kill_all(daemon)
    daemon.start()
    found = {name: state(porto, name) for name in porto.list_containers()}
    assert found.pop("stopped") == "stopped"
    assert set(found.values()) == {"dead"}
    for name in ("pod", "b", "paused", "dead"):
        porto.stop(name)
        porto.start(name)
    porto.start("pod/a")
    assert state(porto, "pod/a") == "running"


def _kill_all(daemon: Daemon) -> None:
    keeper = daemon.keeper_pid()
    assert keeper
    os.kill(keeper, signal.SIGKILL)
    pids: set[int] = set()
    for directory in daemon.cgroups():
        try:
            pids |= {int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()}
        except OSError:
            continue
        frozen = Path(directory, "freezer.state")
        if frozen.exists():
            frozen.write_text("THAWED")
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    eventually(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_stale_sockets_and_files_are_no_obstacle(daemon: Daemon, porto: Client) -> None:
    daemon.kill()
    assert Path(daemon.socket).exists()
    Path(f"{daemon.socket}.new").touch()
    (daemon.state / "containers" / "junk").write_text("{ junk")
    (daemon.state / "containers" / "5.new").write_text("half")
    (daemon.state / "bundles" / "left").mkdir()
    daemon.start()
    assert porto.list_containers() == []
    assert os.listdir(daemon.state / "bundles") == []


def test_a_record_that_cant_be_read_is_one_container_less(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    start(porto, "b")
    pid = root_pid(porto, "a")
    porto.pause("a")
    record = daemon.state / "containers" / porto.get_property("a", "id")
    daemon.kill()
    record.write_text(record.read_text()[:100])
    daemon.start()
    assert porto.list_containers() == ["b"]
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    start(porto, "a")


def test_without_crun(tmp_path: Path) -> None:
    made = Daemon(tmp_path)
    environment = {**os.environ, "PATH": "/nonexistent"}
    done = subprocess.run(made.command(), env=environment, timeout=20)
    assert done.returncode == 1
    assert "crun and tar not found: install the packages crun and tar" in made.log.read_text()


def test_ending_with_requests_under_way(daemon: Daemon, porto: Client) -> None:
    start(porto, "a")
    waiting = threading.Thread(target=_wait_quietly, args=(porto,))
    waiting.start()
    eventually(lambda: porto.system().client_count >= 2)
    before = time.monotonic()
    daemon.end(signal.SIGTERM)
    assert time.monotonic() - before < 10
    waiting.join()


def _wait_quietly(porto: Client) -> None:
    try:
        porto.wait(["a"], 30)
    except errors.PortoError:
        pass


@pytest.mark.parametrize("delay_s", [0.05, 0.15, 0.3])
def test_a_signal_while_it_starts(daemon: Daemon, porto: Client, delay_s: float) -> None:
    """It starts, and ends in order."""
    start(porto, "a")
    daemon.kill()
    with subprocess.Popen(daemon.command()) as process:
        time.sleep(delay_s)  # whatever it is doing by then
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    daemon.start()
    assert state(porto, "a") == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signals_are_heard_wherever_they_arrive(tmp_path: Path, number: signal.Signals) -> None:
    """Also by another thread than the one that waits for clients, and while it is busy."""
    with Daemon(Path(os.environ["SHIM_STAGE_DIR"]) / "signals") as made, Client(made.socket) as porto:
        start(porto, "a", "")
        assert made.process is not None
        threads = sorted(int(name) for name in os.listdir(f"/proc/{made.process.pid}/task"))
        assert len(threads) > 1
        # tgkill: the kernel gives it to this thread and no other.
        import ctypes

        ctypes.CDLL(None).syscall(234, made.process.pid, threads[-1], number)
        assert made.process.wait(timeout=60) == 0
        made.process = None


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shim_embedded_porto"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--destroy-all" in done.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_memory_when_there_is_nothing_to_do(daemon: Daemon, porto: Client) -> None:
    """Daemon and keeper together: a bound against carelessness, not a measurement."""
    start(porto, "a")
    assert daemon.process is not None
    used = sum(_private_kb(pid) for pid in (daemon.process.pid, daemon.keeper_pid()))
    assert used < 60_000


def _private_kb(pid: int) -> int:
    fields = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:] if ":" in line
    )
    return int(fields["Pss"].split()[0])


def test_nothing_is_readable_for_others(daemon: Daemon, porto: Client) -> None:
    porto.create_from_spec(spec("a", "sleep 1000"))
    porto.set_property("a", "env_secret", "S=hidden")
    porto.start("a")
    assert daemon.state.stat().st_mode & 0o077 == 0
    for base, directories, files in os.walk(daemon.state):
        for name in (*directories, *files):
            path = Path(base, name)
            if not path.is_socket():
                assert path.lstat().st_mode & 0o077 == 0, path
    assert "hidden" not in daemon.log.read_text()


def test_the_place_can_be_moved_to(daemon: Daemon, porto: Client, archive: str, tmp_path: Path) -> None:
    """A place is found again by another daemon: layers are files."""
    porto.import_layer("base", archive)
    daemon.end()
    shutil.rmtree(daemon.state)
    daemon.start()
    assert [layer.name for layer in porto.list_layers()] == ["base"]
