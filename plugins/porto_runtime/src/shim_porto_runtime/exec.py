"""Running further processes in a container: ExecSync, and what the streaming server asks for."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from porto_api import Connection, rpc_pb2
from porto_api import errors as porto
from shim_core.context import CallContext
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import DeadlineExceeded, FailedPrecondition, Internal, UnknownError
from shim_core.types import ExecSession
from shim_porto_runtime import container, process, spec, states
from shim_porto_runtime.porto_errors import is_of_gone_process, porto_errors
from shim_porto_runtime.records import ContainerRecord, ContainerState
from shim_porto_runtime.starting import Report

if TYPE_CHECKING:
    from shim_porto_runtime.runtime import Runtime

MAX_OUTPUT_BYTES = 16 * 1024 * 1024 - 4096
"""For both streams together, so that the whole reply fits the 16 MiB a client takes (CRI, ExecSyncResponse)."""

_CHUNK = 65536
_LONGEST_S = 365 * 86400.0


def exec_sync(rt: Runtime, request: pb.ExecSyncRequest, context: CallContext) -> pb.ExecSyncResponse:
    """ExecSync: returns when the command has exited, with what it has written until then.

    A child it leaves behind with the pipes open is not waited for. What exceeds the limit is read and dropped.
    """
    record = running(rt, request.container_id)
    deadline = time.monotonic() + (request.timeout if request.timeout > 0 else _LONGEST_S)
    wanted = process.for_exec(process.Process.from_json(record.process), request.cmd, tty=False)
    with Output() as output:
        with _Exec(rt, record, wanted, (None, output.stdout.write_fd, output.stderr.write_fd), context) as running_exec:
            output.close_write_ends()
            while not running_exec.poll(output.read_fds, deadline, context):
                output.read()
                _check(request, deadline, context)
            output.drain()
            code = running_exec.result()
        return pb.ExecSyncResponse(stdout=bytes(output.stdout.data), stderr=bytes(output.stderr.data), exit_code=code)


def stream_exec(rt: Runtime, session: ExecSession, context: CallContext) -> int:
    """Run a command over descriptors that a streaming server has opened; the exit code.

    :raises UnknownError: it can't be started.   :raises Cancelled: the client has gone; the process is killed.
    """
    record = running(rt, session.container_id)
    wanted = process.for_exec(process.Process.from_json(record.process), session.command, tty=session.tty)
    streams = (session.stdin, session.stdout, session.stdout if session.tty else session.stderr)
    with _Exec(rt, record, wanted, streams, context) as running_exec:
        running_exec.poll((), time.monotonic() + _LONGEST_S, context)
        context.check()
        return running_exec.result()


def running(rt: Runtime, container_id: str) -> ContainerRecord:
    """A container that processes can be run in.

    :raises NotFound: no such container.   :raises FailedPrecondition: it doesn't run.
    """
    record = container.get(rt, container_id)
    if record.state is not ContainerState.RUNNING:
        raise FailedPrecondition(f"container {record.id[:13]} is {record.state.value}; it has to run")
    return record


def _check(request: pb.ExecSyncRequest, deadline: float, context: CallContext) -> None:
    if time.monotonic() >= deadline:
        raise DeadlineExceeded(f"command {request.cmd[0]!r} timed out after {request.timeout} s")
    context.check()


class _Exec:
    """A process in a container, killed at the end of the block unless it has exited.

    It is a weak child of the container's: should this daemon die, portod ends it with our connection.
    """

    def __init__(
        self,
        rt: Runtime,
        record: ContainerRecord,
        wanted: process.Process,
        streams: tuple[int | None, int | None, int | None],
        context: CallContext,
    ) -> None:
        self._rt = rt
        self._record = record
        self._process = wanted
        self._streams = streams
        self._context = context
        self._name = rt.names.exec(record.sandbox_id, record.id)
        self._report = Report(rt.directories.helper(record.id))
        self._exited = False

    def __enter__(self) -> _Exec:
        made = spec.exec_(self._name, self._process.bounding, self._record.limits.oom_score_adj)
        process.into_spec(self._process, made, self._report.name)
        made.stdin_path, made.stdout_path, made.stderr_path = map(container.stream_path, self._streams)
        with porto_errors("starting the command"):
            self._session = self._rt.porto.session()
            self._connection: Connection = self._session.__enter__()
        try:
            self._report.__enter__()
            try:
                self._start(made)
            except BaseException:
                self._report.__exit__(None, None, None)
                raise
        except BaseException:
            self._connection.close()
            raise
        return self

    def _start(self, made: rpc_pb2.TContainerSpec) -> None:
        with porto_errors("starting the command"):
            try:
                self._rt.porto.create_from_spec(made, start=True, connection=self._connection)
            except (porto.InvalidState, porto.ContainerDoesNotExist, porto.Unknown) as err:
                if isinstance(err, porto.Unknown) and not is_of_gone_process(err):
                    raise
                states.refresh_container(self._rt, self._record)
                raise FailedPrecondition(f"container {self._record.id[:13]} no longer runs") from err
            self._connection.send(self._rt.porto.wait_request([self._name]))

    def __exit__(self, *exc: object) -> None:
        try:
            if not self._exited:
                # Closing the connection would do, but not before it returns: nothing may run after a time-out.
                with porto_errors("ending the command"):
                    try:
                        self._rt.porto.destroy(self._name)
                    except porto.ContainerDoesNotExist:
                        pass
        finally:
            # portod destroys the weak container once it sees the connection closed; nobody has to wait for that.
            self._connection.close()
            self._report.__exit__(None, None, None)

    def poll(self, fds: tuple[int, ...], deadline: float, context: CallContext) -> bool:
        """Wait until the process has exited (True), or there is something to read, or time is up (False)."""
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        for fd in fds:
            poller.register(fd, select.POLLIN)
        with _waker(context) as wake_fd:
            poller.register(wake_fd, select.POLLIN)
            timeout_ms = max(min(deadline - time.monotonic(), 86400.0), 0.0) * 1000
            ready = {fd for fd, _ in poller.poll(timeout_ms)}
        if self._connection.fileno() in ready:
            with porto_errors("waiting for the command"):
                self._connection.receive(time.monotonic() + self._rt.porto.timeout_s)
            self._exited = True
        return self._exited

    def result(self) -> int:
        """The exit code.

        :raises UnknownError: the command could not be run.
        """
        problem = self._report.text()
        if problem:
            raise UnknownError(f"container {self._record.id[:13]}: {problem}")
        with porto_errors("asking for the exit status"):
            answer = self._rt.porto.get([self._name], ["exit_status", "oom_killed"], connection=self._connection)
        values = answer.get(self._name, {})
        if values.get("oom_killed") == "true":
            return states.OOM_EXIT
        status = values.get("exit_status")
        if not isinstance(status, str):
            raise Internal(f"container {self._record.id[:13]}: Porto gave no exit status: {status}")
        return states.exit_code(int(status))


@contextmanager
def _waker(context: CallContext) -> Iterator[int]:
    """A descriptor that becomes readable when the call is cancelled."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    forget = context.on_cancel(lambda: os.eventfd_write(fd, 1))
    try:
        yield fd
    finally:
        forget()
        os.close(fd)


