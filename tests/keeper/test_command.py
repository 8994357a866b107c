"""The command portoshim-keeper."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shim_porto_runtime.keeper import command

from tests.keeper.conftest import Node, eventually


@pytest.fixture
def run_in_foreground(node: Node) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        program = "import sys; from shim_porto_runtime.keeper.command import main; sys.exit(main(sys.argv[1:]))"
        arguments = ["--directory", str(node.directory), "run", "--log", str(node.path / "run.log")]
        started.append(subprocess.Popen([sys.executable, "-c", program, *arguments]))
        return started[-1]

    yield run
    node.client.stop(force=True)
    for process in started:
        process.wait(60)


def test_it_runs_in_the_foreground_until_it_is_asked_to_end(
    node: Node, run_in_foreground: Callable[[], subprocess.Popen[bytes]]
) -> None:
    process = run_in_foreground()
    eventually(lambda: node.client.stats() is not None)
    assert node.stats.holder_pid == process.pid
    process.terminate()
    assert process.wait(60) == 0
    assert node.client.stats() is None


def test_a_unit_is_restarted_under_its_containers(
    node: Node, run_in_foreground: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """systemd with KillMode=process: SIGTERM, after TimeoutStopSec SIGKILL, to the first process alone."""
    first = run_in_foreground()
    eventually(lambda: node.client.stats() is not None)
    check = node.write_numbers()
    first.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.3)
    first.kill()
    first.wait()
    second = run_in_foreground()
    eventually(lambda: node.stats.holder_pid == second.pid)
    check()


def test_status_names_the_containers(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--directory", str(node.directory)]
    assert command.main([*options, "status"]) == 3
    assert capsys.readouterr().out == "not running\n"
    with node.open("web"), node.open("shell", tty=True):
        assert command.main([*options, "status"]) == 0
        lines = capsys.readouterr().out.splitlines()
    assert str(node.stats.pid) in lines[0]
    assert lines[1:] == [f"shell running {node.log('shell')} terminal", f"web running {node.log('web')}"]


def test_hand_over_and_stop(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--directory", str(node.directory)]
    assert command.main([*options, "hand-over"]) == 1
    assert "no stream keeper runs" in capsys.readouterr().err
    with node.open():
        before = node.stats.pid
        assert command.main([*options, "hand-over"]) == 0
        assert node.stats.pid != before
        assert command.main([*options, "stop"]) == 1
        assert "1 containers" in capsys.readouterr().err
        assert command.main([*options, "stop", "--force"]) == 0
    assert node.client.stats() is None


def test_the_keepers_process_has_no_more_in_it_than_it_needs(node: Node) -> None:
    node.client.ensure_running()
    maps = Path(f"/proc/{node.stats.pid}/maps").read_text()
    for foreign in ("grpc", "pydantic", "google", "_ssl", "yaml"):
        assert foreign not in maps
    assert node.stats.resident_bytes <= 12_500_000
