"""The plugin wired to the tests' runtime, as the daemon would wire it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shim_streaming.limits import Limits
from shim_streaming.plugin import Streaming
from shim_streaming.server import StreamingServer
from shim_streaming.settings import StreamingServerSection

from shim_core import config, testing
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.types import Shim
from tests.streaming.local_runtime import CONTAINER, SANDBOX, LocalRuntime

QUICK = Limits(
    disconnect_grace_s=0.3,
    drain_quiet_s=0.3,
    drain_total_s=2.0,
    linger_s=2.0,
    stop_linger_s=0.5,
    creation_timeout_s=60.0,
    probe_interval_s=0.2,
)
"""The usual limits, with less patience."""


class Harness:
    """A running plugin. ``keys`` are those of the section StreamingServer; any free port is the default."""

    def __init__(
        self, keys: Mapping[str, Any] | None = None, limits: Limits | None = None, runtime: object | None = None
    ) -> None:
        self.runtime = runtime if isinstance(runtime, LocalRuntime) else LocalRuntime()
        self.plugin = Streaming(limits or QUICK)
        plugins = {"streaming": self.plugin, "runtime": self.runtime if runtime is None else runtime}
        self.manager = testing.manager(**plugins)
        parsed = config.parse({"StreamingServer": {"Port": 0, **(keys or {})}}, [StreamingServerSection])
        self.manager.hook.shim_configure.call_historic(kwargs={"shim": Shim(parsed, self.manager.hook)})
        self.plugin.shim_startup()

    @property
    def server(self) -> StreamingServer:
        server = self.plugin._server
        assert server is not None
        return server

    @property
    def base_url(self) -> str:
        return self.server.base_url

    @property
    def port(self) -> int:
        sock = self.server._sock
        assert sock is not None
        return int(sock.getsockname()[1])

    def close(self) -> None:
        self.plugin.shim_shutdown()

    def exec_url(self, *command: str, **fields: Any) -> str:
        fields = {"stdout": True, "stderr": not fields.get("tty", False), "container_id": CONTAINER, **fields}
        request = pb.ExecRequest(cmd=command, **fields)
        return str(self.manager.hook.cri_exec(request=request, context=testing.context("Exec")).url)

    def attach_url(self, container_id: str, **fields: Any) -> str:
        fields = {"stdin": True, "stdout": True, "stderr": not fields.get("tty", False), **fields}
        request = pb.AttachRequest(container_id=container_id, **fields)
        return str(self.manager.hook.cri_attach(request=request, context=testing.context("Attach")).url)

    def forward_url(self, *ports: int) -> str:
        request = pb.PortForwardRequest(pod_sandbox_id=SANDBOX, port=ports)
        return str(self.manager.hook.cri_port_forward(request=request, context=testing.context("PortForward")).url)

    def sessions(self) -> int:
        return int(self.server.state()["sessions"])


def limits(**changes: Any) -> Limits:
    """``QUICK`` with other values."""
    return replace(QUICK, **changes)


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Wait until a condition holds.

    :raises AssertionError: it doesn't, in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)