@dataclass(slots=True)
class _Pipe:
    read_fd: int
    write_fd: int
    data: bytearray
    open: bool = True


class Output:
    """Two pipes and what came through them, up to a limit for both together."""

    def __init__(self, limit_bytes: int = MAX_OUTPUT_BYTES) -> None:
        self._left = limit_bytes

    def __enter__(self) -> Output:
        self.stdout = _pipe()
        self.stderr = _pipe()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_write_ends()
        os.close(self.stdout.read_fd)
        os.close(self.stderr.read_fd)

    def close_write_ends(self) -> None:
        for pipe in (self.stdout, self.stderr):
            if pipe.write_fd >= 0:
                os.close(pipe.write_fd)
                pipe.write_fd = -1

    @property
    def read_fds(self) -> tuple[int, ...]:
        """Those that may still have something."""
        return tuple(pipe.read_fd for pipe in (self.stdout, self.stderr) if pipe.open)

    def read(self) -> bool:
        """Take what is there, at most a chunk of each; False when there was nothing."""
        got = False
        for pipe in (self.stdout, self.stderr):
            if not pipe.open:
                continue
            try:
                chunk = os.read(pipe.read_fd, _CHUNK)
            except BlockingIOError:
                continue
            if not chunk:
                pipe.open = False
                continue
            got = True
            kept = chunk[: self._left]
            pipe.data += kept
            self._left -= len(kept)
        return got

    def drain(self) -> None:
        """Take all that the process had written when it exited, and nothing its children write after that."""
        budget = 2 * _PIPE_BYTES // _CHUNK + 2
        while budget and self.read():
            budget -= 1


_PIPE_BYTES = 1024 * 1024
"""The most a pipe can hold, by /proc/sys/fs/pipe-max-size."""


def _pipe() -> _Pipe:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read_fd, False)
    return _Pipe(read_fd, write_fd, bytearray())
