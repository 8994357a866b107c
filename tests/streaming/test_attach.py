"""attach: the container's own streams, and nothing else of it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.streaming.conftest import open_descriptors, streaming_threads
from tests.streaming.harness import Harness, eventually
from tests.streaming.local_runtime import Container
from tests.streaming.spdy_client import SpdyCommand
from tests.streaming.websocket_client import WebSocketCommand

ID = "a" * 64
BOTH = ["spdy", "websocket"]


def attach(harness: Harness, kind: str, **fields: bool) -> SpdyCommand | WebSocketCommand:
    url = harness.attach_url(ID, **fields)
    if kind == "websocket":
        return WebSocketCommand(url, "v5.channel.k8s.io")
    return SpdyCommand(url, stdin=fields.get("stdin", True), tty=fields.get("tty", False))


@pytest.fixture
def shell(harness: Harness) -> Container:
    harness.runtime.containers[ID] = Container.run("sh")
    return harness.runtime.containers[ID]


@pytest.mark.parametrize("kind", BOTH)
def test_input_and_output(harness: Harness, shell: Container, kind: str) -> None:
    client = attach(harness, kind)
    client.write(b"echo hello; echo err >&2\n")
    client.wait_output(b"hello\n")
    client.write(b"exit 3\n")
    assert json.loads(client.finish()) == {"metadata": {}, "status": "Success"}  # the exit code isn't attach's
    assert client.err == b"err\n"


@pytest.mark.parametrize("kind", BOTH)
def test_the_end_of_stdin(harness: Harness, shell: Container, kind: str) -> None:
    client = attach(harness, kind)
    client.write(b"echo last")
    client.close_stdin()
    client.finish()
    assert client.out == b"last\n"
    assert shell.process.wait(60) == 0


@pytest.mark.parametrize("kind", BOTH)
def test_the_container_goes_on_without_its_client(harness: Harness, shell: Container, kind: str) -> None:
    client = attach(harness, kind)
    client.write(b"echo ready\n")
    client.wait_output(b"ready")
    client.close()
    eventually(lambda: harness.sessions() == 0, "the session is over", 5)
    assert shell.process.poll() is None
    again = attach(harness, kind)
    again.write(b"echo again; exit\n")
    again.finish()
    assert b"again\n" in again.out


@pytest.mark.parametrize("kind", BOTH)
def test_without_stdin(harness: Harness, kind: str) -> None:
    harness.runtime.containers[ID] = Container.run("sh", "-c", "sleep 0.2; echo out")
    client = attach(harness, kind, stdin=False)
    client.finish()
    assert client.out == b"out\n"


@pytest.mark.parametrize("kind", BOTH)
def test_window_sizes_go_to_the_runtime(harness: Harness, shell: Container, kind: str) -> None:
    client = attach(harness, kind, tty=True)
    client.resize(101, 41)
    client.resize(80, 24)
    eventually(lambda: shell.sizes[-1:] == [(80, 24)], f"sizes arrive: {shell.sizes}")
    client.close()


def test_the_bytes_of_a_terminal_pass_as_they_are(harness: Harness) -> None:
    """The container has its terminal; a second one in between would change them."""
    harness.runtime.containers[ID] = Container.run("cat")
    client = SpdyCommand(harness.attach_url(ID, tty=True), stdin=True, tty=True)
    client.write(b"a\nb\r\x03\x04\x1b[A")
    client.wait_output(b"\x1b[A")
    assert client.out == b"a\nb\r\x03\x04\x1b[A"
    client.close()


def test_a_runtime_that_cannot_resize(
    harness: Harness, shell: Container, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "sizes", None)
    client = SpdyCommand(harness.attach_url(ID, tty=True), stdin=True, tty=True)
    client.resize(101, 41)
    client.write(b"echo still here\n")
    client.wait_output(b"still here")
    assert "size can't be set" in caplog.text
    client.close()


def test_many_attaches_leave_nothing(serve: Callable[..., Harness]) -> None:
    """CVE-2025-64329: threads of attaches whose client had gone stayed for ever."""
    harness = serve()
    harness.runtime.containers[ID] = Container.run("sh")
    SpdyCommand(harness.attach_url(ID), stdin=True).close()
    eventually(lambda: harness.sessions() == 0, "the first is over")
    threads, descriptors = len(streaming_threads()), open_descriptors()
    for _ in range(50):
        client = SpdyCommand(harness.attach_url(ID), stdin=True)
        client.close()
    eventually(lambda: harness.sessions() == 0, "all are over")
    eventually(lambda: len(streaming_threads()) <= threads, "threads are gone")
    eventually(lambda: open_descriptors() <= descriptors, "descriptors are gone")
