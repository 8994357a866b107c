"""The plugin: CRI's Exec, Attach and PortForward, answered with URLs of the streaming server.

The runtime's side is in the hooks ``stream_check``, ``stream_exec``, ``stream_attach`` and ``stream_port_forward``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument, Unavailable, Unimplemented
from shim_core.hookspecs import hookimpl
from shim_core.types import AttachSession, ExecSession, PortForwardSession, Shim
from shim_streaming.limits import Limits
from shim_streaming.server import StreamingServer
from shim_streaming.settings import StreamingServerSection
from shim_streaming.tickets import CommandTicket, ForwardTicket, Ticket


class Streaming:
    """Entry point ``streaming`` of the group ``shim.plugins``."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._hooks: Any = None
        self._server: StreamingServer | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    @hookimpl
    def shim_config_section(self) -> type[StreamingServerSection]:
        return StreamingServerSection

    @hookimpl
    def shim_configure(self, shim: Shim) -> None:
        self._hooks = shim.hooks
        self._server = StreamingServer(shim.config.get(StreamingServerSection), shim.hooks, self._limits)

    @hookimpl
    def shim_startup(self) -> None:
        self._running().start()

    @hookimpl
    def shim_shutdown(self) -> None:
        if self._server is not None:
            self._server.stop()

    @hookimpl
    def runtime_info(self) -> Mapping[str, str]:
        return {"streaming": json.dumps(self._server.state())} if self._server is not None else {}

    # -- CRI -----------------------------------------------------------------------------------------------------------

    @hookimpl
    def cri_exec(self, request: pb.ExecRequest, context: CallContext) -> pb.ExecResponse:
        command = tuple(request.cmd)
        if not command:
            raise InvalidArgument("cmd: is empty; name the command to run")
        if sum(len(word.encode()) + 1 for word in command) > self._limits.command_bytes:
            raise InvalidArgument(f"cmd: longer than {self._limits.command_bytes} bytes; pass data by stdin")
        _check_streams(request)
        session = ExecSession(request.container_id, command, request.tty)
        ticket = CommandTicket(
            "exec", context.request_id, request.container_id, command,
            request.tty, request.stdin, request.stdout, request.stderr,
        )  # fmt: skip
        return pb.ExecResponse(url=self._url(session, ticket, context))

    @hookimpl
    def cri_attach(self, request: pb.AttachRequest, context: CallContext) -> pb.AttachResponse:
        _check_streams(request)
        session = AttachSession(request.container_id, request.tty)
        ticket = CommandTicket(
            "attach", context.request_id, request.container_id, (),
            request.tty, request.stdin, request.stdout, request.stderr,
        )  # fmt: skip
        return pb.AttachResponse(url=self._url(session, ticket, context))

    @hookimpl
    def cri_port_forward(self, request: pb.PortForwardRequest, context: CallContext) -> pb.PortForwardResponse:
        if not request.pod_sandbox_id:
            raise InvalidArgument("pod_sandbox_id: is empty")
        for port in request.port:
            if not 0 < port < 65536:
                raise InvalidArgument(f"port: {port} is none; ports are numbers from 1 to 65535")
        ports = tuple(request.port)
        session = PortForwardSession(request.pod_sandbox_id, ports[0] if ports else 0)
        ticket = ForwardTicket(context.request_id, request.pod_sandbox_id, ports)
        return pb.PortForwardResponse(url=self._url(session, ticket, context))

    def _url(
        self, session: ExecSession | AttachSession | PortForwardSession, ticket: Ticket, context: CallContext
    ) -> str:
        server = self._running()
        if self._hooks.stream_check(session=session, context=context) is None:
            raise Unimplemented(f"{context.rpc}: no runtime plugin can stream")
        return server.url(ticket)

    def _running(self) -> StreamingServer:
        if self._server is None:
            raise Unavailable("the streaming server is not configured yet")
        return self._server


def _check_streams(request: pb.ExecRequest | pb.AttachRequest) -> None:
    if not request.container_id:
        raise InvalidArgument("container_id: is empty")
    if request.tty and request.stderr:
        raise InvalidArgument("stderr: a terminal has one output only; with tty, leave stderr unset")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("stdin, stdout, stderr: none of them is asked for; set one at least")
