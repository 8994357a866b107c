"""``portoshim images`` as an operator types it, beside a daemon or without one."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from shim_core import cli
from tests.images.fakeporto import FakePorto
from tests.images.support import MakeNode
from tools import images
from tools.images import File

NAME = "registry.example.org/team/app:1.0"
APP = images.build([images.layer([File("base", b"base" * 1000)]), images.layer([File("app", b"hello")])])


@pytest.fixture
def porto(tmp_path: Path) -> Iterator[FakePorto]:
    made = FakePorto(tmp_path / "porto")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def config(tmp_path: Path, porto: FakePorto) -> Path:
    return configure(tmp_path, {"StateDir": str(tmp_path / "state")}, porto)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    images.write_oci_archive(tmp_path / "app.tar", {NAME: APP})
    return tmp_path / "app.tar"


def configure(tmp_path: Path, core: dict[str, str], porto: FakePorto) -> Path:
    tree = {
        "Portoshim": {"LogsDir": str(tmp_path / "log"), **core},
        "Porto": {"Socket": porto.path, "ImagesDir": str(porto.layers_dir)},
        "Images": {"Pinned": ["registry.example.org/*"]},
        "Plugins": {"Disabled": ["cni_net", "embedded_porto", "streaming"]},
    }
    (tmp_path / "portoshim.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "portoshim.yaml"


def command(config: Path, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "shim_core.cli", "--config", config, "images", *arguments]


@dataclass
class Done:
    returncode: int | str | None
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command in this process, which has loaded everything already."""
    log = logging.getLogger("shim")
    before = log.level, log.propagate, list(log.handlers)

    def run(config: Path, *arguments: str | Path) -> Done:
        capsys.readouterr()
        try:
            status: int | str | None = cli.main([str(word) for word in command(config, *arguments)[3:]])
        except SystemExit as err:
            status = err.code
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    yield run
    log.level, log.propagate, log.handlers = before


def test_there_and_back(run: Run, config: Path, archive: Path, porto: FakePorto, tmp_path: Path) -> None:
    loaded = run(config, "load", archive)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout == f"{APP.id}  {NAME}\n"
    assert len(porto.layers()) == 2
    listed = run(config, "list").stdout.splitlines()
    assert listed[0].split() == ["IMAGE", "ID", "SIZE", "PINNED"]
    assert listed[1].split() == [NAME, APP.id[7:20], "16.0", "KiB", "yes"]
    for options in ([], ["--docker"]):
        saved = run(config, "save", *options, tmp_path / "saved.tar", APP.id[7:20])
        assert (saved.returncode, saved.stdout) == (0, ""), saved.stderr
        other = tmp_path / f"other{len(options)}"
        other.mkdir()
        again = run(configure(other, {"StateDir": str(other / "state")}, porto), "load", tmp_path / "saved.tar")
        assert again.stdout == f"{APP.id}  {NAME}\n", again.stderr


def test_beside_the_daemon(run: Run, make_node: MakeNode, archive: Path, tmp_path: Path) -> None:
    daemon = make_node()
    if daemon.fake is None:
        pytest.skip("the command's Porto is the daemon's")
    config = configure(tmp_path, {"StateDir": str(tmp_path / "state")}, daemon.fake)
    assert run(config, "load", archive).returncode == 0
    found = daemon.service.resolve(NAME)
    assert found is not None
    assert (daemon.layer_dir(found, 1) / "app").read_text() == "hello"


def test_what_goes_wrong_is_said_in_one_line(
    run: Run, config: Path, archive: Path, porto: FakePorto, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no archive")
    cases: list[tuple[list[str | Path], str]] = [
        (["load", tmp_path / "none.tar"], "none.tar: can't be read: No such file or directory"),
        (["load", tmp_path / "text"], "text: is no tar archive"),
        (["save", tmp_path / "out.tar", "busybox"], "busybox: no such image here"),
        (["save", tmp_path / "no" / "out.tar", NAME], f"{NAME}: no such image here"),
    ]
    for arguments, expected in cases:
        done = run(config, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("portoshim: ")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
    porto.stop()
    done = run(config, "load", archive)
    assert done.returncode == 1
    assert porto.path in done.stderr
    assert "Traceback" not in done.stderr
    porto.start()


def test_a_state_directory_that_is_none(run: Run, tmp_path: Path, porto: FakePorto) -> None:
    (tmp_path / "state").touch()
    done = run(configure(tmp_path, {"StateDir": str(tmp_path / "state")}, porto), "list")
    assert done.returncode == 2
    assert "set Portoshim.StateDir elsewhere" in done.stderr


def test_usage(run: Run, config: Path) -> None:
    for arguments in ([], ["load"], ["save", "file"], ["push", "x"]):
        done = run(config, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: portoshim images")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(
    run: Run, config: Path, archive: Path, porto: FakePorto, tmp_path: Path, number: signal.Signals
) -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def hold(_name: str) -> None:
        under_way.set()
        go_on.wait(30)

    porto.before_import = hold
    with subprocess.Popen(command(config, "load", archive), stderr=subprocess.PIPE, text=True) as process:
        assert under_way.wait(30)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    go_on.set()
    assert process.returncode == 1
    assert "cancelled" in stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "state" / "images" / "tmp").iterdir())
    porto.before_import = lambda _: None
    assert run(config, "list").stdout.count("\n") == 1
    assert run(config, "load", archive).returncode == 0
