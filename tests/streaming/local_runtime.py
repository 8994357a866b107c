"""A runtime for the tests: what runs in its containers runs on this machine, on the session's own descriptors."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import FailedPrecondition, NotFound, Unavailable
from shim_core.hookspecs import hookimpl
from shim_core.types import AttachSession, ExecSession, PortForwardSession

CONTAINER = "c" * 64
SANDBOX = "5" * 64


@dataclass
class Container:
    """A container whose main process has its streams on pipes, as the runtime would keep them."""

    process: subprocess.Popen[bytes]
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def run(cls, *command: str) -> Container:
        return cls(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass


class LocalRuntime:
    """Answers the streaming hooks. ``containers`` may be attached to; exec works in ``CONTAINER`` and in those."""

    def __init__(self) -> None:
        self.containers: dict[str, Container] = {}
        self.running = 0
        self.killed = 0
        self.dialled: list[int] = []
        self.on_exec: Callable[[ExecSession, CallContext], int | None] | None = None
        self.on_terminal: Callable[[ExecSession], tuple[int, int] | None] | None = None
        self.on_dial: Callable[[PortForwardSession], socket.socket | None] | None = None
        self._lock = threading.Lock()

    @hookimpl
    def cri_version(self) -> pb.VersionResponse:
        return pb.VersionResponse(
            version="0.1.0", runtime_name="local", runtime_version="1.0.0", runtime_api_version="v1"
        )

    @hookimpl
    def cri_image_fs_info(self) -> pb.ImageFsInfoResponse:
        return pb.ImageFsInfoResponse()  # crictl asks before anything else

    @hookimpl
    def stream_check(self, session: ExecSession | AttachSession | PortForwardSession) -> bool:
        if isinstance(session, PortForwardSession):
            if session.sandbox_id != SANDBOX:
                raise NotFound(f"no sandbox {session.sandbox_id}")
        elif session.container_id != CONTAINER and session.container_id not in self.containers:
            raise NotFound(f"no container {session.container_id}")
        return True

    @hookimpl
    def stream_terminal(self, session: ExecSession) -> tuple[int, int] | None:
        return self.on_terminal(session) if self.on_terminal else None

    @hookimpl
    def stream_exec(self, session: ExecSession, context: CallContext) -> int | None:
        with self._lock:
            self.running += 1
        try:
            return self.on_exec(session, context) if self.on_exec else self.execute(session, context)
        finally:
            with self._lock:
                self.running -= 1

    def execute(self, session: ExecSession, context: CallContext) -> int:
        """Run the command as a process of this machine."""
        # setsid makes the terminal the controlling one, and the process the leader of a session that can be killed.
        # Signals that we ignore, started in the background perhaps, are none that a container's process ignores.
        command = ["env", "--default-signal", "setsid", *(["--ctty"] if session.tty else []), *session.command]

        def stream(fd: int | None) -> int:
            return subprocess.DEVNULL if fd is None else fd

        try:
            process = subprocess.Popen(
                command, stdin=stream(session.stdin), stdout=stream(session.stdout), stderr=stream(session.stderr)
            )
        except OSError as err:
            raise FailedPrecondition(f"{session.command[0]}: {err.strerror}") from err

        def kill() -> None:
            with self._lock:
                self.killed += 1
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()

        forget = context.on_cancel(kill)
        code = process.wait()
        forget()
        return 128 - code if code < 0 else code

    @hookimpl
    def stream_attach(self, session: AttachSession, context: CallContext) -> bool:
        container = self.containers[session.container_id]
        process = container.process
        assert process.stdin
        assert process.stdout
        assert process.stderr
        if session.on_resize:
            session.on_resize(lambda columns, rows: container.sizes.append((columns, rows)))
        cancelled = os.eventfd(0)
        forget = context.on_cancel(lambda: os.eventfd_write(cancelled, 1))
        routes = {process.stdout.fileno(): session.stdout, process.stderr.fileno(): session.stderr}
        if session.stdin is not None:
            routes[session.stdin] = process.stdin.fileno()
        try:
            while routes.keys() - {session.stdin}:
                ready, _, _ = select.select([*routes, cancelled], [], [])
                if cancelled in ready:
                    break
                for fd in ready:
                    data = os.read(fd, 65536)
                    target = routes[fd]
                    if not data:
                        del routes[fd]
                        if fd == session.stdin:
                            process.stdin.close()
                    elif target is not None:
                        _write_all(target, data)
        except BrokenPipeError:
            pass
        finally:
            forget()
            os.close(cancelled)
        return True

    @hookimpl
    def stream_port_forward(self, session: PortForwardSession) -> socket.socket | None:
        self.dialled.append(session.port)
        if self.on_dial:
            return self.on_dial(session)
        try:
            return socket.create_connection(("127.0.0.1", session.port), timeout=60)
        except OSError as err:
            raise Unavailable(f"sandbox {session.sandbox_id[:13]}: port {session.port}: {err.strerror}") from err


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
