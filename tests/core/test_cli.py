"""The command as an operator types it."""

from __future__ import annotations

import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from shim_core import __version__, cli, config, daemon, errors, hookimpl, log, testing
from shim_core.testing import CriClient
from shim_core.types import Command

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: an interpreter takes longer to start than all that the command does."""
    monkeypatch.setattr(log, "set_up_stderr", lambda **_: None)  # it is this process's

    def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run_here


def run_apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shim_core.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_version() -> None:
    assert run_apart("--version").stdout == f"portoshim {__version__}\n"


def test_the_default_configuration_is_a_configuration(run: Run, tmp_path: Path) -> None:
    printed = run("config", "default")
    assert printed.returncode == 0, printed.stderr
    path = tmp_path / "portoshim.yaml"
    path.write_text(printed.stdout)
    dumped = run("--config", str(path), "config", "dump")
    assert dumped.returncode == 0, dumped.stderr
    for key in ("SocketTimeout: 5m", "PauseImage: registry.k8s.io/pause:3.7", "ConfDir: /etc/cni/net.d", "Port: 7255"):
        assert key in dumped.stdout
    assert f"ConfigPath: {path}" in dumped.stdout


def test_a_portoshim_yaml_of_the_go_program_works_unchanged(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text(
        """
Portoshim:
  ConfigPath: /etc/portoshim.yaml
  Socket: /run/portoshim.sock
  LogsDir: /var/log/portoshim
  VolumesDir: /place/portoshim_volumes
Porto:
  RuntimeName: porto
  Socket: /run/portod.socket
  SocketTimeout: 5m
  ImagesDir: /place/porto_docker
  ParentContainer: ""
CNI:
  ConfDir: /etc/cni/net.d
  BinDir: /opt/cni/bin
  NetnsDir: /var/run/netns
  NetType: "netns"
StreamingServer:
  Address: "[::]"
  Port: 7255
Images:
  PauseImage: registry.k8s.io/pause:3.7
  Place: ""
  Registries:
  - Host: registry-1.docker.io
    AuthPath: https://auth.docker.io/token
    AuthService: registry.docker.io
    AuthToken: file:/nonexistent
"""
    )
    dumped = run("--config", str(path), "config", "dump")
    assert dumped.returncode == 0, dumped.stderr
    assert "AuthService: registry.docker.io" in dumped.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Porto: {SocketTimeOut: 5m}", "Porto.SocketTimeOut: unknown key; did you mean SocketTimeout?"),
        ("Porto: {SocketTimeout: 300}", "Porto.SocketTimeout: not a duration"),
        ("CNI: {BinDir: relative}", "CNI.BinDir"),
        ("StreamingServer: {Port: 65536}", "StreamingServer.Port"),
        ("Images: {Registries: [{Hst: x}]}", "Images.Registries[0].Hst: unknown key; did you mean Host?"),
        ("Images: {PauseImage: '***'}", "Images.PauseImage"),
        ("{", "not valid YAML"),
    ],
)
def test_a_mistake_is_named_and_ends_with_2(run: Run, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text(text)
    for command in (["config", "dump"], []):
        done = run("--config", str(path), *command)
        assert done.returncode == 2
        assert expected in done.stderr
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr


def test_a_mistake_is_one_line_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text("CNI: {BinDir: relative}")
    done = run_apart("--config", str(path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "CNI.BinDir" in done.stderr


def test_a_missing_file_is_a_mistake_when_it_was_named(run: Run, tmp_path: Path) -> None:
    done = run("--config", str(tmp_path / "none.yaml"), "config", "dump")
    assert done.returncode == 2
    assert "no such file" in done.stderr


def test_single_dashes_are_taken_as_by_the_go_program(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text("")
    assert run("-config", str(path), "-debug", "config", "dump").returncode == 0


def test_the_socket_option_wins(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text("Portoshim: {Socket: /run/one.sock}")
    done = run("--config", str(path), "--socket", "/run/two.sock", "config", "dump")
    assert "Socket: /run/two.sock" in done.stdout


def test_sigterm_ends_it_also_when_it_was_started_with_sigterm_blocked(tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text(
        f"Portoshim: {{Socket: {tmp_path}/s, LogsDir: {tmp_path}/log, StateDir: {tmp_path}/state}}\n"
        "Plugins: {Disabled: [porto_runtime, cni_net, registry_auth, streaming, embedded_porto]}\n"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        process = subprocess.Popen([sys.executable, "-m", "shim_core.cli", "--config", str(path)])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        try:
            with CriClient(str(tmp_path / "s")) as client:
                client.wait_ready(20)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_plugins_are_listed_with_distribution_version_and_hooks(run: Run) -> None:
    done = run("plugins")
    assert done.returncode == 0, done.stderr
    for name in ("porto_runtime", "cni_net", "registry_auth", "streaming", "embedded_porto"):
        assert f"{name}  shim-{name.replace('_', '-')} {__version__}\n" in done.stdout
    assert "    cri_run_pod_sandbox\n" in done.stdout
    assert "    network_attach\n" in done.stdout


def test_secrets_are_not_dumped(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text("Images: {Registries: [{Host: a.example, AuthToken: S3CR3T}]}")
    done = run("--config", str(path), "config", "dump")
    assert done.returncode == 0, done.stderr
    assert "S3CR3T" not in done.stdout + done.stderr


def test_plugins_bring_commands(run: Run) -> None:
    assert "    images  " in run("--help").stdout
    done = run("images", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: portoshim images")


def test_help_does_not_depend_on_the_configuration(run: Run, tmp_path: Path) -> None:
    done = run("--config", str(tmp_path / "none.yaml"), "--help")
    assert done.returncode == 0
    assert "    config  " in done.stdout
    assert run("--config", str(tmp_path / "none.yaml"), "images", "list").returncode == 2


def test_a_command_that_no_plugin_brings(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text("Plugins: {Disabled: [porto_runtime]}")
    done = run("--config", str(path), "images", "list")
    assert done.returncode == 2
    assert "invalid choice: 'images'" in done.stderr


class Brings:
    """A plugin with one command."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self._name, self._error = name, error

    @hookimpl
    def shim_command(self) -> list[Command]:
        return [Command(self._name, "help", lambda parser: parser.add_argument("word"), self._run)]

    def _run(self, arguments: Namespace) -> int:
        if self._error is not None:
            raise self._error
        print(arguments.word)
        return 7


def main_with(monkeypatch: pytest.MonkeyPatch, *brought: Brings) -> Callable[..., int]:
    manager = testing.manager(**{f"p{number}": plugin for number, plugin in enumerate(brought)})
    assembly = daemon.Assembly(config.parse({}, []), manager, ())
    monkeypatch.setattr(daemon, "assemble", lambda _: assembly)
    monkeypatch.setattr(log, "set_up_stderr", lambda **_: None)
    return lambda *argv: cli.main(argv)


def test_a_command_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_with(monkeypatch, Brings("say"), Brings("fail", errors.NotFound("no such word")))
    assert main("--debug", "say", "hello") == 7
    assert capsys.readouterr().out == "hello\n"
    assert main("fail", "hello") == 1
    assert capsys.readouterr().err == "portoshim: no such word\n"


@pytest.mark.parametrize("names", [("say", "say"), ("config",)])
def test_two_commands_of_one_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    main = main_with(monkeypatch, *(Brings(name) for name in names))
    assert main("say", "hello") == 2
    assert f"the command {names[0]} is brought twice" in capsys.readouterr().err
