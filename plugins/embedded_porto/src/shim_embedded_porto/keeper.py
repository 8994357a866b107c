"""The keeper: the one small process that is the parent of all containers and outlives the daemon.

It forks containers' first processes, runs crun for those that need a root built, and reaps. It knows nothing of what
a container is: the daemon sends plans (:mod:`plan`) and hears what became of them, and when a container has ended. An
end the daemon hasn't acknowledged is told again when it connects the next time. With no daemon and nothing left to
look after the keeper ends; it leaves word of such ends in files.

One thread, so that forking is safe; few imports, since every container shares its memory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from shim_embedded_porto import build, kernel, launch
from shim_embedded_porto.removal import try_remove_tree
from shim_embedded_porto.title import Title

if TYPE_CHECKING:
    from shim_embedded_porto.plan import Plan

MESSAGE_MAX = 1 << 20
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_EXECUTABLE_VARIABLE = "PORTO_KEEPER_EXECUTABLE"


class _Launch:
    """A start under way."""

    def __init__(self, plan: Plan, fds: list[int], control: socket.socket, pid: int) -> None:
        self.key = plan["key"]
        self.plan = plan
        self.fds = fds
        self.control = control
        self.forked = pid
        self.ready = 0
        """The process that waits for its root, or goes on at once."""
        self.crun = 0
        """The process that gathers what goes into the root, and becomes crun."""
        self.builder: socket.socket | None = None
        """Where that waits for the namespaces crun is to join."""
        self.build_failed = False
        self.waiting = 0
        """The process crun has left in the new mount namespace."""
        self.task = 0
        self.vpid = 0
        self.error: dict[str, Any] | None = None

    @property
    def wait_pid(self) -> int:
        """The process whose end is the container's end."""
        holds = self.plan["isolate"] or self.plan["command"] is None
        return self.ready if holds else self.task

    def close(self) -> None:
        self.control.close()
        if self.builder is not None:
            self.builder.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class _Program:
    """A program in memory that nobody can change.

    crun takes care that what runs in a container doesn't get hold of crun's own file: executed from a file it copies
    itself first. From here it doesn't have to.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._source: tuple[int, int, int] | None = None
        self._fd = -1

    def descriptor(self) -> int:
        """A descriptor to execute. The program is read anew when its file is another.

        :raises OSError: it can't be found or read.
        """
        path = shutil.which(self._name)
        if path is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name)
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            source = (found.st_dev, found.st_ino, found.st_mtime_ns)
            if source != self._source:
                fd = os.memfd_create(self._name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
                while os.sendfile(fd, file.fileno(), None, found.st_size):
                    pass
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                if self._fd >= 0:
                    os.close(self._fd)
                self._fd, self._source = fd, source
        return self._fd


class Keeper:
    """The loop.

    :param path: of the socket the daemon connects to.
    """

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(4)
        self._path = path
        self._crun = _Program("crun")
        self._title = Title()
        self._title.set("porto-keeper")
        self._daemon: socket.socket | None = None
        self._launches: dict[int, _Launch] = {}
        self._tasks: dict[int, tuple[str, bool]] = {}
        """By the pid to wait for: the key, and whether an exit code may stand for a signal."""
        self._running: dict[str, dict[str, Any]] = {}
        self._ends: dict[str, dict[str, Any]] = {}
        self._unclaimed: dict[int, int] = {}
        """Wait statuses of children nobody has asked for yet."""
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._poll = select.poll()
        for fd in (self._listener.fileno(), self._wake):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Serve until there is nothing left to look after."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wake:
                    os.read(self._wake, 4096)
                elif fd == self._listener.fileno():
                    self._accept()
                elif self._daemon is not None and fd == self._daemon.fileno():
                    self._serve()
                else:
                    launch_ = self._launches.get(fd)
                    if launch_ is not None:
                        self._hear(launch_)
            self._reap()
            if self._daemon is None and not self._launches and not self._tasks:
                for end in self._ends.values():
                    self._leave_word(end)
                os.unlink(self._path)
                return

    # -- the daemon ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        if self._daemon is not None:
            self._drop_daemon()
        self._daemon, _ = self._listener.accept()
        self._daemon.setblocking(False)  # a daemon that doesn't listen must not stop us
        self._poll.register(self._daemon, select.POLLIN)

    def _drop_daemon(self) -> None:
        assert self._daemon is not None
        self._poll.unregister(self._daemon)
        self._daemon.close()
        self._daemon = None

    def _serve(self) -> None:
        assert self._daemon is not None
        try:
            data, fds = launch.receive(self._daemon, MESSAGE_MAX)
        except OSError:
            data, fds = b"", []
        if not data:
            self._drop_daemon()
            return
        message = json.loads(data)
        operation = message["do"]
        if operation == "start":
            self._start(fds)
        elif operation == "list":
            self._tell_all()
        elif operation == "forget":
            self._ends.pop(message["key"], None)
        elif operation == "quit":
            os.unlink(self._path)
            os._exit(0)

    def _tell_all(self) -> None:
        """What we look after: a file goes along, since it may be more than fits into a message."""
        assert self._daemon is not None
        state = {"running": list(self._running.values()), "ends": list(self._ends.values())}
        fd = os.memfd_create("state")
        try:
            os.write(fd, json.dumps(state).encode())
            os.lseek(fd, 0, os.SEEK_SET)
            socket.send_fds(self._daemon, [b'{"tell": "list"}'], [fd])
        except OSError:
            self._drop_daemon()
        finally:
            os.close(fd)

    def _tell(self, message: dict[str, Any]) -> None:
        if self._daemon is None:
            return
        try:
            self._daemon.send(json.dumps(message).encode())
        except OSError:
            self._drop_daemon()

    # -- starting --------------------------------------------------------------------------------------------------

    def _start(self, received: list[int]) -> None:
        """The first descriptor is a file with the plan, the others are those it names."""
        with open(received[0], "rb") as file:
            plan: Plan = json.load(file)
        fds = received[1:]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        try:
            pid = os.fork()
        except OSError as err:
            self._tell({"tell": "failed", "key": plan["key"], "error": "Unknown", "text": "fork", "errno": err.errno})
            return
        if pid == 0:
            ours.close()
            self._forget_descriptors(keep={theirs.fileno(), *fds})
            self._title.set(f"portoinit --container {plan['title']}")
            launch.run(plan, fds, theirs)
        theirs.close()
        started = _Launch(plan, fds, ours, pid)
        self._launches[ours.fileno()] = started
        self._poll.register(ours, select.POLLIN)
        if plan["crun"]:
            self._start_builder(started)

    def _forget_descriptors(self, keep: set[int]) -> None:
        """In a forked process: close the keeper's own descriptors."""
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > 2 and fd not in keep:
                try:
                    os.close(fd)
                except OSError:
                    pass

    def _hear(self, started: _Launch) -> None:
        """A message of a process that is starting, or its end: then it has executed the command, or failed."""
        try:
            data, ancillary, _, _ = started.control.recvmsg(launch.MESSAGE_MAX, socket.CMSG_SPACE(12))
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._conclude(started)
            return
        sender = next((int.from_bytes(item[2][:4], sys.byteorder) for item in ancillary), 0)
        message = json.loads(data)
        if "error" in message:
            started.error = started.error or message
        elif "ready" in message:
            started.ready = sender
            if started.build_failed:
                self._abandon(started, _crun_error(started.plan["bundle"]))
            elif started.builder is not None:
                self._go_on_building(started)
        elif "adopted" in message:
            self._clean_up_crun(started)
        elif "running" in message:
            started.task, started.vpid = sender, message["running"]
        elif "map" in message:
            self._map_users(started)

    def _start_builder(self, started: _Launch) -> None:
        """Have a process gather what goes into the root, while the container's first process is on its way."""
        started.builder, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            program = self._crun.descriptor()
            pid = os.fork()
        except OSError as err:
            theirs.close()
            self._abandon(started, {"error": "Unknown", "text": err.filename or "fork", "errno": err.errno})
            return
        if pid == 0:
            launch.reset_signals()
            self._forget_descriptors(keep={theirs.fileno(), program, *started.fds})
            build.run(started.plan, started.fds, theirs, program)
        theirs.close()
        started.crun = pid

    def _go_on_building(self, started: _Launch) -> None:
        """The first process is there, and its namespaces are."""
        assert started.builder is not None
        plan = started.plan
        fds: list[int] = []
        try:
            fds.append(os.open(f"/proc/{started.ready}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            if plan["isolate"]:
                fds.append(os.open(f"/proc/{started.ready}/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
            elif "pid" in plan["join"]:
                fds.append(os.dup(started.fds[plan["join"]["pid"]]))
            socket.send_fds(started.builder, [b"go"], fds)
        except BrokenPipeError:
            pass  # it has failed; we shall hear of that
        except OSError as err:
            self._abandon(started, {"error": "Unknown", "text": err.filename or "send", "errno": err.errno})
        finally:
            for fd in fds:
                os.close(fd)

    def _crun_ended(self, started: _Launch, status: int) -> None:
        bundle = started.plan["bundle"]
        try:
            if status != 0:
                raise ValueError
            with open(f"{bundle}/pid") as file:
                started.waiting = int(file.read())
            fd = os.open(f"/proc/{started.waiting}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError):
            started.build_failed = True
            if started.ready:  # else something may be wrong that comes first
                self._abandon(started, _crun_error(bundle))
            return
        try:
            socket.send_fds(started.control, [b"go"], [fd])
        except OSError:
            pass  # it has ended; we shall hear of that
        os.close(fd)

    def _clean_up_crun(self, started: _Launch) -> None:
        if started.crun:
            # Something else has failed. Before its directory goes, whoever makes things in there does.
            _kill(started.crun)
            os.waitpid(started.crun, 0)
            started.crun = 0
        if started.waiting:
            _kill(started.waiting)
            started.waiting = 0
        if started.plan["bundle"]:
            try_remove_tree(started.plan["bundle"])

    def _map_users(self, started: _Launch) -> None:
        """Porto's mapping: the task's user is 0 inside, and every other id itself as far as possible."""
        command = started.plan["command"]
        assert command is not None
        try:
            for name, value in (("uid_map", command["uid"]), ("gid_map", command["gid"])):
                with open(f"/proc/{started.task}/{name}", "w") as file:
                    file.write(_mapping(value))
            started.control.send(b"1")
        except OSError as err:
            self._abandon(started, {"error": "Unknown", "text": f"user mapping: {err.strerror}", "errno": err.errno})

    def _abandon(self, started: _Launch, error: dict[str, Any]) -> None:
        started.error = started.error or error
        for pid in (started.ready, started.task, started.crun):
            if pid:
                _kill(pid)
        if not started.ready:
            _kill(started.forked)

    def _conclude(self, started: _Launch) -> None:
        """All ends of the control socket are closed: the command runs, or nothing does."""
        self._poll.unregister(started.control)
        del self._launches[started.control.fileno()]
        self._clean_up_crun(started)
        if started.error is None and not started.wait_pid:
            started.error = {"error": "Unknown", "text": "the process has ended before it could start", "errno": 0}
        if started.error is not None:
            self._abandon(started, started.error)
            self._tell({"tell": "failed", "key": started.key, **started.error})
        else:
            running = {
                "key": started.key,
                "wait_pid": started.wait_pid,
                "pid": started.task,
                "vpid": started.vpid,
                "wait_start": _start_ticks(started.wait_pid),
                "start": _start_ticks(started.task),
            }
            self._running[started.key] = running
            self._tell({"tell": "running", **running})
            self._tasks[started.wait_pid] = (started.key, not started.plan["exact_status"])
            status = self._unclaimed.pop(started.wait_pid, None)
            if status is not None:
                self._ended(started.wait_pid, status)
        started.close()
        if not self._launches:
            self._unclaimed.clear()

    # -- reaping ---------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            by_crun = next((entry for entry in self._launches.values() if entry.crun == pid), None)
            if pid in self._tasks:
                self._ended(pid, status)
            elif by_crun is not None:
                by_crun.crun = 0
                self._crun_ended(by_crun, status)
            elif self._launches:
                self._unclaimed[pid] = status

    def _ended(self, pid: int, status: int) -> None:
        key, encoded = self._tasks.pop(pid)
        self._running.pop(key, None)
        end = {"key": key, "status": launch.decode(status) if encoded else status, "time": time.time()}
        self._ends[key] = end
        self._tell({"tell": "ended", **end})

    def _leave_word(self, end: dict[str, Any]) -> None:
        path = f"{os.path.dirname(self._path)}/exits/{end['key']}"
        fd = os.open(f"{path}.new", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.write(fd, json.dumps(end).encode())
        os.close(fd)
        os.rename(f"{path}.new", path)


def _crun_error(bundle: str) -> dict[str, Any]:
    """What crun, or what came before it, has written to the log."""
    try:
        with open(f"{bundle}/log") as file:
            lines = file.read().strip().splitlines()
    except OSError:
        lines = []
    if lines and lines[0].isdigit():
        return {"error": "Unknown", "text": " ".join(lines[1:]), "errno": int(lines[0])}
    texts = []
    for line in lines:
        try:
            texts.append(json.loads(line)["msg"])
        except (ValueError, KeyError):
            texts.append(line)
    return {"error": "Unknown", "text": "crun: " + ("; ".join(texts) or "failed"), "errno": 0}


def _mapping(number: int) -> str:
    most = 4294967295
    if number <= 1:
        return f"0 {number} 1\n{number + 1} {number + 1} {most - 1 - number}"
    return f"0 {number} 1\n1 1 {number - 1}\n{number + 1} {number + 1} {most - 1 - number}"


def _start_ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as err:
        if err.errno != errno.ESRCH:
            raise


def main() -> None:
    """``python -I -S -c '...' SOCKET``: become the keeper.

    The interpreter is executed from a read-only mount that no path leads to: what runs in a container sees it as
    ``/proc/1/exe``, and must not be able to open it for writing.
    """
    path = sys.argv[1]
    if os.environ.get(_EXECUTABLE_VARIABLE) != sys.executable:
        _execute_read_only()
    os.umask(0o022)
    os.environ.clear()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    kernel.set_name("porto-keeper")
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keeper = Keeper(path)
    os.write(1, b"ready\n")
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    keeper.run()


def _execute_read_only() -> None:
    # Mounted nowhere, so that whatever becomes of us leaves nothing.
    fd = kernel.open_tree(os.path.realpath(sys.executable))
    kernel.set_mount(fd, set_flags=kernel.MOUNT_ATTR_RDONLY)
    environment = {_EXECUTABLE_VARIABLE: sys.executable, "PATH": os.environ.get("PATH", "")}
    os.execve(fd, sys.orig_argv, environment)
