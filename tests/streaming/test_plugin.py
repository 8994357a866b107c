"""The plugin's hooks: what CRI requests are answered with."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import pytest
from shim_streaming.plugin import Streaming

from shim_core import testing
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable, Unimplemented
from shim_core.hookspecs import hookimpl
from shim_core.types import AttachSession, ExecSession, PortForwardSession
from tests.streaming.harness import Harness, eventually, limits
from tests.streaming.local_runtime import CONTAINER, SANDBOX
from tests.streaming.spdy_client import SpdyCommand

Serve = Callable[..., Harness]


def call(harness: Harness, rpc: str, request: Any) -> Any:
    return getattr(harness.manager.hook, f"cri_{rpc}")(request=request, context=testing.context(rpc))


EXEC: dict[str, Any] = {"container_id": CONTAINER, "cmd": ["true"], "stdout": True}
ATTACH: dict[str, Any] = {"container_id": CONTAINER, "stdout": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"container_id": ""}, "container_id"),
        ({"cmd": []}, "cmd"),
        ({"cmd": ["x" * 2_100_000]}, "cmd: longer than 2097152 bytes"),
        ({"tty": True, "stderr": True}, "stderr: a terminal has one output only"),
        ({"stdout": False}, "stdin, stdout, stderr: none of them"),
    ],
)
def test_exec_requests_that_are_refused(harness: Harness, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call(harness, "exec", pb.ExecRequest(**{**EXEC, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"container_id": ""}, "container_id"),
        ({"tty": True, "stderr": True}, "stderr"),
        ({"stdout": False}, "none of them"),
    ],
)
def test_attach_requests_that_are_refused(harness: Harness, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call(harness, "attach", pb.AttachRequest(**{**ATTACH, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pod_sandbox_id": ""}, "pod_sandbox_id"),
        ({"port": [-1]}, "port: -1"),
        ({"port": [80, 0]}, "port: 0"),
        ({"port": [65536]}, "port: 65536"),
    ],
)
def test_port_forward_requests_that_are_refused(harness: Harness, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call(harness, "port_forward", pb.PortForwardRequest(**{"pod_sandbox_id": SANDBOX, **fields}))


def test_the_runtime_is_asked_before_a_url_is_given_out(harness: Harness) -> None:
    with pytest.raises(NotFound, match="no container"):
        call(harness, "exec", pb.ExecRequest(**{**EXEC, "container_id": "other"}))
    with pytest.raises(NotFound, match="no container"):
        call(harness, "attach", pb.AttachRequest(**{**ATTACH, "container_id": "other"}))
    with pytest.raises(NotFound, match="no sandbox"):
        call(harness, "port_forward", pb.PortForwardRequest(pod_sandbox_id="other"))
    assert harness.server.state()["unusedURLs"] == 0


def test_what_the_runtime_is_asked(serve: Serve) -> None:
    asked: list[object] = []

    class Runtime:
        @hookimpl
        def stream_check(self, session: object) -> bool:
            asked.append(session)
            return True

    harness = serve(runtime=Runtime())
    harness.exec_url("a", "b", tty=True)
    harness.attach_url(CONTAINER)
    harness.forward_url(80, 81)
    harness.forward_url()
    assert asked == [
        ExecSession(CONTAINER, ("a", "b"), tty=True),
        AttachSession(CONTAINER),
        PortForwardSession(SANDBOX, 80),
        PortForwardSession(SANDBOX, 0),
    ]


def test_no_runtime_plugin(serve: Serve) -> None:
    harness = serve(runtime=object())
    with pytest.raises(Unimplemented, match="no runtime plugin can stream"):
        harness.exec_url("true")


def test_too_many_unused_urls(serve: Serve) -> None:
    harness = serve(limits=limits(tokens=3))
    urls = [harness.exec_url("true") for _ in range(3)]
    with pytest.raises(ResourceExhausted, match="try again in 60 seconds"):
        harness.exec_url("true")
    assert SpdyCommand(urls[0]).exit_code() == 0
    harness.exec_url("true")


def test_what_the_runtime_gets(harness: Harness) -> None:
    seen: list[ExecSession] = []

    def record(session: ExecSession, _context: object) -> int:
        seen.append(session)
        return 0

    harness.runtime.on_exec = record
    SpdyCommand(harness.exec_url("a", "b c")).finish()
    SpdyCommand(harness.exec_url("t", tty=True), tty=True).finish()
    plain, terminal = seen
    assert (plain.container_id, plain.command, plain.tty) == (CONTAINER, ("a", "b c"), False)
    assert plain.stdin is None
    assert None not in (plain.stdout, plain.stderr)
    assert terminal.tty
    assert terminal.stdin == terminal.stdout == terminal.stderr is not None


def test_the_context_is_the_calls(harness: Harness) -> None:
    seen: list[tuple[str, str, bool]] = []

    def record(_session: object, context: Any) -> int:
        seen.append((context.rpc, context.request_id, context.cancelled))
        return 0

    harness.runtime.on_exec = record
    SpdyCommand(harness.exec_url("true")).finish()
    assert seen == [("Exec", "test", False)]


def test_verbose_status(harness: Harness) -> None:
    client = SpdyCommand(harness.exec_url("sleep", "60"))
    harness.exec_url("true")
    eventually(lambda: harness.sessions() == 1, "the session runs")
    (info,) = harness.manager.hook.runtime_info(context=testing.context())
    assert json.loads(info["streaming"]) == {
        "baseURL": harness.server.base_url,
        "tls": False,
        "sessions": 1,
        "unusedURLs": 1,
    }
    client.close()


def test_before_it_is_configured() -> None:
    plugin = Streaming()
    manager = testing.manager(streaming=plugin)
    assert manager.hook.runtime_info(context=testing.context()) == [{}]
    manager.hook.shim_shutdown()
    with pytest.raises(Unavailable, match="not configured"):
        manager.hook.cri_exec(request=pb.ExecRequest(**EXEC), context=testing.context())


def test_it_is_found_as_a_plugin() -> None:
    (entry,) = importlib.metadata.entry_points(group="shim.plugins", name="streaming")
    assert entry.load() is Streaming
    assert entry.dist is not None
    assert entry.dist.name == "shim-streaming"
