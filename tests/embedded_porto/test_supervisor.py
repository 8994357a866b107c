"""The daemon beside the shim: started, kept up, ended with it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from shim_embedded_porto import daemon
from shim_embedded_porto.plugin import EmbeddedPorto, EmbeddedPortoSection
from shim_embedded_porto.supervisor import Supervisor

from porto_api import Client, PortoError
from shim_core import config
from shim_core.errors import ConfigError, StartupError

pytestmark = pytest.mark.root


def arguments(directory: Path) -> list[str]:
    cgroup = f"{os.environ['SHIM_STAGE_CGROUP']}/supervised-{directory.name}"
    return ["--place", f"{directory}/place", "--cgroup", cgroup, "--log", f"{directory}/log"]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(str(tmp_path / "socket"), arguments(tmp_path))
    made.start()
    yield made
    made.stop()


def answers(path: Path) -> bool:
    client = Client(str(path), 5)
    try:
        return bool(client.version()[0])
    except PortoError:
        return False
    finally:
        client.close()


def test_it_answers_once_it_is_started_and_is_gone_once_it_is_stopped(tmp_path: Path) -> None:
    made = Supervisor(str(tmp_path / "socket"), arguments(tmp_path))
    made.start()
    pid = made.pid
    assert answers(tmp_path / "socket")
    made.stop()
    assert made.pid == 0
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "socket").exists()


def test_a_daemon_that_ends_is_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    first = supervisor.pid
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while supervisor.pid in (0, first) or not answers(tmp_path / "socket"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert supervisor.restarts >= 1


def test_what_keeps_it_from_starting_is_said(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("a file")
    with pytest.raises(StartupError, match=r"the embedded Porto doesn't start: .*/place/porto_state: Not a directory$"):
        Supervisor(str(tmp_path / "socket"), arguments(tmp_path)).start()


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys; from shim_embedded_porto.supervisor import Supervisor as S\n"
        "s = S(sys.argv[1], sys.argv[2:]); s.start(); print(s.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "socket"), *arguments(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        daemon = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([daemon], [], [], 20)
    os.close(daemon)
    assert ended
    # The next one takes over at once, whatever is left of the last.
    made = Supervisor(str(tmp_path / "socket"), arguments(tmp_path))
    made.start()
    made.stop()


@pytest.mark.parametrize("name", ["", "/porto", "a//b", "../up", "a/../b", "a b", "a/"])
def test_a_cgroup_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"EmbeddedPorto\.Cgroup"):
        config.parse({"EmbeddedPorto": {"Cgroup": name}}, [EmbeddedPortoSection])


def test_without_embedded_it_does_nothing() -> None:
    plugin = EmbeddedPorto()
    plugin.shim_startup()
    assert plugin.runtime_endpoint() is None
    plugin.shim_shutdown()


def test_a_signal_that_comes_again_while_it_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sends it once for each thread of a parent that is killed."""
    stopped: list[int] = []

    class Server:
        def __init__(self, _porto: object) -> None:
            _, self.waker = os.pipe2(os.O_NONBLOCK)

        def listen(self) -> None: ...

        def run(self) -> None:
            signal.raise_signal(signal.SIGTERM)

        def stop(self) -> None:
            stopped.append(len(stopped))
            if len(stopped) < 5:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(daemon, "Server", Server)
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    porto = SimpleNamespace(events=SimpleNamespace(run=lambda: None), options=SimpleNamespace(socket="x"))
    try:
        assert not daemon._serve(cast("Any", porto), daemon._Signals(), None)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert stopped == [0]
