"""The shim's side of the stream keeper."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from shim_core import errors
from shim_porto_runtime.keeper import protocol
from shim_porto_runtime.keeper.connection import Connector, check, pause, remaining, source_digest

AttachEnd = Literal["ended", "gone", "cancelled"]
"""Why an attached session is over: the container's output has ended; the session's other side has gone; cancelled."""

T = TypeVar("T", "ContainerStatus", "KeeperStats")

DEFAULT_TIMEOUT_S = 10.0
IDLE_EXIT_S = 60.0


@dataclass(frozen=True, slots=True)
class ContainerStreams:
    """The container's ends of its streams: to be held while the container is started, and closed then.

    Nobody else has them: when they are closed and the container hasn't opened them, its output has ended.
    With a terminal all three are the same descriptor.
    """

    stdin: int | None
    stdout: int
    stderr: int
    _open: set[int] = field(init=False, repr=False, compare=False, default_factory=set)

    def __post_init__(self) -> None:
        self._open.update(fd for fd in (self.stdin, self.stdout, self.stderr) if fd is not None)

    def close(self) -> None:
        """Close the descriptors; nothing happens the second time."""
        while self._open:
            os.close(self._open.pop())

    def __enter__(self) -> ContainerStreams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    """What the keeper knows of a container."""

    id: str
    log: str
    """The path of its log; empty when it has none."""
    tty: bool
    running: bool
    """Whether anybody has the container's output open: the container, or a process it has left behind."""
    stdin: bool
    """Whether it has a stdin that isn't closed."""
    clients: int
    dropped_bytes: int
    """Output that is not in the log because the log couldn't be written."""


@dataclass(frozen=True, slots=True)
class KeeperStats:
    """The keeper at a glance."""

    protocol: int
    pid: int
    holder_pid: int
    build: str = ""
    """Says which code it runs; see :meth:`KeeperClient.is_current`."""
    resident_bytes: int = 0
    """Memory of the worker; most of the holder's is the same."""
    descriptors: int = 0
    containers: int = 0
    running: int = 0
    clients: int = 0
    dropped_bytes: int = 0


