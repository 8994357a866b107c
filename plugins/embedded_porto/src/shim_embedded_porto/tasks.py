"""The daemon's side of the keeper: starting containers' processes and hearing of their end."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porto_api import rpc_pb2 as pb
from shim_embedded_porto import keeper, launch, limits
from shim_embedded_porto.client import process_start
from shim_embedded_porto.container import Task
from shim_embedded_porto.errors import Fault, system
from shim_embedded_porto.plan import Plan

logger = logging.getLogger("shim.embedded_porto.tasks")

_RETRY_S = 1.0
_REAPED_TIMEOUT_MS = 2000
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3
_BOOT = "import sys; sys.path.insert(0, sys.argv.pop()); from shim_embedded_porto.keeper import main; main()"


@dataclass(frozen=True, slots=True)
class End:
    """How a container's process ended."""

    key: str
    status: int
    """As of wait(2)."""
    time: float
    """Seconds since the epoch."""


class Tasks:
    """Connects to the keeper, or starts one.

    :param directory: where the socket and the exit files are; private to root.
    :param on_end: called for every end, from one thread at a time. An end is forgotten by :meth:`forget`.
    :param on_loss: called when the keeper has died and there is another: what ran has to be :meth:`watch`ed.
    """

    def __init__(self, directory: Path, on_end: Callable[[End], None], on_loss: Callable[[], None]) -> None:
        self._directory = directory
        self._exits = directory / "exits"
        self._on_end = on_end
        self._on_loss = on_loss
        self._lock = threading.Lock()
        self._pending: dict[str, _Pending] = {}
        self._socket: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self._orphans = _Orphans(self._orphan_ended)
        self._closing = False
        self.running: dict[str, Task] = {}
        """What the keeper looked after when we connected."""
        self.ends: list[End] = []
        """What ended while nobody listened."""

    def connect(self) -> None:
        """Find the keeper, or start one, and learn what it looks after.

        :raises Fault: it can't be started.
        """
        self._exits.mkdir(mode=0o700, parents=True, exist_ok=True)
        sock = self._open()
        state = _ask(sock) if sock is not None else None
        if sock is None or state is None:
            # There is none, or it was about to end.
            sock = self._spawn()
            state = _ask(sock)
        if state is None:
            raise Fault(pb.Unknown, f"the keeper has ended at once, see {self._directory / 'keeper.log'}")
        self.running = {entry["key"]: _task(entry) for entry in state["running"]}
        self.ends = [End(entry["key"], entry["status"], entry["time"]) for entry in state["ends"]]
        self._socket = sock
        self._reader = threading.Thread(target=self._read, args=(sock,), name="keeper", daemon=True)
        self._reader.start()

    def close(self, *, quit_keeper: bool = False) -> None:
        """Disconnect; ``quit_keeper`` ends the keeper, though it may have containers."""
        self._closing = True
        if self._socket is not None:
            try:
                if quit_keeper:
                    self._socket.send(b'{"do": "quit"}')
                    if self._reader is not None:
                        self._reader.join(timeout=5)  # it hears the keeper's end
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            if self._reader is not None:
                self._reader.join(timeout=5)
            self._socket.close()
        self._orphans.close()

    # -- operations ------------------------------------------------------------------------------------------------

    def start(self, plan: Plan, fds: Sequence[int]) -> Task:
        """Carry out a plan; returns once the command is executed, or the namespaces are there.

        :param fds: what the plan's indexes name. They stay the caller's.
        :raises Fault: what went wrong on the way.
        """
        pending = _Pending()
        with self._lock:
            self._pending[plan["key"]] = pending
        file = os.memfd_create("plan")
        try:
            os.write(file, json.dumps(plan).encode())
            os.lseek(file, 0, os.SEEK_SET)
            with self._lock:
                if self._socket is None:
                    raise Fault(pb.Unknown, "the keeper is away", errno.ECONNREFUSED)
                socket.send_fds(self._socket, [b'{"do": "start"}'], [file, *fds])
            if not pending.done.wait(limits.START_TIMEOUT_S):
                raise Fault(pb.Unknown, "timeout while starting", errno.ETIMEDOUT)
        except OSError as err:
            raise system(err, "keeper") from err
        finally:
            os.close(file)
            with self._lock:
                self._pending.pop(plan["key"], None)
        if pending.fault is not None:
            raise pending.fault
        assert pending.task is not None
        return pending.task

    def exit_file(self, key: str) -> int:
        """A descriptor of the file the exit status goes to when the keeper doesn't hear of it."""
        return os.open(self._exit_path(key), os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def forget(self, key: str) -> None:
        """The end of a task has been taken note of, for good."""
        self._exit_path(key).unlink(missing_ok=True)
        with self._lock:
            sock = self._socket
        if sock is not None:
            try:
                sock.send(json.dumps({"do": "forget", "key": key}).encode())
            except OSError:
                pass  # a new keeper knows nothing of it

    def watch(self, task: Task, *, exact_status: bool) -> None:
        """Look after a process whose keeper is gone: its end is noticed.

        Its status is known if it leaves one, or if the kernel remembers it (Linux 6.15); otherwise it is 0.

        :param exact_status: see :class:`plan.Plan`.
        """
        self._orphans.add(task.key, task.wait_pid, exact_status=exact_status)

    def recorded_end(self, key: str) -> End | None:
        """What a task, or the keeper in its stead, has left in its exit file, if anything."""
        try:
            path = self._exit_path(key)
            text = path.read_text()
            if text.startswith("{"):
                return End(**json.loads(text))
            return End(key, launch.decode(int(text)), path.stat().st_mtime) if text else None
        except (OSError, ValueError, TypeError):
            return None

    def exit_keys(self) -> list[str]:
        """The starts that have an exit file, and what was left half written."""
        return [path.name for path in self._exits.iterdir()]

    def _exit_path(self, key: str) -> Path:
        return self._exits / key

    # -- the connection --------------------------------------------------------------------------------------------

    @property
    def _socket_path(self) -> str:
        return str(self._directory / "keeper.socket")

    def _open(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(self._socket_path)
        except OSError:
            sock.close()
            return None
        return sock

    def _spawn(self) -> socket.socket:
        Path(self._socket_path).unlink(missing_ok=True)
        package = str(Path(keeper.__file__).parent.parent)
        command = [sys.executable, "-I", "-S", "-c", _BOOT, self._socket_path, package]
        log_fd = os.open(self._directory / "keeper.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(log_fd, "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert process.stdout is not None
        with process.stdout:
            ready = process.stdout.readline()
        if not ready:
            raise Fault(pb.Unknown, f"the keeper can't be started, see {self._directory / 'keeper.log'}")
        # Reaped when it ends; it usually outlives us.
        threading.Thread(target=process.wait, name="keeper-process", daemon=True).start()
        sock = self._open()
        if sock is None:
            raise Fault(pb.Unknown, "the keeper has ended at once")
        return sock

    def _read(self, sock: socket.socket) -> None:
        while True:
            try:
                data = sock.recv(keeper.MESSAGE_MAX)
            except OSError:
                data = b""
            if not data:
                break
            try:
                self._hear(json.loads(data))
            except Exception:
                logger.exception("can't handle a message of the keeper")
        if not self._closing:
            self._replace_keeper()

    def _hear(self, message: dict[str, Any]) -> None:
        key = message["key"]
        if message["tell"] == "ended":
            self._on_end(End(key, message["status"], message["time"]))
            return
        with self._lock:
            pending = self._pending.get(key)
        if pending is None:
            return
        if message["tell"] == "running":
            pending.task = _task(message)
        else:
            pending.fault = Fault(pb.EError.Value(message["error"]), message["text"], message["errno"])
        pending.done.set()

    def _replace_keeper(self) -> None:
        logger.error("the keeper has died: containers go on, but the exit statuses of some will be lost")
        with self._lock:
            self._socket = None
            for pending in self._pending.values():
                pending.fault = Fault(pb.Unknown, "the keeper has died")
                pending.done.set()
        self._on_loss()
        while not self._closing:
            try:
                self.connect()
                return
            except (Fault, OSError):
                logger.exception("can't start another keeper")
                time.sleep(_RETRY_S)

    def _orphan_ended(self, key: str, status: int) -> None:
        self._on_end(self.recorded_end(key) or End(key, status, time.time()))


def _ask(sock: socket.socket) -> dict[str, Any] | None:
    """What a keeper looks after; None when it has gone."""
    try:
        sock.send(b'{"do": "list"}')
        data, fds = launch.receive(sock, keeper.MESSAGE_MAX)
    except OSError:
        data, fds = b"", []
    if not data:
        sock.close()
        return None
    with open(fds[0], "rb") as file:
        state: dict[str, Any] = json.load(file)
    return state


class _Pending:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.task: Task | None = None
        self.fault: Fault | None = None


def _task(entry: dict[str, Any]) -> Task:
    return Task(entry["key"], entry["wait_pid"], entry["pid"], entry["vpid"], entry["wait_start"], entry["start"])


def alive(task: Task) -> bool:
    """True while the process a task stands for is there, and no other under its pid."""
    if not task.wait_pid:
        return False
    try:
        return process_start(task.wait_pid) == task.wait_start
    except Fault:
        return False


class _Orphans:
    """Waits for the end of processes that are nobody's children any more."""

    def __init__(self, on_end: Callable[[str, int], None]) -> None:
        """
        :param on_end: called with the key and the status, as of wait(2).
        """
        self._on_end = on_end
        self._poll = select.poll()
        self._fds: dict[int, tuple[str, bool]] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        self._poll.register(self._wake, select.POLLIN)

    def add(self, key: str, pid: int, *, exact_status: bool) -> None:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            threading.Thread(target=self._on_end, args=(key, 0), daemon=True).start()
            return
        with self._lock:
            self._fds[fd] = (key, exact_status)
            self._poll.register(fd, select.POLLIN)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="orphans", daemon=True)
                self._thread.start()
        os.write(self._waker, b"x")

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wake:
                    if os.read(self._wake, 64).startswith(b"q"):
                        return
                    continue
                status = _exit_status(fd)
                with self._lock:
                    key, exact = self._fds.pop(fd)
                    self._poll.unregister(fd)
                    os.close(fd)
                self._on_end(key, status if exact else launch.decode(status))

    def close(self) -> None:
        os.write(self._waker, b"q")
        if self._thread is not None:
            self._thread.join(timeout=5)


def _exit_status(pidfd: int) -> int:
    """The wait status of a process that has ended; 0 where the kernel doesn't tell."""
    reaped = select.poll()
    reaped.register(pidfd, 0)
    while True:
        info = bytearray(struct.pack("=Q56x", _PIDFD_INFO_EXIT))
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        except OSError:
            return 0
        if struct.unpack_from("=Q", info)[0] & _PIDFD_INFO_EXIT:
            return int(struct.unpack_from("=i", info, 60)[0])
        # Its new parent has yet to ask for it: only then the kernel tells others.
        if not reaped.poll(_REAPED_TIMEOUT_MS):
            return 0