class KeeperClient:
    """Talks to the stream keeper of a directory; starts it when the first container needs it.

    Every method may be called from any thread. A keeper that restarts in the middle of a call is waited for and asked
    again, until the call's time is up: all calls may be repeated.

    All methods raise :class:`~shim_core.errors.Unavailable` when the keeper can't be reached, and
    :class:`~shim_core.errors.DeadlineExceeded` when it doesn't answer in time.

    :param directory: where its socket is, or will be: ``StateDir/keeper``, below which nobody else may write.
    :param timeout_s: how long a call may take.
    :param idle_exit_s: how long a keeper that this client starts stays with nothing to do.
    :param log_file: where a keeper that this client starts writes its messages; by default ``keeper.log`` in the
        directory.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        idle_exit_s: float = IDLE_EXIT_S,
        log_file: str | os.PathLike[str] | None = None,
    ) -> None:
        path = os.path.abspath(directory)
        log = os.path.abspath(log_file or os.path.join(path, protocol.LOG_NAME))
        self._connector = Connector(path, idle_exit_s, log)
        self._timeout_s = timeout_s

    # -- containers ----------------------------------------------------------------------------------------------------

    def open(
        self,
        container_id: str,
        *,
        log_directory: str = "",
        log_path: str = "",
        tty: bool = False,
        stdin: bool = False,
        stdin_once: bool = False,
    ) -> ContainerStreams:
        """Make a container's streams, and open its log. The streams of an earlier call with this id are given up.

        :param log_directory: an absolute path (CRI ``PodSandboxConfig.log_directory``).
        :param log_path: the log, relative to it (CRI ``ContainerConfig.log_path``); empty for no log.
        :param stdin_once: close stdin when the first client that was attached to it has no more input.
        :raises InvalidArgument: the log would be outside ``log_directory``, or there is a symlink on the way.
        :raises ResourceExhausted: the disk is full, or the keeper has no descriptors or memory left.
        """
        request = {
            "op": "open",
            "id": container_id,
            "log_directory": log_directory,
            "log_path": log_path,
            "tty": tty,
            "stdin": stdin,
            "stdin_once": stdin_once,
        }
        answer, fds = self._call(request, start=True)
        by_name = dict(zip(answer["fds"], fds, strict=True))
        if tty:
            terminal = by_name["terminal"]
            return ContainerStreams(terminal, terminal, terminal)
        return ContainerStreams(by_name.get("stdin"), by_name["stdout"], by_name["stderr"])

    def reopen(self, container_id: str) -> None:
        """Open the log anew by its path, after somebody has renamed it (CRI ``ReopenContainerLog``).

        :raises NotFound: no such container.   :raises FailedPrecondition: its output has ended, or it has no log.
        """
        self._call({"op": "reopen", "id": container_id})

    def flush(self, container_id: str, timeout_s: float | None = None) -> None:
        """Return when everything the container has written so far is in its log, an unfinished last line too.

        Doesn't wait for the end of its output, which a process it left in the background may delay for ever.

        :raises NotFound: no such container.
        """
        self._call({"op": "flush", "id": container_id}, timeout_s=timeout_s)

    def attach(
        self,
        container_id: str,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        cancel: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> AttachEnd:
        """Connect a session to the container's streams until it is over; the container doesn't notice.

        A session that takes its output too slowly is ended when 1 MiB waits for it: the container doesn't wait. A
        keeper that is killed meanwhile may cost the session (not the log) what it had in hand.

        :param stdin: read, until it ends; with the container's ``stdin_once`` that closes the container's stdin.
        :param stdout: written; so is ``stderr``. Pipes, sockets, terminals and files will do; all stay the caller's.
        :param cancel: registers a function that ends the session, and returns one that takes it back:
            ``CallContext.on_cancel``.
        :raises NotFound: no such container.
        :raises ResourceExhausted: the session was too slow; or too many are attached.
        """
        fds = {name: fd for name, fd in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)) if fd is not None}
        request = {"op": "attach", "id": container_id, "fds": list(fds)}
        alarm = _Alarm()
        undo = cancel(alarm.ring) if cancel is not None else None
        try:
            return self._attach(request, list(fds.values()), alarm.fd)
        finally:
            if undo is not None:
                undo()
            alarm.close()

    def resize(self, container_id: str, columns: int, rows: int) -> None:
        """Set the size of the container's terminal.

        :raises NotFound: no such container.   :raises FailedPrecondition: it has no terminal (any more).
        :raises InvalidArgument: not 1 to 65535.
        """
        self._call({"op": "resize", "id": container_id, "columns": columns, "rows": rows})

    def close_stdin(self, container_id: str) -> None:
        """Let the container read end-of-file; nothing happens if it has no stdin (any more).

        :raises NotFound: no such container.
        """
        self._call({"op": "close-stdin", "id": container_id})

    def close(self, container_id: str) -> None:
        """Forget a container, after what it has written is in its log; nothing happens if there is none of that id.

        A process of it that still writes gets SIGPIPE.
        """
        try:
            self._call({"op": "close", "id": container_id})
        except errors.NotFound:
            pass

    def list(self) -> Sequence[ContainerStatus]:
        """All containers; none when no keeper runs."""
        found: deque[ContainerStatus] = deque()
        more = True
        while more:
            try:
                answer, _ = self._call({"op": "list", "after": found[-1].id if found else ""})
            except errors.NotFound:
                return ()
            found += [_known(ContainerStatus, item) for item in answer["containers"]]
            more = answer["more"]
        return tuple(found)

    # -- the keeper ----------------------------------------------------------------------------------------------------

    def ensure_running(self) -> None:
        """Start the keeper if there is none."""
        self._call({"op": "stats"}, start=True)

    def stats(self) -> KeeperStats | None:
        """The keeper's own figures; None when none runs."""
        try:
            answer, _ = self._call({"op": "stats"})
        except errors.NotFound:
            return None
        return _known(KeeperStats, answer)

    def is_current(self) -> bool:
        """Whether the keeper, if one runs, runs the code that is installed now."""
        stats = self.stats()
        return stats is None or stats.build == source_digest()

    def upgrade(self) -> bool:
        """Have the installed code take over from a keeper that runs another; True if that was to be done.

        For the shim's start: one that was upgraded brings its keeper along.

        :raises Unavailable: it didn't work; the older one goes on.
        """
        if self.is_current():
            return False
        self.hand_over()
        return True

    def hand_over(self, timeout_s: float = 30.0) -> None:
        """Have a new keeper take everything over from the one that runs: an upgrade. Nothing is lost.

        :raises FailedPrecondition: none runs.
        :raises Unavailable: it didn't work; the older one goes on.
        """
        before = self.stats()
        if before is None:
            raise errors.FailedPrecondition("no stream keeper runs that could hand over")
        status = self._connector.run("take-over", timeout_s)
        after = self.stats()
        if status != 0 or after is None or after.pid == before.pid:
            raise errors.Unavailable(f"the stream keeper's hand-over has failed (see {self._connector.log_file})")

    def stop(self, *, force: bool = False) -> None:
        """End the keeper, if one runs.

        :param force: even if containers use it: they get SIGPIPE when they write.
        :raises FailedPrecondition: containers use it.
        """
        try:
            self._call({"op": "stop", "force": force})
        except errors.NotFound:
            pass

    # -- below ---------------------------------------------------------------------------------------------------------

    def _call(
        self, request: dict[str, Any], *, start: bool = False, timeout_s: float | None = None
    ) -> tuple[dict[str, Any], Sequence[int]]:
        return self._connector.call(request, self._timeout_s if timeout_s is None else timeout_s, start=start)

    def _attach(self, request: dict[str, Any], fds: Sequence[int], cancelled: int) -> AttachEnd:
        """One session, with as many keepers as it lives to see."""
        attached = False
        deadline = time.monotonic() + self._timeout_s
        while True:
            attached_here = False
            try:
                with self._connector.connect(deadline, start=False) as connection:
                    protocol.send(connection, {"v": protocol.VERSION, **request}, fds)
                    while True:
                        limit_s = None if attached_here else remaining(deadline)
                        ready = _wait((connection.fileno(), cancelled), limit_s)
                        if cancelled in ready:
                            return "cancelled"
                        if not ready:
                            raise errors.DeadlineExceeded("the stream keeper hasn't taken the session in time")
                        packet = protocol.receive(connection)
                        if packet is None:
                            break
                        check(packet[0])
                        attached = attached_here = True
                        if "end" in packet[0]:
                            return _attach_end(packet[0]["end"], request["id"])
            except errors.NotFound:
                if attached:
                    return "ended"  # its keeper is gone, and its streams with it
                raise
            except (OSError, protocol.ProtocolError):
                pass
            if cancelled in _wait((cancelled,), 0.0):
                return "cancelled"
            if attached_here:
                deadline = time.monotonic() + self._timeout_s  # for the next keeper to take it
            pause(deadline, "the stream keeper has ended in the middle of attach")


def _attach_end(reason: str, container_id: str) -> AttachEnd:
    if reason == "slow":
        raise errors.ResourceExhausted(
            f"container {container_id}: the attached session took its output too slowly; read the log instead"
        )
    return "ended" if reason == "ended" else "gone"


def _known(kind: type[T], values: dict[str, Any]) -> T:
    """The values that this client knows; a newer keeper may say more."""
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def _wait(sources: Sequence[int], timeout_s: float | None) -> list[int]:
    """The descriptors that can be read."""
    poll = select.poll()
    for source in sources:
        poll.register(source, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)]


class _Alarm:
    """A descriptor that becomes readable when somebody rings, which may be after everything is over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.fd, self._bell = os.pipe()
        self._closed = False

    def ring(self) -> None:
        with self._lock:
            if not self._closed:
                os.write(self._bell, b"\0")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self.fd)
            os.close(self._bell)
